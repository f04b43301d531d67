"""The builder and the tables with which Keras operations are lowered to primitive nodes.

`LAYERS` (by layer class) and `OPERATIONS` (by class name, for `keras.ops` and keras.activations)
map an operation to a function `fn(builder, operation, *args, **kwargs)` in which every KerasTensor
of the call is replaced by the IR node that computes it. The function emits nodes and returns the
one that stands for the result (or a list, for operations with several outputs); it raises
`NotLowered` where these settings have no primitive, and the operation is kept in float.
The tables are filled by `linear`, `layers`, `operations` and `activations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kquant.errors import ModelError
from kquant.graph.ir import Node, Shape, names_of, sample_size
from kquant.graph.ops import OPS, Tie, compute
from kquant.graph.training import UserWeight

Lowering = Callable[..., Any]
LAYERS: dict[type, Lowering] = {}
OPERATIONS: dict[str, Lowering] = {}


class NotLowered(Exception):
    """These settings of the operation have no primitive; the message is the reason."""


def lowers_layer(*classes: type) -> Callable[[Lowering], Lowering]:
    """Decorator: enter a lowering function for layer classes into `LAYERS`."""

    def enter(fn: Lowering) -> Lowering:
        LAYERS.update(dict.fromkeys(classes, fn))
        return fn

    return enter


def known_layers(*names: str) -> list[type]:
    """Those of these layers that this version of Keras has."""
    return [getattr(keras.layers, name) for name in names if hasattr(keras.layers, name)]


def lowers_op(*names: str) -> Callable[[Lowering], Lowering]:
    """Decorator: enter a lowering function for operations, by class name, into `OPERATIONS`."""

    def enter(fn: Lowering) -> Lowering:
        OPERATIONS.update(dict.fromkeys(names, fn))
        return fn

    return enter


# Methods that a subclass may define without changing what the layer computes at inference.
_HARMLESS = {"__init__", "build", "get_config", "from_config", "compute_output_shape", "compute_output_spec"}


def find_lowering(operation: keras.Operation) -> Lowering | None:
    """The lowering function of an operation, or None.

    A subclass of a known layer is lowered like it as long as it overrides no method that could
    change the computation.
    """
    if not isinstance(operation, keras.layers.Layer):
        return OPERATIONS.get(type(operation).__name__) if is_builtin(operation) else None
    for cls in type(operation).__mro__:
        if cls in LAYERS:
            return LAYERS[cls]
        if any(callable(v) and k not in _HARMLESS and hasattr(cls.__base__, k) for k, v in vars(cls).items()):
            return None
    return None


def is_builtin(operation: keras.Operation) -> bool:
    """Whether the class is a public one of Keras (its applications have custom layers, too)."""
    module = type(operation).__module__.split(".")
    return module[0] == "keras" and "applications" not in module


def as_array(value: Any) -> np.ndarray:
    """A weight or constant (Keras variable, tensor, number) as a float32 array.

    Half and double precision weights are cast: the graph is float32 throughout.
    """
    return np.asarray(keras.ops.convert_to_numpy(value)).astype(np.float32)


def without_batch(shape: Sequence[int | None]) -> Shape:
    """The shape with its first entry, the batch, set to None."""
    return (None, *(None if d is None else int(d) for d in shape[1:]))


def size_of(shape: Shape) -> int:
    """Elements of one sample."""
    return math.prod(d or 1 for d in shape[1:])


@dataclass
class Scope:
    """The operation call that is being lowered.

    Attributes:
        name: unique name of this call; its main node carries it.
        origin: name of the user's layer or operation.
        origin_type: its class name.
        shapes: shapes of the call's outputs, as Keras declares them.
        learns: neither it nor a model around it is frozen.
        trainable: it has a weight that trains.
    """

    name: str
    origin: str
    origin_type: str
    shapes: tuple[Shape, ...]
    learns: bool = True
    trainable: bool = False


class Builder:
    """Collects nodes in topological order under unique names.

    Naming: the first node emitted without a suffix gets the name of the layer (for a layer with
    weights that is its linear operation); every other node gets "<layer>/<suffix or op>". The
    second call of a shared layer gets "_1", and so on.

    Args:
        trace_function: `f(builder, fn, nodes)` traces a Python function of tensors into the builder.
        training: the graph is to train: nodes remember what their weights are in the user's layers.
    """

    def __init__(self, trace_function: Callable[..., list[Node]], training: bool = False) -> None:
        self.training = training
        self.nodes: dict[str, Node] = {}
        self.counts: set[str] = set()  # truth values that the user's model has as integers, zeros and ones
        self.scope = Scope("", "", "", ())
        self.trace_function = trace_function

    def unique(self, name: str) -> str:
        """`name`, with a number appended where it is taken, by a node, a weight or the prefix of nodes."""
        taken = names_of(self.nodes.values()) | {k.rsplit("/", 1)[0] for k in self.nodes}
        candidate, k = name, 0
        while candidate in taken:
            k += 1
            candidate = f"{name}_{k}"
        return candidate

    def _taken(self, name: str) -> bool:
        """Whether a node or a weight ("<node>/<key>") has the name."""
        owner, _, key = name.rpartition("/")
        return name in self.nodes or (owner in self.nodes and key in self.nodes[owner].weights)

    def emit(
        self,
        op: str,
        *inputs: Node,
        suffix: str = "",
        shape: Shape | None = None,
        batch: int | None = None,
        dtype: str | None = None,
        weights: Mapping[str, np.ndarray] | None = None,
        stats: Mapping[str, np.ndarray] | None = None,
        call: Any = None,
        variables: Mapping[str, Any] | None = None,
        **attrs: Any,
    ) -> Node:
        """Append a node and return it.

        Args:
            op: key of `ops.OPS`.
            inputs: the nodes that it reads.
            suffix: names a helper node; the first node without one carries the layer's name.
            shape: output shape; computed where it is not given.
            batch: see `Node.batch`; that of the inputs where it is not given.
            dtype: output type; by default that of the input where values only move, else float32.
            weights: weights, cast to float32.
            stats: see `Node.stats`.
            call: see `Node.call`.
            variables: weight -> the user's variable that it was made of, None for one that the user's layer does not
                have, or its `UserWeight`. Without an entry it trains if the layer has any weight that trains.
            attrs: the operation's attributes.

        Raises:
            ModelError: a weight is not finite.
        """
        if any(not isinstance(x, Node) for x in inputs):
            raise NotLowered(f"{op} of a constant")
        if dtype is None:
            moves = OPS[op].grid is not Tie.OWN and not OPS[op].selects
            dtype = inputs[0].dtype if moves else "float32"
        scope = self.scope
        name = f"{scope.name}/{suffix}" if suffix else scope.name
        if not suffix and name in self.nodes:
            name = f"{scope.name}/{op}"
        arrays = {k: np.asarray(v, np.float32) for k, v in (weights or {}).items()}
        for key, array in arrays.items():
            if not np.isfinite(array).all():
                raise ModelError(
                    f"Layer {scope.origin!r} ({scope.origin_type}): its {key} has NaN or infinite values, which "
                    "no integer grid can hold. Repair or retrain the layer."
                )
        node = Node(
            name=self.unique(name) if self._taken(name) else name,
            op=op,
            inputs=tuple(i.name for i in inputs),
            batch=max((i.batch for i in inputs), default=1) if batch is None else batch,
            dtype=dtype,
            attrs=attrs,
            weights=arrays,
            stats=stats or {},
            origin=scope.origin,
            origin_type=scope.origin_type,
            call=call,
            user=self._user(arrays, variables or {}),
            learns=scope.learns,
        )
        node = node.with_(shape=infer_shape(node, inputs) if shape is None else tuple(shape))
        self.nodes[node.name] = node
        return node

    def replace(self, node: Node) -> Node:
        """Put a node in the place of the one of its name."""
        self.nodes[node.name] = node
        return node

    def _user(self, weights: Mapping[str, np.ndarray], variables: Mapping[str, Any]) -> dict[str, UserWeight]:
        """What the weights of a node are in the user's layer, where the graph is to train."""
        if not self.training:
            return {}
        learns, found = self.scope.learns, {}
        for key, array in weights.items():
            given = variables.get(key, UserWeight(trainable=learns and self.scope.trainable))
            found[key] = given if isinstance(given, UserWeight) else UserWeight.of(given, array, learns)
        return found

    def const(self, value: Any, variable: Any = None) -> Node:
        """A constant operand, made of a variable of the user's or not."""
        array = as_array(value)
        variables = {} if variable is None else {"value": variable}
        return self.emit("const", suffix="const", shape=array.shape, weights={"value": array}, variables=variables)


def infer_shape(node: Node, inputs: Sequence[Node]) -> Shape:
    """Shape of the node's output, from running its float semantics on placeholders."""
    with tf.Graph().as_default():
        kinds = (tf.bool if i.dtype == "bool" else tf.float32 for i in inputs)
        tensors = [tf.compat.v1.placeholder(kind, i.shape) for kind, i in zip(kinds, inputs, strict=True)]
        weights = {k: tf.compat.v1.placeholder(tf.float32, w.shape) for k, w in node.weights.items()}
        return tuple(compute(node, tensors, weights).shape)


def reshape(b: Builder, x: Node, shape: Sequence[int | None], suffix: str = "reshape") -> Node:
    """Reshape within each sample; nothing is emitted where the shape stays.

    A sample may become several entries of the first axis (frames, windows), and they one again.

    Raises:
        NotLowered: elements would move between samples.
    """
    target = without_batch(shape)
    batch, rest = divmod(sample_size(x), max(1, size_of(target)))
    if None in target[1:] or not target or rest or not batch:
        raise NotLowered(f"reshaping {x.shape} to {tuple(shape)} changes the batch dimension")
    return x if target == x.shape else b.emit("reshape", x, shape=target, batch=batch, suffix=suffix)


def transpose(b: Builder, x: Node, perm: Sequence[int], suffix: str = "transpose") -> Node:
    """Permute axes; nothing is emitted for the identity.

    Raises:
        NotLowered: the batch would move.
    """
    order = tuple(int(p) % len(x.shape) for p in perm)
    if order[0] != 0:
        raise NotLowered("it moves the batch dimension")
    return x if order == tuple(range(len(order))) else b.emit("transpose", x, perm=order, suffix=suffix)


def axis_last(rank: int, axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The permutation that moves `axis` to the end, and its inverse."""
    axis %= rank
    there = (*(i for i in range(rank) if i != axis), axis)
    return there, tuple(int(i) for i in np.argsort(there))


def pad(
    b: Builder, x: Node, paddings: Sequence[Sequence[int]], mode: str = "constant", value: float = 0.0, suffix: str = ""
) -> Node:
    """Pad; `paddings` is full rank. Nothing is emitted where nothing is added.

    Raises:
        NotLowered: the batch would be padded, or by something else than a non-negative number.
    """
    pairs = tuple((int(lo), int(hi)) for lo, hi in paddings)
    if any(pairs[0]) or mode not in ("constant", "reflect", "symmetric") or min(map(min, pairs)) < 0:
        raise NotLowered(f"padding {pairs} with mode {mode!r}")
    if not any(map(any, pairs)):
        return x
    return b.emit("pad", x, paddings=pairs, mode=mode, value=float(value), suffix=suffix)


def scale_offset(b: Builder, x: Node, scale: Any, offset: Any, suffix: str = "") -> Node:
    """x * scale + offset for constants that broadcast against one sample.

    Scalars and vectors along the last axis become an "affine", which folds into its neighbours;
    anything else becomes a "mul" and an "add" with constants.
    """
    sources = {"scale": _variable(scale), "offset": _variable(offset)}
    scale, offset = sample_constant(x, scale), sample_constant(x, offset)
    if len(x.shape) >= 2 and max(_vector_rank(scale), _vector_rank(offset)) <= 1:
        channels = int(x.shape[-1] or 0)
        if all(a.size in (1, channels) for a in (scale, offset)):
            weights = {"scale": _per_channel(scale, channels), "offset": _per_channel(offset, channels)}
            known = {k: v for k, v in sources.items() if v is not ...}
            return b.emit("affine", x, weights=weights, suffix=suffix, variables=known)
    factor, shift = (None if v is ... else v for v in sources.values())
    if np.any(scale != 1) or factor is not None or _enlarges(x, scale):
        x = b.emit("mul", x, b.const(scale, factor), suffix=suffix)
    if np.any(offset != 0) or shift is not None or _enlarges(x, offset):
        x = b.emit("add", x, b.const(offset, shift), suffix=suffix)
    return x


def _variable(value: Any) -> Any:
    """The variable that an operand is, None for a number, or ... for what may be computed from variables."""
    return value if isinstance(value, keras.Variable) else None if isinstance(value, int | float) else ...


def _enlarges(x: Node, constant: np.ndarray) -> bool:
    """Whether a tensor broadcasts against a constant of more entries."""
    sizes = zip(reversed(x.shape[1:]), reversed(constant.shape), strict=False)
    return any(size == 1 and other > 1 for size, other in sizes)


def sample_constant(x: Node, value: Any) -> np.ndarray:
    """A constant operand of `x` without its batch dimension.

    Raises:
        NotLowered: it differs between samples or has more dimensions than `x`.
    """
    array = as_array(value)
    if array.ndim >= len(x.shape):
        if array.ndim > len(x.shape) or array.shape[0] != 1:
            raise NotLowered(f"a constant of shape {array.shape} against a tensor of shape {x.shape}")
        array = array[0]
    return array


def _vector_rank(a: np.ndarray) -> int:
    """0 for a scalar, 1 for a vector along the last axis, else more."""
    return a.ndim - min((i for i, d in enumerate(a.shape) if d != 1), default=a.ndim)


def _per_channel(a: np.ndarray, channels: int) -> np.ndarray:
    return np.broadcast_to(a.reshape(-1), (channels,)).astype(np.float32)


def affine(
    b: Builder,
    x: Node,
    scale: Any,
    offset: Any,
    axis: int,
    stats: Mapping[str, np.ndarray],
    variables: Mapping[str, Any] | None = None,
) -> Node:
    """A per-channel affine along any axis, with transposes around it where that is not the last one."""
    there, back = axis_last(len(x.shape), axis)
    moved = transpose(b, x, there, "channels_last")
    y = b.emit("affine", moved, weights={"scale": scale, "offset": offset}, stats=stats, variables=variables)
    return transpose(b, y, back, "channels_back")
