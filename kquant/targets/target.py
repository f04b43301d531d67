"""What a piece of hardware accepts: containers, granularity, grids that are tied or fixed, kernels, a runtime.

A target owns its rules: everything that depends on an operation is in the records of its kernels. One of your own is a
few lines:

    kquant.register_target(dataclasses.replace(kquant.get_target("litert"), name="mine", weight_bits=(4, 8)))
    kquant.quantize_model(model, data, config={"preset": "w8a8", "target": "mine"})

Operations go by their names in `graph.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from kquant.errors import ConfigError
from kquant.graph.ir import Node
from kquant.graph.ops import OPS, Tie
from kquant.targets.builtin import Builtin
from kquant.targets.kernel import Kernel
from kquant.targets.runtime import Runtime
from kquant.targets.storage.constants import Stored

if TYPE_CHECKING:
    from kquant.config.quant_config import QuantConfig
    from kquant.config.specs import QuantSpec

# a schema.ModelT, changed in place -> how each of its weights is stored
Storage = Callable[[Any], tuple[Stored, ...]]
_NOT_COMPUTED = ("input", "const", "train_only")  # operations that no file has


@dataclass(frozen=True, kw_only=True)
class Target:
    """The rules of one target.

    Attributes:
        name: by which configs, layers and files know it (see `register_target`).
        kernels: operation -> how it is computed; an operation that is not in it stays float.
        activation_bits: containers for the activations of a whole model.
        mixed_activation_bits: containers that a rule may give to single layers.
        weight_bits: smallest and largest number of bits of a weight.
        packed_weights: weights of 4 bits and fewer are stored in int4 and int2 tensors where the kernel takes them;
            otherwise in int8 tensors.
        fixed_batch: every shape in its files is constant, for one sample; otherwise a user may resize the batch.
        per_channel_weights: one weight scale per output channel is accepted.
        symmetric_weights: weights need zero point 0.
        symmetric_activations: activations need zero point 0 (16-bit containers always do).
        float_weights: integer activations may meet float weights. No hardware does that: such a target is for
            experiments, and cannot be exported to.
        runtime: what runs and checks its files; None where nothing does.
        storage: name -> a way of storing weights in fewer bytes, which its runtime reads.
    """

    name: str
    kernels: Mapping[str, Kernel]
    activation_bits: tuple[int, ...]
    mixed_activation_bits: tuple[int, ...] = (8, 16)
    weight_bits: tuple[int, int] = (2, 8)
    packed_weights: bool = True
    fixed_batch: bool = False
    per_channel_weights: bool = True
    symmetric_weights: bool = True
    symmetric_activations: bool = False
    float_weights: bool = False
    runtime: Runtime | None = None
    storage: Mapping[str, Storage] = field(default_factory=dict)

    @property
    def same_scale(self) -> frozenset[str]:
        """Operations whose output has the grid of their input: their kernels take the one for the other."""
        return self._tied(Tie.OF_INPUT)

    @property
    def inputs_share_output(self) -> frozenset[str]:
        """Operations whose inputs need the grid of their output: their kernels look at one grid only."""
        return self._tied(Tie.SHARED)

    @property
    def fixed_outputs(self) -> frozenset[str]:
        """Operations whose kernels insist on the grid of their output, in some container; see `fixed_output`."""
        return frozenset(op for op, kernel in self.kernels.items() if kernel.output)

    def _tied(self, tie: Tie) -> frozenset[str]:
        return frozenset(op for op in (*self.kernels, *_NOT_COMPUTED) if OPS[op].grid is tie)

    @property
    def operators(self) -> dict[str, Builtin]:
        """The operators that its files consist of."""
        kernels = [k for kernel in self.kernels.values() for k in (*kernel.variants.values(), kernel)]
        return {name: builtin for kernel in kernels for name, builtin in kernel.operators.items()}

    def container_bits(self, bits: int) -> int:
        """Bits of the integer type that stores a `bits`-bit activation."""
        for container in sorted(self.mixed_activation_bits):
            if bits <= container:
                return container
        raise ConfigError(
            f"{self.name} has no container for {bits}-bit activations; use at most {max(self.mixed_activation_bits)}."
        )

    def kernel(self, node: Node) -> Kernel:
        """The kernel that computes a node: its operation's, or the variant of it that the node names."""
        kernel = self.kernels[node.op]
        return kernel.variants.get(node.attrs.get("kernel", ""), kernel)

    def weight_container(self, node: Node, bits: int, activation_container: int) -> int:
        """Bits (2, 4 or 8) of the integer type that stores the `bits`-bit weights of a node."""
        if not self.packed_weights or node.op not in self.kernels:
            return 8
        return self.kernel(node).container(bits, activation_container)

    def takes_blocks(self, op: str, width: int) -> bool:
        """Whether the float kernel of `op` reads weights of `width` bits with a scale for every block of inputs."""
        layout = self.kernels[op].layout if op in self.kernels else None
        return layout is not None and any(width <= bits for bits in layout.blocks)

    def fixed_output(self, op: str, container: int) -> tuple[float, int] | None:
        """The (scale, zero point) that the kernel of `op` insists on for its output, if it does."""
        return self.kernels[op].output.get(container) if op in self.kernels else None

    def headroom(self, op: str, container: int) -> float:
        """By what factor the range of the output of `op` has to exceed its values."""
        return self.kernels[op].headroom.get(container, 1.0) if op in self.kernels else 1.0

    def beside_powers(self, op: str, container: int) -> float:
        """How far the scale of what `op` reads has to be from a power of two, as a binary logarithm."""
        return self.kernels[op].beside_powers.get(container, 0.0) if op in self.kernels else 0.0

    def least_scale(self, op: str, container: int) -> float:
        """The smallest scale of what `op` reads."""
        return self.kernels[op].least_scale.get(container, 0.0) if op in self.kernels else 0.0

    def float_only(self, op: str, container: int) -> bool:
        """Whether `op` has no integer kernel for activations in this container."""
        if op in _NOT_COMPUTED:
            return False
        return op not in self.kernels or container not in self.kernels[op].arithmetic

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
        if not low <= max(spec.bits, 2) <= high:  # 1 bit is -1 and 1, which take two
            raise ConfigError(f"{where}: {self.name} takes {low} to {high} bits, found {spec.bits}; set bits={high}.")
        if self.symmetric_weights and not (spec.symmetric and spec.signed):
            raise ConfigError(
                f"{where}: {self.name} takes symmetric signed weights only (its kernels are silently "
                "wrong with a zero point); set symmetric=True and signed=True."
            )
        if spec.per_channel and not self.per_channel_weights:
            raise ConfigError(
                f"{where}: {self.name} has one scale per weight tensor; set per_channel=False or target='litert'."
            )

    def _check_activations(self, spec: QuantSpec | None, where: str, containers: tuple[int, ...]) -> None:
        if spec is None:
            return
        if spec.per_channel:
            raise ConfigError(f"{where}: {self.name} has one scale per activation tensor; set per_channel=False.")
        container = self.container_bits(spec.bits)
        if container not in containers:
            raise ConfigError(
                f"{where}: {self.name} stores activations in {_join(containers)} bits, found bits={spec.bits}; "
                f"set bits={max(containers)}, or change single layers with a rule."
            )
        if (self.symmetric_activations or container == 16) and not (spec.symmetric and spec.signed):
            raise ConfigError(
                f"{where}: {self.name} needs zero point 0 in {container}-bit activations; "
                "set symmetric=True and signed=True."
            )


def _join(values: tuple[int, ...]) -> str:
    return " or ".join(map(str, values))


_REGISTERED: dict[str, Target] = {}


def register_target(target: Target, *, also: tuple[str, ...] = ()) -> Target:
    """Have `get_target`, configs and saved models find a target by its name.

    A model that was saved for a target of your own loads once the target is registered.

    Args:
        target: replaces one that was registered by the same name.
        also: other names for it.

    Returns:
        The target.

    Raises:
        TypeError: `target` is not a `Target`.
    """
    if not isinstance(target, Target):
        raise TypeError(f"register_target takes a kquant.Target, not {target!r}")
    for name in (target.name, *also):
        _REGISTERED[name] = target
    return target


def get_target(name: str) -> Target:
    """The target of a name.

    Raises:
        ConfigError: there is none, with the nearest known name.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    close = get_close_matches(str(name), _REGISTERED, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    known = ", ".join(dict.fromkeys(t.name for t in _REGISTERED.values()))
    raise ConfigError(f"Unknown target {name!r}{hint}; known are {known}; kquant.register_target adds one.")
