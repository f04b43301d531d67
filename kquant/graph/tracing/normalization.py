"""Lowering of normalizations over axes of a sample: layer, group, root mean square, and unit length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from kquant.graph.ir import Node
from kquant.graph.tracing.builder import (
    Builder,
    NotLowered,
    as_array,
    known_layers,
    lowers_layer,
    lowers_op,
    reshape,
    scale_offset,
    transpose,
)

L = keras.layers


def normalize(
    b: Builder,
    x: Node,
    axes: Sequence[int],
    *,
    center: bool,
    epsilon: float,
    squares: bool = False,
    gamma: Any = 1.0,
    beta: Any = 0.0,
) -> Node:
    """gamma * d / sqrt(mean(d^2) + epsilon) + beta over some axes, d = x - mean(x) or x.

    Args:
        b: the builder.
        x: the tensor.
        axes: over which to take means; never the batch.
        center: whether to subtract the mean.
        epsilon: see `squares`.
        squares: take max(sum(d^2), epsilon) in place of mean(d^2) + epsilon.
        gamma, beta: constants that broadcast against the axes, in ascending order.

    Raises:
        NotLowered: it normalizes over the batch.
    """
    rank = len(x.shape)
    last = sorted(a % rank for a in axes)
    if not last or last[0] == 0:
        raise NotLowered("it normalizes over the batch")
    order = (*(a for a in range(rank) if a not in last), *last)
    sizes = [int(x.shape[a] or 0) for a in last]
    count = int(np.prod(sizes))
    moved = transpose(b, x, order, "axes_last")
    flat = reshape(b, moved, (*(x.shape[a] for a in order[: -len(last)]), count), "flat")
    factor = 1.0 if squares else np.sqrt(count)
    weights = {k: np.broadcast_to(as_array(v), sizes).reshape(-1) for k, v in (("gamma", gamma), ("beta", beta))}
    y = b.emit(
        "normalize",
        flat,
        shape=flat.shape,
        weights={"scale": np.ones(count), "gamma": weights["gamma"] * factor, "beta": weights["beta"]},
        center=center,
        epsilon=float(epsilon) * (1 if squares else count),
        limit=squares,
    )
    y = reshape(b, y, moved.shape, "split")
    return transpose(b, y, [int(i) for i in np.argsort(order)], "axes_back")


@lowers_layer(L.LayerNormalization)
def layer_normalization(b: Builder, layer: Any, inputs: Node) -> Node:
    return _layer_norm(b, inputs, layer.gamma, layer.beta, layer.axis, layer.epsilon, bool(layer.rms_scaling))


@lowers_op("LayerNorm")
def layer_norm_op(b: Builder, op: Any, x: Node, gamma: Any = None, beta: Any = None) -> Node:
    return _layer_norm(b, x, gamma, beta, op.axis, op.epsilon, bool(op.rms_scaling))


def _layer_norm(b: Builder, x: Node, gamma: Any, beta: Any, axis: Any, epsilon: float | None, scaling: bool) -> Node:
    if scaling:
        raise NotLowered(
            "it divides what is not centered by a standard deviation; RMSNormalization has an integer form"
        )
    axes = _axes(axis)
    sizes = [int(x.shape[a] or 0) for a in sorted(a % len(x.shape) for a in axes)]

    def weight(value: Any, absent: float) -> Any:
        return absent if value is None else _constant(value).reshape(sizes)

    return normalize(
        b, x, axes, center=True, epsilon=_epsilon(epsilon), gamma=weight(gamma, 1.0), beta=weight(beta, 0.0)
    )


@lowers_layer(*known_layers("RMSNormalization"))
def rms_normalization(b: Builder, layer: Any, x: Node) -> Node:
    return _rms_norm(b, x, layer.scale, layer.axis, layer.epsilon)


@lowers_op("RMSNorm")
def rms_norm_op(b: Builder, op: Any, x: Node, scale: Any = None) -> Node:
    return _rms_norm(b, x, scale, op.axis, op.epsilon)


def _rms_norm(b: Builder, x: Node, scale: Any, axis: Any, epsilon: float | None) -> Node:
    """The scale broadcasts against the last axes, whatever the axes of the mean are."""
    rank, axes, scale = len(x.shape), _axes(axis), 1.0 if scale is None else _constant(scale)
    last = sorted(a % rank for a in axes) == list(range(rank - len(axes), rank))
    gamma = scale if last and np.ndim(scale) <= len(axes) else 1.0
    y = normalize(b, x, axes, center=False, epsilon=_epsilon(epsilon), gamma=gamma)
    return y if gamma is scale else scale_offset(b, y, scale, 0.0, "scale")


@lowers_layer(L.GroupNormalization)
def group_normalization(b: Builder, layer: Any, inputs: Node) -> Node:
    """Over all places and the channels of a group; gamma and beta belong to channels."""
    rank = len(inputs.shape)
    axis = layer.axis % rank
    order = (*(a for a in range(rank) if a != axis), axis)
    x = transpose(b, inputs, order, "channels_last")
    channels = int(x.shape[-1] or 0)
    groups = channels if layer.groups == -1 else int(layer.groups)
    places = int(np.prod([d or 1 for d in x.shape[1:-1]]))
    y = reshape(b, x, (None, places, groups, channels // groups), "groups")
    y = normalize(b, y, (1, 3), center=True, epsilon=layer.epsilon)
    y = reshape(b, y, x.shape, "merged")
    gamma = as_array(layer.gamma) if layer.scale else 1.0
    beta = as_array(layer.beta) if layer.center else 0.0
    y = scale_offset(b, y, gamma, beta, "scale")
    return transpose(b, y, [int(i) for i in np.argsort(order)], "channels_back")


@lowers_layer(L.UnitNormalization)
def unit_normalization(b: Builder, layer: Any, inputs: Node) -> Node:
    return _unit(b, inputs, layer.axis, 1e-12)


@lowers_op("Normalize")
def normalize_op(b: Builder, op: Any, x: Node) -> Node:
    if op.order != 2:
        raise NotLowered(f"a norm of order {op.order}")
    return _unit(b, x, op.axis, _epsilon(op.epsilon))


def _unit(b: Builder, x: Node, axis: Any, epsilon: float) -> Node:
    """x * min(1 / |x|, 1 / epsilon)."""
    return normalize(b, x, _axes(axis), center=False, epsilon=epsilon**2, squares=True)


@lowers_op("Moments")
def moments_op(b: Builder, op: Any, x: Node) -> list[Node]:
    return list(_moments(b, x, _axes(op.axes), bool(op.keepdims)))


def _moments(b: Builder, x: Node, axes: Sequence[int], keepdims: bool) -> tuple[Node, Node]:
    """The mean, and the mean of the squared deviations."""
    positive = tuple(sorted(a % len(x.shape) for a in axes))
    if 0 in positive:
        raise NotLowered("it reduces over the batch")
    mean = b.emit("mean", x, axes=positive, keepdims=True, suffix="mean")
    d = b.emit("sub", x, mean, suffix="deviation")
    y = b.emit("mean", b.emit("mul", d, d, suffix="squares"), axes=positive, keepdims=True)
    if keepdims:
        return mean, y
    shape = tuple(d for a, d in enumerate(x.shape) if a not in positive)
    return reshape(b, mean, shape, "mean_squeezed"), reshape(b, y, shape, "squeezed")


def _axes(axis: Any) -> list[int]:
    if axis is None:
        raise NotLowered("it normalizes over the batch")
    return [int(a) for a in (axis if isinstance(axis, (list, tuple)) else [axis])]


def _epsilon(epsilon: float | None) -> float:
    return float(keras.backend.epsilon() if epsilon is None else epsilon)


def _constant(value: Any) -> np.ndarray:
    if isinstance(value, Node):
        raise NotLowered("it scales by a computed tensor")
    return as_array(value)
