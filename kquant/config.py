"""What to quantize and how: frozen settings that round trip through dict, YAML and JSON.

    QuantConfig.preset("w4a8")                      # 4-bit weights, 8-bit activations
    QuantConfig.load("my_config.yaml")
    QuantConfig.load({"preset": "w4a8", "rules": [{"name": "^head", "weights": {"bits": 8}}]})

A `QuantSpec` says how one tensor is quantized, a `Rule` changes the specs of the layers that it
selects, a `QuantConfig` is the whole of it. What a target accepts is checked by `targets.Target`.
"""

from __future__ import annotations

import difflib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import yaml

from kquant.errors import ConfigError
from kquant.targets import get_target

METHODS = ("min_max", "percentile", "mse")
POSITIONS = ("first", "last")
PRESETS = ("w8a8", "w8a8-per_tensor", "w4a8", "w4a8-per_tensor", "w8a16", "w4a16", "w4a4", "w8", "w4")


def _known_keys(values: Any, kind: type, what: str, extra: tuple[str, ...] = ()) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what[0].upper() + what[1:]} is a mapping of settings, found {values!r}.")
    known = tuple(f.name for f in fields(kind)) + extra
    for key in values:
        if key not in known:
            raise ConfigError(
                f"Unknown key {key!r} in {what}{_suggest(str(key), known)}; known are {', '.join(known)}."
            )


def _suggest(name: str | None, known: Iterable[str]) -> str:
    plain = re.sub(r"[\\^$.*+?()\[\]{}]", "", name or "")
    close = difflib.get_close_matches(plain, list(known), n=3, cutoff=0.5) if plain else []
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one tensor is quantized.

    Attributes:
        bits: 2 to 16.
        symmetric: the zero point is 0 (eq. 7), or the low edge where `signed` is False (eq. 8b).
        signed: symmetric only: whether the grid reaches below 0.
        narrow_range: symmetric signed only: leave out the smallest integer, so that the grid is
            its own mirror image.
        per_channel: one scale per output channel instead of one per tensor.
        power_of_two: round the scale up to a power of two; symmetric only.
        method: how the range is chosen, one of `METHODS`.
        percentile: for that method: which percentile, above 50 and at most 100, is the upper edge.

    Raises:
        ConfigError: a value is out of bounds, or two settings exclude each other.
    """

    bits: int = 8
    symmetric: bool = False
    signed: bool = True
    narrow_range: bool = False
    per_channel: bool = False
    power_of_two: bool = False
    method: str = "min_max"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or not 2 <= self.bits <= 16:
            raise ConfigError(f"bits must be an integer from 2 to 16, found {self.bits!r}.")
        for name in ("symmetric", "signed", "narrow_range", "per_channel", "power_of_two"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, found {getattr(self, name)!r}.")
        if self.method not in METHODS:
            raise ConfigError(
                f"Unknown range method {self.method!r}{_suggest(self.method, METHODS)}; use one of {METHODS}."
            )
        if not isinstance(self.percentile, int | float) or not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile must be above 50 and at most 100, found {self.percentile!r}.")
        if not self.symmetric and (self.power_of_two or not self.signed):
            name = "power_of_two" if self.power_of_two else "signed=False"
            raise ConfigError(f"{name} needs a symmetric grid; set symmetric=True.")
        if self.narrow_range and not (self.symmetric and self.signed):
            raise ConfigError("narrow_range needs a symmetric signed grid; set symmetric=True and signed=True.")

    def override(self, changes: Mapping[str, Any]) -> QuantSpec:
        """A copy with `changes` applied; more than 8 bits imply a symmetric grid unless they say otherwise."""
        _known_keys(changes, QuantSpec, "a QuantSpec")
        changes = dict(changes)
        bits: Any = changes.get("bits")
        if _is_int(bits) and self.bits <= 8 < bits:
            changes.setdefault("symmetric", True)
        if changes.get("symmetric") is False:
            changes.setdefault("narrow_range", False)
        return replace(self, **changes)


WEIGHTS = QuantSpec(symmetric=True, narrow_range=True, per_channel=True, method="mse")
ACTIVATIONS = QuantSpec()


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Other settings for some layers. A rule applies where all of its selectors hold.

    Attributes:
        name: regular expression found anywhere in the layer's name (`re.search`); anchor it with
            ^ and $ for the whole name.
        layer_type: regular expression for the layer's whole class name, e.g. "Conv2D|Dense".
        position: "first" or "last" among the layers with weights.
        weights: fields of the weights' `QuantSpec` to change.
        activations: fields of the `QuantSpec` of the layer's output to change.
        float: True leaves the layer in float, False takes back what an earlier rule said.

    Raises:
        ConfigError: no selector, nothing to change, an invalid regular expression or field.
    """

    name: str | None = None
    layer_type: str | None = None
    position: str | None = None
    weights: Mapping[str, Any] | None = None
    activations: Mapping[str, Any] | None = None
    float: bool | None = None

    def __post_init__(self) -> None:
        if self.name is None and self.layer_type is None and self.position is None:
            raise ConfigError(f'{self} selects no layer; give name, layer_type or position (name=".*" is every layer).')
        if self.weights is None and self.activations is None and self.float is None:
            raise ConfigError(f"{self} changes nothing; give weights, activations or float.")
        for pattern in (self.name, self.layer_type):
            try:
                re.compile(pattern or "")
            except (re.error, TypeError) as error:
                raise ConfigError(f"{pattern!r} in {self} is not a regular expression: {error}.") from error
        if self.position not in (None, *POSITIONS):
            raise ConfigError(f"position in {self} must be one of {POSITIONS}, found {self.position!r}.")
        if not isinstance(self.float, bool | None):
            raise ConfigError(f"float in {self} must be true or false, found {self.float!r}.")
        for field in ("weights", "activations"):
            if (changes := getattr(self, field)) is not None:
                _known_keys(changes, QuantSpec, f"{field} of {self}")
                object.__setattr__(self, field, dict(changes))

    def __str__(self) -> str:
        return f"Rule({', '.join(f'{f.name}={v!r}' for f in fields(self) if (v := getattr(self, f.name)) is not None)})"

    def matches(self, layer_name: str, layer_type: str, first: bool = False, last: bool = False) -> bool:
        """Whether the rule selects a layer."""
        return (
            (self.name is None or re.search(self.name, layer_name) is not None)
            and (self.layer_type is None or re.fullmatch(self.layer_type, layer_type) is not None)
            and (self.position is None or (first if self.position == "first" else last))
        )

    def apply(
        self, weights: QuantSpec | None, activations: QuantSpec | None
    ) -> tuple[QuantSpec | None, QuantSpec | None]:
        """Both specs with the rule's changes; a change to a missing spec starts from the default one."""
        if self.weights is not None:
            weights = (weights or WEIGHTS).override(self.weights)
        if self.activations is not None:
            activations = (activations or ACTIVATIONS).override(self.activations)
        return weights, activations

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set."""
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What `QuantConfig.resolve` decided for one layer.

    Attributes:
        weights: spec of the weights, None where they stay float.
        activations: spec of the output, None where it stays float.
        float: a rule leaves the whole layer in float.
        reason: why, for the report; empty where no rule matched.
        matched: indices of the rules that matched.
    """

    weights: QuantSpec | None
    activations: QuantSpec | None
    float: bool
    reason: str
    matched: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """The settings of a quantization.

    Attributes:
        weights: spec of all weights; None keeps them float.
        activations: spec of all activations; None is weight-only quantization.
        inputs: spec of the model's inputs; None means as `activations`, but at least 8 bits.
        target: name of the `targets.Target` whose rules hold.
        equalize: equalize the ranges of all channels across layers before quantizing (cross-layer
            equalization, section 3.2 of the white paper): for per-tensor weights.
        rules: changes for some layers; where several match, later ones win.

    Raises:
        ConfigError: a field of the wrong type, or an unknown target.
    """

    weights: QuantSpec | None = WEIGHTS
    activations: QuantSpec | None = ACTIVATIONS
    inputs: QuantSpec | None = None
    target: str = "tflite_int8"
    equalize: bool = False
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "inputs"):
            if not isinstance(getattr(self, name), QuantSpec | None):
                raise ConfigError(f"{name} must be a QuantSpec or None, found {getattr(self, name)!r}.")
        if not isinstance(self.equalize, bool):
            raise ConfigError(f"equalize must be true or false, found {self.equalize!r}.")
        object.__setattr__(self, "rules", tuple(self.rules))
        for i, rule in enumerate(self.rules):
            if not isinstance(rule, Rule):
                raise ConfigError(f"rules must hold Rule objects, found {rule!r}.")
            try:
                rule.apply(self.weights, self.activations)
            except ConfigError as error:
                raise ConfigError(f"rule {i}: {rule}: {error}") from error
        get_target(self.target)

    @property
    def input_spec(self) -> QuantSpec | None:
        """The spec of the model's inputs, None where they stay float."""
        if self.inputs is not None or self.activations is None:
            return self.inputs
        return replace(self.activations, bits=max(8, self.activations.bits))

    def resolve(self, layer_name: str, layer_type: str, first: bool = False, last: bool = False) -> LayerSpec:
        """The specs of one layer.

        Args:
            layer_name: name of the user's layer.
            layer_type: its class name.
            first: it is the first layer with weights; `last` likewise.
        """
        weights, activations, is_float, reasons = self.weights, self.activations, False, []
        matched = tuple(i for i, r in enumerate(self.rules) if r.matches(layer_name, layer_type, first, last))
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
            hints = _suggest(rule.name, layer_names) or _suggest(rule.layer_type, layer_types)
            lines.append(f"  rule {i}: {rule}{hints}")
        if lines:
            raise ConfigError("These rules match no layer of the model; correct or remove them:\n" + "\n".join(lines))

    @classmethod
    def preset(cls, name: str) -> QuantConfig:
        """The configuration of a name `w<bits>[a<bits>][-per_tensor]`, bits 2 to 16.

        Weights are symmetric, narrow-range and per-channel (`-per_tensor`: one scale per tensor),
        with MSE ranges. Activations are asymmetric with min-max ranges; above 8 bits they are
        symmetric and the target is tflite_int16x8. Below 8 bits the first layer's
        weights and the last layer's weights and output stay at 8 bits, and so do the model's
        inputs. Without `a<bits>` only the weights are quantized.

        Raises:
            ConfigError: not such a name.
        """
        match = re.fullmatch(r"w(\d+)(?:a(\d+))?(-per_tensor)?", str(name))
        if match is None:
            hint = _suggest(str(name), PRESETS)
            raise ConfigError(f"Unknown preset {name!r}{hint}; w<bits>[a<bits>][-per_tensor] is one, e.g. w8a8.")
        w_bits, per_tensor = int(match[1]), match[3] is not None
        weights = replace(WEIGHTS, bits=w_bits, per_channel=not per_tensor)
        target = "tflite_int8_per_tensor" if per_tensor else "tflite_int8"
        if match[2] is None:
            return cls(weights=weights, activations=None, target=target)
        a_bits = int(match[2])
        if a_bits > 8:
            return cls(weights=weights, activations=ACTIVATIONS.override({"bits": a_bits}), target="tflite_int16x8")
        activations = replace(ACTIVATIONS, bits=a_bits)
        keep = {"bits": 8}
        rules = (Rule(position="first", weights=keep), Rule(position="last", weights=keep, activations=keep))
        return cls(weights=weights, activations=activations, target=target, rules=rules if a_bits < 8 else ())

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
        _known_keys(values, QuantConfig, "a config", extra=("preset",))
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
        specs = {k: v and asdict(v) for k in ("weights", "activations", "inputs") for v in [getattr(self, k)]}
        switches = {"target": self.target, "equalize": self.equalize}
        return {**specs, **switches, "rules": [rule.to_dict() for rule in self.rules]}

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


def _rule(values: Any) -> Rule:
    if isinstance(values, Rule):
        return values
    _known_keys(values, Rule, "a rule")
    return Rule(**values)
