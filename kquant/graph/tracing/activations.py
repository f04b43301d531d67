"""Lowering of activation functions: as layers, as `activation=` arguments and as operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from kquant.graph.ir import Node
from kquant.graph.ops.functions import Term
from kquant.graph.tracing.builder import (
    Builder,
    NotLowered,
    as_array,
    axis_last,
    lowers_layer,
    lowers_op,
    scale_offset,
    transpose,
)
from kquant.graph.tracing.functions import function, softplus

L = keras.layers


def clip(b: Builder, x: Node, lo: float | None = None, hi: float | None = None) -> Node:
    """min(max(x, lo), hi)."""
    return b.emit("clip", x, lo=None if lo is None else float(lo), hi=None if hi is None else float(hi))


def relu(b: Builder, x: Node, slope: float = 0.0, hi: float | None = None, threshold: float = 0.0) -> Node:
    """keras.activations.relu: slope * (x - threshold) below the threshold, x above, at most hi."""
    if threshold:
        return function(b, x, lambda t: _above_threshold(t, slope, hi, threshold))
    if slope:
        x = leaky_relu(b, x, slope)
        return x if hi is None else clip(b, x, None, hi)
    return clip(b, x, 0.0, hi)


def _above_threshold(x: Term, slope: float, hi: float | None, threshold: float) -> Term:
    y = x.call("select", x.greater_equal(threshold), x, slope * (x - threshold))
    return y if hi is None else y.minimum(hi)


def leaky_relu(b: Builder, x: Node, slope: float) -> Node:
    return b.emit("leaky_relu", x, alpha=float(slope))


def elu(b: Builder, x: Node, alpha: float) -> Node:
    if alpha != 1.0:
        return function(b, x, lambda t: t.maximum(0.0) + alpha * t.minimum(0.0).elu())
    return b.emit("elu", x)


def hard_sigmoid(b: Builder, x: Node) -> Node:
    """relu6(x + 3) / 6."""
    shifted = scale_offset(b, x, 1.0, 3.0, suffix="shift")
    clipped = b.emit("clip", shifted, lo=0.0, hi=6.0, suffix="clip")
    return scale_offset(b, clipped, 1.0 / 6.0, 0.0)


def silu(b: Builder, x: Node) -> Node:
    """x * sigmoid(x)."""
    return b.emit("mul", x, b.emit("logistic", x, suffix="logistic"))


def softmax(b: Builder, x: Node, axis: Any = -1) -> Node:
    if not isinstance(axis, int):
        if len(axis) != 1:
            raise NotLowered(f"a softmax over the axes {axis}")
        axis = axis[0]
    there, back = axis_last(len(x.shape), axis)
    return transpose(b, b.emit("softmax", transpose(b, x, there)), back, "transpose_back")


# Activation functions without settings, by the name of the function in keras.activations
FUNCTIONS: dict[str, Callable[[Builder, Node], Node]] = {
    "linear": lambda b, x: x,
    "relu": relu,
    "relu6": lambda b, x: clip(b, x, 0.0, 6.0),
    "leaky_relu": lambda b, x: leaky_relu(b, x, 0.2),
    "sigmoid": lambda b, x: b.emit("logistic", x),
    "tanh": lambda b, x: b.emit("tanh", x),
    "hard_tanh": lambda b, x: clip(b, x, -1.0, 1.0),
    "hard_sigmoid": hard_sigmoid,
    "hard_silu": lambda b, x: b.emit("hard_swish", x),
    "silu": silu,
    "gelu": lambda b, x: b.emit("gelu", x, approximate=False),
    "elu": lambda b, x: elu(b, x, 1.0),
    "softmax": softmax,
    "mish": lambda b, x: function(b, x, lambda t: t * softplus(t).tanh()),
}


def activate(b: Builder, function: Any, x: Node) -> Node:
    """Apply an `activation=` argument; a function that is not known is traced."""
    if function is None:
        return x
    name = getattr(function, "__name__", "")
    if name in FUNCTIONS and getattr(keras.activations, name, None) is function:
        return FUNCTIONS[name](b, x)
    if isinstance(function, L.Layer):
        return b.trace_function(b, function, [x])[0]
    return b.trace_function(b, L.Activation(function, name=name.strip("<>") or None), [x])[0]


@lowers_layer(L.Activation)
def activation_layer(b: Builder, layer: Any, x: Node) -> Node:
    name = getattr(layer.activation, "__name__", "")
    if name in FUNCTIONS and getattr(keras.activations, name, None) is layer.activation:
        return FUNCTIONS[name](b, x)
    return b.trace_function(b, layer.activation, [x])[0]


@lowers_layer(L.ReLU)
def relu_layer(b: Builder, layer: Any, x: Node) -> Node:
    return relu(b, x, float(layer.negative_slope), layer.max_value, float(layer.threshold))


@lowers_layer(L.LeakyReLU)
def leaky_relu_layer(b: Builder, layer: Any, x: Node) -> Node:
    return leaky_relu(b, x, layer.negative_slope)


@lowers_layer(L.ELU)
def elu_layer(b: Builder, layer: Any, x: Node) -> Node:
    return elu(b, x, float(layer.alpha))


@lowers_layer(L.PReLU)
def prelu(b: Builder, layer: Any, x: Node) -> Node:
    return b.emit("prelu", x, weights={"alpha": as_array(layer.alpha)}, variables={"alpha": layer.alpha})


def _without_settings(function: Callable[[Builder, Node], Node]) -> Callable[[Builder, Any, Node], Node]:
    return lambda b, op, x: function(b, x)


def _register_operations() -> None:
    """keras.ops and keras.activations operations, by class name."""
    table: dict[str, Callable[[Builder, Any, Node], Node]] = {
        "Relu": lambda b, op, x: relu(b, x),
        "ReLU": lambda b, op, x: relu(b, x, op.negative_slope, op.max_value, op.threshold),
        "LeakyRelu": lambda b, op, x: leaky_relu(b, x, op.negative_slope),
        "Elu": lambda b, op, x: elu(b, x, op.alpha),
        "Gelu": lambda b, op, x: b.emit("gelu", x, approximate=bool(op.approximate)),
        "Softmax": lambda b, op, x: softmax(b, x, op.axis),
        "Clip": lambda b, op, x: clip(b, x, *_bounds(op.x_min, op.x_max)),
    }
    for name in ("Relu6", "Sigmoid", "Tanh", "HardTanh", "HardSigmoid", "HardSilu", "Silu"):
        key = {"HardTanh": "hard_tanh", "HardSigmoid": "hard_sigmoid", "HardSilu": "hard_silu"}.get(name, name.lower())
        table[name] = _without_settings(FUNCTIONS[key])
    for name, lower in table.items():
        lowers_op(name)(lower)


def _bounds(lo: Any, hi: Any) -> list[float | None]:
    if any(isinstance(v, Node) or (v is not None and np.size(v) != 1) for v in (lo, hi)):
        raise NotLowered("clip bounds that are not numbers")
    return [None if v is None else float(as_array(v).reshape(())) for v in (lo, hi)]


_register_operations()
