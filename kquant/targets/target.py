"""What a piece of hardware accepts: containers, granularity, grids that are tied or fixed.

The "tflite_" targets describe the integer kernels of TFLite (LiteRT 2.3, TensorFlow 2.21), as measured: a combination
that a kernel takes but computes wrongly is not offered. "simulation" also takes what no kernel computes, float weights
with integer activations, to tell the effects of the two apart. Operations go by their
names in `graph.ops`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING

from kquant.errors import ConfigError

if TYPE_CHECKING:
    from kquant.config.quant_config import QuantConfig
    from kquant.config.specs import QuantSpec


# The kernels take the output's grid for the input's without looking (or refuse a difference).
_SAME_SCALE = frozenset({"reshape", "transpose", "slice", "pad", "max_pool2d", "avg_pool2d", "resize", "reduce_max"})
_INPUTS_SHARE_OUTPUT = frozenset({"concat", "maximum", "minimum"})
_FIXED_OUTPUTS: Mapping[tuple[str, int], tuple[float, int]] = MappingProxyType(
    {
        ("softmax", 8): (1 / 256, -128),
        ("logistic", 8): (1 / 256, -128),
        ("tanh", 8): (1 / 128, 0),
        ("softmax", 16): (1 / 32768, 0),
        ("logistic", 16): (1 / 32768, 0),
        ("tanh", 16): (1 / 32768, 0),
    }
)
# (op, activation container) -> the weight containers below int8 that the kernel computes right.
# Depthwise with int16 activations accepts int4 and is silently wrong, so it is not listed.
_SMALL_WEIGHTS: Mapping[tuple[str, int], tuple[int, ...]] = MappingProxyType(
    {
        ("conv2d", 8): (4,),
        ("depthwise_conv2d", 8): (4,),
        ("dense", 8): (2, 4),
        ("conv2d", 16): (4,),
        ("dense", 16): (4,),
    }
)
_FLOAT_ONLY: Mapping[int, frozenset[str]] = MappingProxyType(
    {8: frozenset({"float"}), 16: frozenset({"float", "gelu", "elu", "hard_swish", "prelu"})}
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The rules of one target.

    Attributes:
        name: key of `TARGETS`.
        activation_bits: containers for the activations of a whole model.
        mixed_activation_bits: containers that a rule may give to single layers.
        weight_bits: smallest and largest number of bits of a weight.
        per_channel_weights: one weight scale per output channel is accepted.
        symmetric_weights: weights need zero point 0.
        symmetric_activations: activations need zero point 0 (16-bit containers always do).
        same_scale: operations whose output has the grid of their input.
        inputs_share_output: operations whose inputs need the grid of their output.
        float_weights: integer activations may meet float weights. No hardware does that: such a target is for
            experiments, and cannot be exported to.
    """

    name: str
    activation_bits: tuple[int, ...]
    mixed_activation_bits: tuple[int, ...] = (8, 16)
    weight_bits: tuple[int, int] = (2, 8)
    per_channel_weights: bool = True
    symmetric_weights: bool = True
    symmetric_activations: bool = False
    same_scale: frozenset[str] = _SAME_SCALE
    inputs_share_output: frozenset[str] = _INPUTS_SHARE_OUTPUT
    float_weights: bool = False

    def container_bits(self, bits: int) -> int:
        """Bits of the integer type that stores a `bits`-bit activation."""
        for container in sorted(self.mixed_activation_bits):
            if bits <= container:
                return container
        raise ConfigError(
            f"{self.name} has no container for {bits}-bit activations; use at most {max(self.mixed_activation_bits)}."
        )

    def weight_container(self, op: str, bits: int, activation_container: int) -> int:
        """Bits (2, 4 or 8) of the integer type that stores the `bits`-bit weights of `op`."""
        for container in _SMALL_WEIGHTS.get((op, activation_container), ()):
            if bits <= container:
                return container
        return 8

    def fixed_output(self, op: str, container: int) -> tuple[float, int] | None:
        """The (scale, zero point) that the kernel of `op` insists on for its output, if it does."""
        return _FIXED_OUTPUTS.get((op, container))

    def float_only(self, op: str, container: int) -> bool:
        """Whether `op` has no integer kernel for activations in this container."""
        return op in _FLOAT_ONLY[container]

    def check(self, config: QuantConfig) -> None:
        """Refuse what the target cannot run.

        Raises:
            ConfigError: names the setting (and the rule it comes from) and the remedy.
        """
        self._check_weights(config.weights, "weights")
        self._check_activations(config.activations, "activations", self.activation_bits)
        self._check_activations(config.input_spec, "inputs", self.activation_bits)
        for i, rule in enumerate(config.rules):
            weights, activations = rule.apply(config.weights, config.activations)
            self._check_weights(weights, f"weights in rule {i}, {rule},")
            self._check_activations(activations, f"activations in rule {i}, {rule},", self.mixed_activation_bits)

    def _check_weights(self, spec: QuantSpec | None, where: str) -> None:
        if spec is None:
            return
        low, high = self.weight_bits
        if not low <= spec.bits <= high:
            raise ConfigError(f"{where}: {self.name} takes {low} to {high} bits, found {spec.bits}; set bits={high}.")
        if self.symmetric_weights and not (spec.symmetric and spec.signed):
            raise ConfigError(
                f"{where}: {self.name} takes symmetric signed weights only (its kernels are silently "
                "wrong with a zero point); set symmetric=True and signed=True."
            )
        if spec.per_channel and not self.per_channel_weights:
            raise ConfigError(
                f"{where}: {self.name} has one scale per weight tensor; set per_channel=False or target='tflite_int8'."
            )

    def _check_activations(self, spec: QuantSpec | None, where: str, containers: tuple[int, ...]) -> None:
        if spec is None:
            return
        if spec.per_channel:
            raise ConfigError(f"{where}: {self.name} has one scale per activation tensor; set per_channel=False.")
        container = self.container_bits(spec.bits)
        if container not in containers:
            other = TFLITE_INT16X8.name if container == 16 else TFLITE_INT8.name
            raise ConfigError(
                f"{where}: {self.name} stores activations in {_join(containers)} bits, found bits={spec.bits}; "
                f"set target={other!r}, or change single layers with a rule."
            )
        if (self.symmetric_activations or container == 16) and not (spec.symmetric and spec.signed):
            raise ConfigError(
                f"{where}: {self.name} needs zero point 0 in {container}-bit activations; "
                "set symmetric=True and signed=True."
            )


def _join(values: tuple[int, ...]) -> str:
    return " or ".join(map(str, values))


TFLITE_INT8 = Target(name="tflite_int8", activation_bits=(8,))
TFLITE_INT8_PER_TENSOR = Target(name="tflite_int8_per_tensor", activation_bits=(8,), per_channel_weights=False)
TFLITE_INT16X8 = Target(name="tflite_int16x8", activation_bits=(16,))
SIMULATION = Target(name="simulation", activation_bits=(8, 16), float_weights=True)
TARGETS: Mapping[str, Target] = MappingProxyType(
    {t.name: t for t in (TFLITE_INT8, TFLITE_INT8_PER_TENSOR, TFLITE_INT16X8, SIMULATION)}
)


def get_target(name: str) -> Target:
    """The target of a name.

    Raises:
        ConfigError: there is none, with the nearest known name.
    """
    if name in TARGETS:
        return TARGETS[name]
    close = get_close_matches(str(name), TARGETS, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ConfigError(f"Unknown target {name!r}{hint}; known are {', '.join(TARGETS)}.")
