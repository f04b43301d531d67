"""What to quantize and how: frozen settings that round trip through dict, YAML and JSON.

    QuantConfig.preset("w4a8")                      # 4-bit weights, 8-bit activations
    QuantConfig.load("my_config.yaml")
    QuantConfig.load({"preset": "w4a8", "rules": [{"name": "^head", "weights": {"bits": 8}}]})

A `specs.QuantSpec` says how one tensor is quantized, a `specs.Rule` changes the specs of the layers that
it selects, a `QuantConfig` is the whole of it. What a target accepts is checked by `targets.Target`.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import yaml

from kquant.config.pruning import Prune
from kquant.config.specs import (
    ACTIVATIONS,
    FORMATS,
    METHODS,
    WEIGHTS,
    AdaRound,
    LayerSpec,
    QuantSpec,
    Rule,
    check_activations,
    check_weights,
    is_positive,
    known_keys,
)
from kquant.config.text import plain, suggest
from kquant.errors import ConfigError

_PRESET = rf"w(\d+)(?:a(\d+))?(-per_tensor)?(?:-({'|'.join(FORMATS)}))?(?:-b(\d+))?(?:-d(\d*\.?\d+))?"
_FORMAT_PRESETS = ("w4a8-kmeans", "w4a8-apot", "w4a8-power_of_two", "w3a8-binary_bases", "w2a8-ternary", "w1a8-binary")
PRESETS = ("w8a8", "w8a8-per_tensor", "w4a8", "w4a8-per_tensor", "w8a16", "w4a16", "w4a4", "w8", "w4")

PREFERENCES = ("bytes", "latency")


def _activations(bits: int) -> QuantSpec:
    """The spec of a preset's activations: what few levels cannot resolve, they had better clip (table 2)."""
    return ACTIVATIONS.override({"bits": bits, "method": "mse" if bits < 8 else ACTIVATIONS.method})


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """The settings of a quantization.

    Attributes:
        weights: spec of all weights; None keeps them float.
        activations: spec of all activations; None is weight-only quantization.
        inputs: spec of the model's inputs; None means as `activations`, but at least 8 bits.
        target: name of the `targets.Target` whose rules hold.
        equalize: equalize the ranges of all channels across layers before quantizing (cross-layer
            equalization, section 3.2 of the white paper): for per-tensor weights. Here and below, None takes the
            step where it helps (`ptq.pipeline.decide`).
        absorb_bias: move what a ReLU always lets through into the next bias (section 3.2): for narrower activations.
        adaround: optimize how weights round (section 3.4); needs data, for weights of less than 8 bits. True or the
            settings, an `AdaRound`.
        correct_bias: take the shift of means that rounding causes out of the biases (section 3.3); empirical with data,
            analytic without.
        keep_zeros: weights that are exactly zero, as pruning leaves them, stay zero: in AdaRound and in training.
            Rounding to nearest keeps them anyway.
        widen: tensors that 8 bits destroy get 16 by themselves, where the target has them and little of the network's
            time is spent there (`keras.widen`); what the model returns is reported instead.
        channel_scales: residual streams are stored with a scale per channel, which their neighbours absorb exactly,
            where the data says that it gains bits (`quantize.channel_scales`).
        prefer: where kernels of few-bit weights are slow: "bytes" packs all weights as tightly as kernels take them,
            "latency" stores them in int8 tensors there; None packs them but where little is saved for much time
            (`quantize.kernels`).
        logits: range method of the tensor in front of a final softmax, where no rule sets its `method` or
            `range`; None treats it as all others. "cross_entropy" is section 3.1 of the white paper.
        divergence: how far rounding the weights to nearest may take the outputs from those of the float network, as a
            Kullback-Leibler divergence in nats (0.02 hurts little, 0.5 much; AdaRound leaves a fraction of it): uniform
            weights of 8 bits get a step per channel that spends it evenly (`quantize.sensitivity`), which a coder of
            weights turns into small files. Needs data. None takes the finest steps.
        prune: which weights become zero before the others are quantized; a `Prune`, or None for none.
        rules: changes for some layers; where several match, later ones win.

    Raises:
        ConfigError: a field of the wrong type.
    """

    weights: QuantSpec | None = WEIGHTS
    activations: QuantSpec | None = ACTIVATIONS
    inputs: QuantSpec | None = None
    target: str = "litert"
    equalize: bool | None = None
    absorb_bias: bool | None = None
    adaround: AdaRound | bool | None = None
    correct_bias: bool | None = None
    keep_zeros: bool = False
    widen: bool = True
    channel_scales: bool = True
    prefer: str | None = None
    logits: str | None = "cross_entropy"
    divergence: float | None = None
    prune: Prune | None = None
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "inputs"):
            if not isinstance(getattr(self, name), QuantSpec | None):
                raise ConfigError(f"{name} must be a QuantSpec or None, found {getattr(self, name)!r}.")
        for name in ("equalize", "absorb_bias", "correct_bias"):
            if not isinstance(getattr(self, name), bool | None):
                raise ConfigError(f"{name} must be true, false or None, found {getattr(self, name)!r}.")
        for name in ("keep_zeros", "widen", "channel_scales"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, found {getattr(self, name)!r}.")
        if self.prefer not in (None, *PREFERENCES):
            raise ConfigError(f"prefer must be one of {PREFERENCES}, or None, found {self.prefer!r}.")
        if isinstance(self.adaround, Mapping):
            known_keys(self.adaround, AdaRound, "adaround")
            object.__setattr__(self, "adaround", AdaRound(**self.adaround))
        if not isinstance(self.adaround, AdaRound | bool | None):
            raise ConfigError(f"adaround must be true, false, None or an AdaRound, found {self.adaround!r}.")
        if isinstance(self.prune, Mapping):
            known_keys(self.prune, Prune, "prune")
            object.__setattr__(self, "prune", Prune(**self.prune))
        if not isinstance(self.prune, Prune | None):
            raise ConfigError(f"prune must be a Prune or None, found {self.prune!r}.")
        if self.divergence is not None and not is_positive(self.divergence):
            raise ConfigError(f"divergence must be a positive number of nats or None, found {self.divergence!r}.")
        if self.logits is not None and self.logits not in METHODS:
            raise ConfigError(
                f"logits must be a range method or None, found {self.logits!r}{suggest(str(self.logits), METHODS)}; "
                f"use one of {METHODS}."
            )
        check_weights(self.weights)
        check_activations(self.activations)
        check_activations(self.inputs)
        object.__setattr__(self, "rules", tuple(self.rules))
        for i, rule in enumerate(self.rules):
            if not isinstance(rule, Rule):
                raise ConfigError(f"rules must hold Rule objects, found {rule!r}.")
            try:
                weights, activations = rule.apply(self.weights, self.activations)
                check_weights(weights)
                check_activations(activations)
            except ConfigError as error:
                raise ConfigError(f"rule {i}: {rule}: {error}") from error
        if not isinstance(self.target, str):
            raise ConfigError(f"target must be the name of a target, found {self.target!r}.")

    @property
    def keeps_zeros(self) -> bool:
        """Whether weights that are zero stay zero."""
        return self.keep_zeros or self.prune is not None

    @property
    def input_spec(self) -> QuantSpec | None:
        """The spec of the model's inputs, None where they stay float."""
        if self.inputs is not None or self.activations is None:
            return self.inputs
        return replace(self.activations, bits=max(8, self.activations.bits))

    def resolve(self, layer_name: str, layer_type: str, **positions: bool) -> LayerSpec:
        """The specs of one layer.

        Args:
            layer_name: name of the user's layer.
            layer_type: its class name.
            positions: which of `specs.POSITIONS` it has.
        """
        weights, activations, is_float, reasons = self.weights, self.activations, False, []
        matched = tuple(i for i, r in enumerate(self.rules) if r.matches(layer_name, layer_type, **positions))
        for i in matched:
            rule = self.rules[i]
            weights, activations = rule.apply(weights, activations)
            is_float = is_float if rule.float is None else rule.float
            reasons.append(f"rule {i}: {rule}")
        return LayerSpec(
            weights=weights, activations=activations, float=is_float, reason="; ".join(reasons), matched=matched
        )

    def check_matched(
        self, matched: Iterable[int], layer_names: Sequence[str], layer_types: Sequence[str] = ()
    ) -> None:
        """Refuse rules that selected no layer.

        Args:
            matched: indices of the rules that matched some layer (`LayerSpec.matched` of all layers).
            layer_names: the names to suggest from; `layer_types` are the class names.

        Raises:
            ConfigError: lists the rules that matched nothing. A rule with a position alone is not
                among them: a model without weights has no first layer, and presets hold such rules.
        """
        lines = []
        for i in sorted(set(range(len(self.rules))) - set(matched)):
            rule = self.rules[i]
            if rule.name is None and rule.layer_type is None:
                continue
            hints = suggest(rule.name, layer_names) or suggest(rule.layer_type, layer_types)
            lines.append(f"  rule {i}: {rule}{hints}")
        if lines:
            raise ConfigError("These rules match no layer of the model; correct or remove them:\n" + "\n".join(lines))

    @classmethod
    def preset(cls, name: str) -> QuantConfig:
        """The configuration of a name `w<bits>[a<bits>][-per_tensor][-<format>][-b<block>][-d<D>]` or `a<bits>`.

        Weights are symmetric, narrow-range and per-channel (`-per_tensor`: one scale per tensor),
        with MSE ranges. Activations are asymmetric with "auto" ranges, below 8 bits with MSE ranges; above
        8 bits they are symmetric. Below 8 bits the first layer's
        weights and the last layer's weights and output stay at 8 bits, and so do the model's
        inputs. With a format, e.g. w2a8-ternary or w1a8-binary, the first layer, depthwise layers and a small last
        layer (see `specs.Rule`) have uniform weights of 8 bits: they are few, and much hangs on each. With `-d<D>`,
        e.g. w8a8-d0.1, the steps of the weights are those of a `divergence` of D. Without `a<bits>` only the weights
        are quantized, without `w<bits>` only the activations, which no hardware runs (target "simulation").

        Raises:
            ConfigError: not such a name.
        """
        if alone := re.fullmatch(r"a(\d+)", str(name)):
            return cls(weights=None, activations=_activations(int(alone[1])), target="simulation")
        match = re.fullmatch(_PRESET, str(name))
        if match is None:
            hint = suggest(str(name), (*PRESETS, *_FORMAT_PRESETS))
            raise ConfigError(
                f"Unknown preset {name!r}{hint}; it has the form "
                "w<bits>[a<bits>][-per_tensor][-<format>][-b<block>][-d<divergence>], e.g. w8a8."
            )
        w_bits, per_tensor = int(match[1]), match[3] is not None
        weights = replace(
            WEIGHTS,
            bits=w_bits,
            per_channel=not per_tensor,
            format=match[4] or "uniform",
            block=None if match[5] is None else int(match[5]),
        )
        target = "litert_per_tensor" if per_tensor else "litert"
        made = cls(
            weights=weights,
            activations=None if match[2] is None else _activations(int(match[2])),
            target="litert" if match[2] and int(match[2]) > 8 else target,
            divergence=None if match[6] is None else float(match[6]),
        )
        return replace(made, rules=_kept(weights, made.activations))

    @staticmethod
    def names() -> tuple[str, ...]:
        """The usual presets; `preset` understands every other combination too."""
        return PRESETS

    @classmethod
    def load(cls, source: QuantConfig | str | os.PathLike[str] | Mapping[str, Any]) -> QuantConfig:
        """A configuration from itself, a preset's name, a dict, or the path of a .yaml, .yml or .json file.

        Raises:
            ConfigError: the file cannot be read, or what it holds is not a configuration.
        """
        if isinstance(source, QuantConfig):
            return source
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        if not isinstance(source, str | os.PathLike):
            raise ConfigError(f"A config is a QuantConfig, preset name, dict or path, found {type(source).__name__}.")
        path = pathlib.Path(source)
        if path.suffix not in _PARSERS:
            return cls.preset(str(source))
        try:
            values = _PARSERS[path.suffix](path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"Cannot read the config {str(path)!r}: {error}.") from error
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """The inverse of `to_dict`; "preset" names the configuration that the other keys change.

        "weights", "activations" and "inputs" change fields of the base's spec; "rules" are added
        after those of the preset.

        Raises:
            ConfigError: an unknown key, with the nearest known one.
        """
        known_keys(values, QuantConfig, "a config", extra=("preset",))
        base = cls.preset(values["preset"]) if "preset" in values else cls()
        defaults = {"weights": base.weights or WEIGHTS, "activations": base.activations or ACTIVATIONS}
        changes: dict[str, Any] = {k: v for k, v in values.items() if k not in ("preset", "rules")}
        for name in ("weights", "activations", "inputs"):
            if isinstance(changes.get(name), Mapping):
                default = defaults.get(name) or base.input_spec or ACTIVATIONS
                changes[name] = default.override(changes[name])
        rules = values.get("rules") or ()
        if isinstance(rules, str | Mapping):
            raise ConfigError(f"rules must be a list of rules, found {rules!r}.")
        return replace(base, **changes, rules=base.rules + tuple(_rule(r) for r in rules))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers: `from_dict` gives the same configuration back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["rules"] = [rule.to_dict() for rule in self.rules]
        return {
            name: plain(asdict(v) if isinstance(v, QuantSpec | AdaRound | Prune) else v) for name, v in values.items()
        }

    def to_yaml(self) -> str:
        """The configuration as a YAML document."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def to_json(self) -> str:
        """The configuration as a JSON document."""
        return json.dumps(self.to_dict(), indent=2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .yaml, .yml or .json file; another extension is a ConfigError."""
        path = pathlib.Path(path)
        if path.suffix not in _PARSERS:
            raise ConfigError(f"A config is saved as {', '.join(_PARSERS)}, found {str(path)!r}.")
        path.write_text(self.to_json() if path.suffix == ".json" else self.to_yaml(), encoding="utf-8")


_PARSERS = {".yaml": yaml.safe_load, ".yml": yaml.safe_load, ".json": json.loads}


def _kept(weights: QuantSpec, activations: QuantSpec | None) -> tuple[Rule, ...]:
    """The rules of a preset: what stays at 8 bits."""
    kept = {"bits": 8}
    ends: tuple[Rule, ...] = ()
    if activations is not None and activations.bits < 8:
        ends = (Rule(position="first", weights=kept), Rule(position="last", weights=kept, activations=kept))
    if weights.format == "uniform":
        return ends
    few = tuple(Rule(position=p, weights=kept) for p in ("first", "depthwise", "small_last"))
    return (*ends, few[1]) if ends else few


def _rule(values: Any) -> Rule:
    if isinstance(values, Rule):
        return values
    known_keys(values, Rule, "a rule")
    return Rule(**values)
