"""How one tensor is quantized (`QuantSpec`), and what changes for some layers (`Rule`): frozen settings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from kquant.config.text import suggest
from kquant.errors import ConfigError

WEIGHT_METHODS = ("min_max", "percentile", "mse")
METHODS = (*WEIGHT_METHODS, "cross_entropy", "batch_norm", "auto")
POSITIONS = ("first", "last", "small_last", "depthwise", "outputs")
SOLVERS = ("descent", "gram", "stochastic")
# format of weights -> smallest and largest number of bits of a code of fixed length for its values
FORMATS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "uniform": (2, 16),
        "power_of_two": (2, 4),
        "apot": (4, 5),
        "kmeans": (2, 6),
        "binary_bases": (2, 4),
        "ternary": (2, 2),
        "binary": (1, 1),
    }
)
GRADIENTS = ("ste", "lsq", "lsq+", "min_max", "tqt")
BATCH_NORMS = ("fold", "keep", "double_forward", "batch_statistics")


def known_keys(values: Any, kind: type, what: str, extra: tuple[str, ...] = ()) -> None:
    """Refuse what is not a mapping, or has keys that are not fields of `kind`; suggests the nearest ones."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what[0].upper() + what[1:]} is a mapping of settings, found {values!r}.")
    known = tuple(f.name for f in fields(kind)) + extra
    for key in values:
        if key not in known:
            raise ConfigError(f"Unknown key {key!r} in {what}{suggest(str(key), known)}; known are {', '.join(known)}.")


def check_weights(spec: QuantSpec | None) -> None:
    """Refuse what only activations have.

    Raises:
        ConfigError: a range method that looks at activations, or a fixed range.
    """
    if spec is None:
        return
    if spec.method not in WEIGHT_METHODS:
        raise ConfigError(f"The range method {spec.method!r} is for activations; weights take one of {WEIGHT_METHODS}.")
    if spec.range is not None:
        raise ConfigError(
            f"range={spec.range} is for activations and inputs; the range of weights comes from the weights: "
            f"remove it and set method to one of {WEIGHT_METHODS}."
        )


def check_activations(spec: QuantSpec | None) -> None:
    """Refuse what only weights have.

    Raises:
        ConfigError: a format, or blocks.
    """
    if spec is not None and (spec.format != "uniform" or spec.block is not None):
        raise ConfigError(
            f"Activations are uniform with one scale, found format={spec.format!r}, block={spec.block}: "
            "remove these, or set them for the weights."
        )


def _valid_range(value: Any) -> tuple[float, float]:
    edges = tuple(value) if isinstance(value, tuple | list) else ()
    numbers = [float(e) for e in edges if isinstance(e, int | float) and not isinstance(e, bool) and math.isfinite(e)]
    if len(edges) != 2 or len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise ConfigError(f"range must be two finite numbers (low, high) with low < high, found {value!r}.")
    return numbers[0], numbers[1]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
    """Whether it is a positive, finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one tensor is quantized.

    Attributes:
        bits: 2 to 16, and of formats what `FORMATS` says: 1 of "binary".
        symmetric: the zero point is 0 (eq. 7), or the low edge where `signed` is False (eq. 8b).
        signed: symmetric only: whether the grid reaches below 0.
        narrow_range: symmetric signed only: leave out the smallest integer, so that the grid is
            its own mirror image.
        per_channel: one scale per output channel instead of one per tensor.
        power_of_two: round the scale up to a power of two; symmetric only.
        method: how the range is chosen, one of `METHODS`; weights take one of `WEIGHT_METHODS`. "auto" is "mse" where
            there are at most 8 bits, and "min_max" above them and in networks that multiply tensors with one another
            (`quantize.layer_specs`).
        percentile: for that method: which percentile, above 50 and at most 100, is the upper edge.
        format: weights only, one of `FORMATS` (`grids.formats` has them): all integers of a range ("uniform"); 0 and
            powers of two ("power_of_two"); sums of two powers of two ("apot"); 2^bits integers of the int8 grid
            ("kmeans"), or those that are sums of +-a_1 .. +-a_bits ("binary_bases"); -1, 0 and 1 ("ternary"); -1 and 1
            ("binary").
        block: weights only: how many inputs of a channel share a scale; None for all of them.
        range: activations only: the range itself, (low, high), e.g. (-1, 1) for images in -1..1. The grid covers
            it, widened to contain 0; `method` is not consulted and the tensor needs no data.

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
    range: tuple[float, float] | None = None
    format: str = "uniform"
    block: int | None = None

    def __post_init__(self) -> None:
        self._check_format()
        for name in ("symmetric", "signed", "narrow_range", "per_channel", "power_of_two"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, found {getattr(self, name)!r}.")
        if self.method not in METHODS:
            raise ConfigError(
                f"Unknown range method {self.method!r}{suggest(self.method, METHODS)}; use one of {METHODS}."
            )
        if not isinstance(self.percentile, int | float) or not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile must be above 50 and at most 100, found {self.percentile!r}.")
        if self.range is not None:
            object.__setattr__(self, "range", _valid_range(self.range))
        if not self.symmetric and (self.power_of_two or not self.signed):
            name = "power_of_two" if self.power_of_two else "signed=False"
            raise ConfigError(f"{name} needs a symmetric grid; set symmetric=True.")
        if self.narrow_range and not (self.symmetric and self.signed):
            raise ConfigError("narrow_range needs a symmetric signed grid; set symmetric=True and signed=True.")

    def _check_format(self) -> None:
        if self.format not in FORMATS:
            known = ", ".join(FORMATS)
            raise ConfigError(
                f"Unknown format {self.format!r}{suggest(str(self.format), FORMATS)}; use one of {known}."
            )
        low, high = FORMATS[self.format]
        if not _is_int(self.bits) or not low <= self.bits <= high:
            which = "" if self.format == "uniform" else f' of format="{self.format}"'
            number = f"an integer from {low} to {high}" if low < high else f"{low}"
            hint = ' (1 bit is format="binary")' if self.format == "uniform" and self.bits == 1 else ""
            raise ConfigError(f"bits{which} must be {number}, found {self.bits!r}{hint}.")
        if self.block is not None and (not _is_int(self.block) or self.block < 1 or not self.per_channel):
            raise ConfigError(f"block must be a number of inputs, with per_channel=True, found {self.block!r}.")
        if self.block is not None and self.format in ("kmeans", "binary_bases"):
            raise ConfigError(
                f'Blocks scale given levels, and format="{self.format}" chooses them: remove one of both.'
            )
        if (self.format != "uniform" or self.block) and (not (self.symmetric and self.signed) or self.power_of_two):
            raise ConfigError("Formats and blocks of weights need a symmetric signed grid, power_of_two=False.")

    def override(self, changes: Mapping[str, Any]) -> QuantSpec:
        """A copy with `changes` applied.

        More than 8 bits imply a symmetric grid, and 8 bits or more uniform weights without blocks, unless the changes
        say otherwise: so {"bits": 8} exempts a layer from a format.
        """
        known_keys(changes, QuantSpec, "a QuantSpec")
        changes = dict(changes)
        bits: Any = changes.get("bits")
        if _is_int(bits) and self.bits <= 8 < bits:
            changes.setdefault("symmetric", True)
        if _is_int(bits) and bits >= 8 and not {"format", "block"} & changes.keys():
            changes |= {"format": "uniform", "block": None}
        if changes.get("symmetric") is False:
            changes.setdefault("narrow_range", False)
        return replace(self, **changes)


WEIGHTS = QuantSpec(symmetric=True, narrow_range=True, per_channel=True, method="mse")
ACTIVATIONS = QuantSpec(method="auto")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Other settings for some layers. A rule applies where all of its selectors hold.

    Attributes:
        name: regular expression found anywhere in the layer's name (`re.search`); anchor it with
            ^ and $ for the whole name.
        layer_type: regular expression for the layer's whole class name, e.g. "Conv2D|Dense".
        position: "first" or "last" among the layers with weights; "small_last", the last where it has less than a
            tenth of all weights; "depthwise", those whose outputs read one channel each; "outputs", what
            the model returns and the layers that decide it: boxes, or probabilities and logits (`graph.decisions`).
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
                known_keys(changes, QuantSpec, f"{field} of {self}")
                changes = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}  # as YAML has a range
                object.__setattr__(self, field, changes)

    def __str__(self) -> str:
        return f"Rule({', '.join(f'{f.name}={v!r}' for f in fields(self) if (v := getattr(self, f.name)) is not None)})"

    def matches(self, layer_name: str, layer_type: str, **positions: bool) -> bool:
        """Whether the rule selects a layer, of which some of the `POSITIONS` are true."""
        return (
            (self.name is None or re.search(self.name, layer_name) is not None)
            and (self.layer_type is None or re.fullmatch(self.layer_type, layer_type) is not None)
            and (self.position is None or positions.get(self.position, False))
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
class AdaRound:
    """How the rounding of weights is optimized (`ptq.adaround`).

    Attributes:
        solver: one of `SOLVERS`: "descent" and "gram" work on the second moments of the inputs, "stochastic" is
            AdaRound as published.
        asymmetric: x^ is the input in the network quantized so far (eq. 35); False uses x for it (eq. 31).
        positions: output positions drawn from each sample, at most; depthwise convolutions, which have few inputs per
            output, get a quarter.
        damping: pull of the target W* towards W, relative to the mean variance of the inputs.
        scales: factors of each grid's scale to choose from, by sequential rounding; (1.0,) keeps the grids.
        sweeps: "descent": passes over the coordinates, at most.
        iterations: "gram" and "stochastic": steps of Adam.
        batch: "stochastic": patches of a step.

    Raises:
        ConfigError: a value is out of bounds.
    """

    solver: str = "descent"
    asymmetric: bool = True
    positions: int = 128
    damping: float = 0.05
    scales: tuple[float, ...] = (0.8, 0.9, 1.0, 1.1)
    sweeps: int = 50
    iterations: int = 2000
    batch: int = 256

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ConfigError(f"Unknown solver {self.solver!r}{suggest(self.solver, SOLVERS)}; use one of {SOLVERS}.")
        for name in ("positions", "sweeps", "iterations", "batch"):
            if not _is_int(value := getattr(self, name)) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, found {value!r}.")
        if not isinstance(self.asymmetric, bool):
            raise ConfigError(f"asymmetric must be true or false, found {self.asymmetric!r}.")
        if not isinstance(self.damping, int | float) or not 0 <= self.damping < math.inf:
            raise ConfigError(f"damping must be a number of at least 0, found {self.damping!r}.")
        object.__setattr__(self, "scales", tuple(self.scales))  # JSON has lists only
        if not self.scales or not all(isinstance(s, int | float) and 0 < s < math.inf for s in self.scales):
            raise ConfigError(f"scales must be positive numbers, at least one, found {self.scales!r}.")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a quantized network trains (`qat.prepare`).

    Attributes:
        gradient: how grids learn, one of `GRADIENTS`: "ste" keeps them, "lsq" learns scales, "lsq+" zero points too,
            "min_max" both edges of each range, "tqt" powers of two. Grids that the target fixes, and those of the
            model's inputs, stay; what a spec wants symmetric stays so, and what it wants to be a power of two learns by
            "tqt".
        rate: how fast grids learn, as a factor of the optimizer's learning rate.
        batch_norm: what becomes of batch normalizations (section 4.2 of the white paper): "fold" folds them before
            training; "keep" trains with them and folds them into the scales of the weights; "double_forward" and
            "batch_statistics" fold in every step, with running or with the batch's statistics.
        relative_weights: weights train in units of their size, so that an optimizer moves all layers alike, whatever
            folding and the range of the input made of them (`keras.unit`). False trains them as they are:
            a network without batch normalization then trains step by step like its float model.

    Raises:
        ConfigError: a value is out of bounds.
    """

    gradient: str = "lsq"
    rate: float = 1.0
    batch_norm: str = "fold"
    relative_weights: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.relative_weights, bool):
            raise ConfigError(f"relative_weights must be true or false, found {self.relative_weights!r}.")
        for name, known in (("gradient", GRADIENTS), ("batch_norm", BATCH_NORMS)):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"Unknown {name} {value!r}{suggest(str(value), known)}; use one of {known}.")
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float) or not 0 < self.rate < math.inf:
            raise ConfigError(f"rate must be a positive number, found {self.rate!r}; gradient='ste' keeps all grids.")
