"""Lowering of reductions that are compositions, and of orders."""

from __future__ import annotations

import math
from typing import Any

from kquant.graph.ir import Node
from kquant.graph.tracing.builder import Builder, NotLowered, lowers_op, reshape
from kquant.graph.tracing.functions import function
from kquant.graph.tracing.operations import reduce, slice_axis


@lowers_op("Min", "Amin")
def reduce_min(b: Builder, op: Any, x: Node, **_: Any) -> Node:
    if getattr(op, "initial", None) is not None:
        raise NotLowered("a minimum with an initial value")
    return reduce(b, op, x, "reduce_min")


@lowers_op("Ptp")
def span(b: Builder, op: Any, x: Node) -> Node:
    """The largest less the smallest."""
    return b.emit("sub", *(reduce(b, op, x, kind, kind) for kind in ("reduce_max", "reduce_min")))


@lowers_op("Var")
def variance(b: Builder, op: Any, x: Node) -> Node:
    """The mean of the squares of what is left without the mean."""
    axes = _axes(op, x)
    centered = b.emit("sub", x, b.emit("mean", x, axes=axes, keepdims=True, suffix="mean"), suffix="centered")
    square = b.emit("mul", centered, centered, suffix="square")
    return b.emit("mean", square, axes=axes, keepdims=bool(op.keepdims))


@lowers_op("Std")
def deviation(b: Builder, op: Any, x: Node) -> Node:
    return function(b, variance(b, op, x), lambda t: t.maximum(0.0).sqrt(), "root")


def _axes(op: Any, x: Node) -> tuple[int, ...]:
    """The axes of a reduction, positive and in order."""
    given = op.axis if isinstance(op.axis, list | tuple) else [op.axis]
    if None in given or 0 in [a % len(x.shape) for a in given]:
        raise NotLowered("it reduces over the batch")
    return tuple(sorted(int(a) % len(x.shape) for a in given))


@lowers_op("Prod")
def product(b: Builder, op: Any, x: Node) -> Node:
    """Halves of an axis multiplied with each other until one entry is left: each product has a range of its own."""
    axes = _axes(op, x)
    for axis in axes:
        while (size := int(x.shape[axis] or 1)) > 1:
            half = size // 2
            parts = [slice_axis(b, x, axis, k * half, (k + 1) * half) for k in (0, 1)]
            folded = b.emit("mul", *parts, suffix=f"halves_{size}")
            x = folded if size % 2 == 0 else _with_last(b, folded, x, axis)
    shape = x.shape if op.keepdims else tuple(d for k, d in enumerate(x.shape) if k not in axes)
    return reshape(b, x, shape)


def _with_last(b: Builder, folded: Node, x: Node, axis: int) -> Node:
    """The last entry, which has no partner, is multiplied with the first product."""
    size = int(x.shape[axis] or 1)
    last = slice_axis(b, x, axis, size - 1, size)
    count = int(folded.shape[axis] or 1)
    first = folded if count == 1 else slice_axis(b, folded, axis, 0, 1)
    joined = b.emit("mul", first, last, suffix=f"odd_{size}")
    return joined if count == 1 else b.emit("concat", joined, slice_axis(b, folded, axis, 1, count), axis=axis)


@lowers_op("LogSoftmax")
def log_softmax(b: Builder, op: Any, x: Node) -> Node:
    """x less its maximum, less the logarithm of the sum of the exponentials."""
    axis = int(op.axis) % len(x.shape)
    below, log_sum = _log_sum(b, x, (axis,))
    return b.emit("sub", below, log_sum)


@lowers_op("Logsumexp")
def log_sum_exp(b: Builder, op: Any, x: Node) -> Node:
    axes = _axes(op, x)
    _, log_sum = _log_sum(b, x, axes)
    y = b.emit("add", _largest(b, x, axes), log_sum)
    shape = y.shape if op.keepdims else tuple(d for k, d in enumerate(y.shape) if k not in axes)
    return reshape(b, y, shape)


def _largest(b: Builder, x: Node, axes: tuple[int, ...]) -> Node:
    return b.emit("reduce_max", x, axes=axes, keepdims=True, suffix="largest")


def _log_sum(b: Builder, x: Node, axes: tuple[int, ...]) -> tuple[Node, Node]:
    """x less its maximum, and the logarithm of the sum of the exponentials of that."""
    if 0 in axes:
        raise NotLowered("it reduces over the batch")
    below = b.emit("sub", x, _largest(b, x, axes), suffix="below")
    exps = function(b, below, lambda t: t.exp(), "exp")
    mean = b.emit("mean", exps, axes=axes, keepdims=True, suffix="mean")
    count = float(math.prod(int(x.shape[a] or 1) for a in axes))
    return below, function(b, mean, lambda t: (t * count).log(), "log")


@lowers_op("Argmax", "Argmin")
def place_of_extreme(b: Builder, op: Any, x: Node) -> Node:
    if op.axis is None or op.axis % len(x.shape) == 0:
        raise NotLowered("the place in the whole batch")
    axis = op.axis % len(x.shape)
    y = b.emit(type(op).__name__.lower(), x, axis=axis, dtype="int32")
    return reshape(b, y, (*x.shape[:axis], 1, *x.shape[axis + 1 :])) if op.keepdims else y


@lowers_op("TopK")
def top_k(b: Builder, op: Any, x: Node) -> list[Node]:
    if len(x.shape) < 2:
        raise NotLowered("the largest of the batch")
    k = int(op.k)
    return [b.emit("top_k", x, k=k, suffix="values"), b.emit("top_k_indices", x, k=k, suffix="places", dtype="int32")]


@lowers_op("Glu")
def gated_linear_unit(b: Builder, op: Any, x: Node) -> Node:
    """The first half times the sigmoid of the second."""
    axis = op.axis % len(x.shape)
    half = int(x.shape[axis] or 0) // 2
    value, gate = (slice_axis(b, x, axis, k * half, (k + 1) * half, name) for k, name in enumerate(("value", "gate")))
    return b.emit("mul", value, b.emit("logistic", gate, suffix="logistic"))
