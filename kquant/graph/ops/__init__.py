"""The vocabulary of primitive operations, with their float semantics.

| op | attrs | weights |
| --- | --- | --- |
| input | | |
| const | | value (no batch dimension; broadcasts against the other operand) |
| conv2d | strides, padding, dilation, groups | kernel [h, w, cin / groups, cout], bias [cout] |
| depthwise_conv2d | strides, padding, dilation | kernel [h, w, c, m], bias [c * m] |
| conv2d_transpose | strides, padding | kernel [h, w, cout, cin], bias [cout] |
| dense | | kernel [cin, cout], bias [cout]; contracts the last axis, any rank |
| embedding | | table [rows, depth]; reads int32 ids |
| affine | | scale [c], offset [c]: x * scale + offset on the last axis (batch norm at inference) |
| add, sub, mul, maximum, minimum | | two inputs, numpy broadcasting |
| clip | lo, hi (float or None) | ReLU is (0, None), ReLU6 is (0, 6) |
| leaky_relu | alpha | |
| prelu | | alpha (without batch, broadcasts) |
| logistic, tanh, elu, hard_swish | | softmax works on the last axis |
| softmax | | |
| gelu | approximate | |
| concat | axis (positive) | |
| max_pool2d, avg_pool2d | pool_size, strides, padding | |
| mean, reduce_max | axes (positive, never the batch), keepdims | |
| reshape | (the node's shape) | |
| transpose | perm (perm[0] == 0) | |
| slice | begin, end, strides (full rank, the batch entry is 0, None, 1) | |
| pad | paddings (full rank), mode constant / reflect / symmetric, value | |
| resize | size (h, w), method nearest / bilinear, half_pixel_centers | |
| requantize | | identity; a change of quantization parameters |
| float | | the user's own operation, kept in float |

padding is "same" or "valid". conv2d_transpose produces the node's own shape (output padding).
Linear operations, add, sub and mul may carry the attribute `clip` = (lo, hi): an activation fused behind them.
hi, there and in "clip", may be a list with a cap for every entry of the last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Graph, Node

Tensor = Any
LINEAR = frozenset({"conv2d", "depthwise_conv2d", "conv2d_transpose", "dense", "affine"})
FUSES_CLIP = LINEAR | {"add", "sub", "mul"}
BINARY = frozenset({"add", "sub", "mul", "maximum", "minimum"})
UNARY = frozenset({"clip", "leaky_relu", "prelu", "logistic", "tanh", "softmax", "gelu", "elu", "hard_swish"})


def _pad(node: Node) -> str:
    return node.attrs["padding"].upper()


def _conv2d(n: Node, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    a = n.attrs
    y = tf.nn.convolution(x, w["kernel"], strides=a["strides"], padding=_pad(n), dilations=a["dilation"])
    return y + w["bias"]


def _depthwise(n: Node, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    sh, sw = n.attrs["strides"]
    if sh == sw:
        y = tf.nn.depthwise_conv2d(x, w["kernel"], (1, sh, sw, 1), _pad(n), dilations=n.attrs["dilation"])
    else:  # the kernel takes equal strides only: a grouped convolution computes the same
        h, k, c, m = w["kernel"].shape
        kernel = tf.reshape(w["kernel"], (h, k, 1, c * m))
        y = tf.nn.convolution(x, kernel, strides=(sh, sw), padding=_pad(n), dilations=n.attrs["dilation"])
    return y + w["bias"]


def _transpose_conv(n: Node, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    shape = tf.concat([tf.shape(x)[:1], tf.constant(n.shape[1:], tf.int32)], 0)
    return tf.nn.conv2d_transpose(x, w["kernel"], shape, n.attrs["strides"], _pad(n)) + w["bias"]


def _slice(n: Node, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    a = n.attrs
    return x[tuple(slice(b, e, s) for b, e, s in zip(a["begin"], a["end"], a["strides"], strict=True))]


def _clip(lo: float | None, hi: float | list[float] | None, x: Tensor) -> Tensor:
    x = x if lo is None else tf.maximum(x, tf.cast(lo, x.dtype))
    return x if hi is None else tf.minimum(x, tf.cast(hi, x.dtype))


def _float_pad(n: Node, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    return tf.pad(x, n.attrs["paddings"], n.attrs["mode"].upper(), n.attrs.get("value", 0.0))


def _resize(n: Node, x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    name = "ResizeBilinear" if n.attrs["method"] == "bilinear" else "ResizeNearestNeighbor"
    return getattr(tf.raw_ops, name)(images=x, size=n.attrs["size"], half_pixel_centers=n.attrs["half_pixel_centers"])


# op -> f(node, x, weights) for operations with one input
ONE_INPUT: dict[str, Callable[[Node, Tensor, Mapping[str, Tensor]], Tensor]] = {
    "conv2d": _conv2d,
    "depthwise_conv2d": _depthwise,
    "conv2d_transpose": _transpose_conv,
    "dense": lambda n, x, w: tf.tensordot(x, w["kernel"], 1) + w["bias"],
    "embedding": lambda n, x, w: tf.gather(w["table"], tf.cast(x, tf.int32)),
    "affine": lambda n, x, w: x * w["scale"] + w["offset"],
    "clip": lambda n, x, w: _clip(n.attrs["lo"], n.attrs["hi"], x),
    "leaky_relu": lambda n, x, w: tf.nn.leaky_relu(x, n.attrs["alpha"]),
    "prelu": lambda n, x, w: tf.where(x >= 0, x, x * w["alpha"]),
    "logistic": lambda n, x, w: tf.sigmoid(x),
    "tanh": lambda n, x, w: tf.tanh(x),
    "softmax": lambda n, x, w: tf.nn.softmax(x, axis=-1),
    "gelu": lambda n, x, w: tf.nn.gelu(x, n.attrs["approximate"]),
    "elu": lambda n, x, w: tf.nn.elu(x),
    "hard_swish": lambda n, x, w: x * tf.nn.relu6(x + 3.0) / 6.0,
    "max_pool2d": lambda n, x, w: tf.nn.max_pool2d(x, n.attrs["pool_size"], n.attrs["strides"], _pad(n)),
    "avg_pool2d": lambda n, x, w: tf.nn.avg_pool2d(x, n.attrs["pool_size"], n.attrs["strides"], _pad(n)),
    "mean": lambda n, x, w: tf.reduce_mean(x, n.attrs["axes"], n.attrs["keepdims"]),
    "reduce_max": lambda n, x, w: tf.reduce_max(x, n.attrs["axes"], n.attrs["keepdims"]),
    "reshape": lambda n, x, w: tf.reshape(x, (-1, *n.shape[1:])),
    "transpose": lambda n, x, w: tf.transpose(x, n.attrs["perm"]),
    "slice": _slice,
    "pad": _float_pad,
    "resize": _resize,
    "requantize": lambda n, x, w: tf.identity(x),
}
TWO_INPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": tf.add,
    "sub": tf.subtract,
    "mul": tf.multiply,
    "maximum": tf.maximum,
    "minimum": tf.minimum,
}
OPS = frozenset({"input", "const", "concat", "float", *ONE_INPUT, *TWO_INPUTS})


def compute(node: Node, inputs: Sequence[Tensor], weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """The node's float function.

    Args:
        node: any node but an input.
        inputs: one tensor per entry of `node.inputs`.
        weights: tensors to use in place of the node's own weights.
    """
    w = node.weights if weights is None else weights
    if node.op == "const":
        return tf.constant(w["value"])
    if node.op == "concat":
        y = tf.concat(inputs, node.attrs["axis"])
    elif node.op == "float":
        y = node.call(inputs)
    elif node.op in TWO_INPUTS:
        y = TWO_INPUTS[node.op](*inputs)
    else:
        y = ONE_INPUT[node.op](node, inputs[0], w)
    lo, hi = node.attrs.get("clip", (None, None))
    return _clip(lo, hi, y)


def evaluate(graph: Graph, feeds: Sequence[Tensor], fetch: Sequence[str] | None = None) -> list[Tensor]:
    """Run the float graph.

    Args:
        graph: what to run.
        feeds: one tensor per graph input, in order.
        fetch: names of the nodes wanted; the graph's outputs by default.

    Returns:
        The tensors, in the order of `fetch`.
    """
    wanted = list(graph.outputs if fetch is None else fetch)
    values: dict[str, Tensor] = dict(zip(graph.inputs, feeds, strict=True))
    last_use = {source: node.name for node in graph for source in node.inputs}
    keep = set(wanted)
    for node in graph:
        if node.op != "input":
            values[node.name] = compute(node, [values[i] for i in node.inputs])
        for source in set(node.inputs):
            if last_use[source] == node.name and source not in keep:
                del values[source]
    return [values[name] for name in wanted]


# op -> (weight that carries the grid, axis of its output channels in `weight_view`)
QUANTIZED_WEIGHT = {
    "conv2d": ("kernel", 3),
    "depthwise_conv2d": ("kernel", 2),
    "conv2d_transpose": ("kernel", 2),
    "dense": ("kernel", 1),
    "affine": ("scale", 0),
    "prelu": ("alpha", None),
    "embedding": ("table", None),
}
BIAS = {op: "offset" if op == "affine" else "bias" for op in LINEAR}  # the weight that is added to the accumulator


def weight_view(node: Node, weight: Any = None) -> Any:
    """The weight that `QuantizedGraph.weights` describes, with its output channels on one axis.

    A depthwise kernel [h, w, c, m] is viewed as [h, w, c * m], since each of the c * m outputs has
    its own scale; everything else is viewed as it is. `Grid.axis` refers to this view.
    """
    w = node.weights[QUANTIZED_WEIGHT[node.op][0]] if weight is None else weight
    if node.op != "depthwise_conv2d":
        return w
    reshape = np.reshape if isinstance(w, np.ndarray) else tf.reshape
    return reshape(w, (*w.shape[:2], -1))
