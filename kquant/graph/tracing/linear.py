"""Lowering of layers and operations with weights: convolutions, dense, einsum, embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from kquant.graph.ir import Node, Shape
from kquant.graph.tracing.activations import activate
from kquant.graph.tracing.builder import (
    Builder,
    NotLowered,
    as_array,
    lowers_layer,
    lowers_op,
    pad,
    reshape,
    transpose,
    without_batch,
)

L = keras.layers


def pair(value: int | Sequence[int], rank: int = 2) -> tuple[int, int]:
    """(height, width) of a setting; a one-dimensional operation gets height 1."""
    values = (value,) * rank if isinstance(value, int) else tuple(int(v) for v in value)
    if rank == 1:
        return (1, int(values[0]))
    return (int(values[0]), int(values[-1]))


def to_2d(b: Builder, x: Node) -> Node:
    """[B, L, C] as an image [B, 1, L, C]; an image stays."""
    return reshape(b, x, (None, 1, *x.shape[1:]), "expand") if len(x.shape) == 3 else x


def from_2d(b: Builder, x: Node, rank: int) -> Node:
    """Undo `to_2d` for a tensor of the original rank (batch and channels included)."""
    return reshape(b, x, (None, *x.shape[2:]), "squeeze") if rank == 3 else x


def causal(b: Builder, x: Node, padding: str, kernel: int, dilation: int) -> tuple[Node, str]:
    """Causal padding on the width of an image as a pad in front of a valid convolution."""
    if padding != "causal":
        return x, padding
    return pad(b, x, ((0, 0), (0, 0), ((kernel - 1) * dilation, 0), (0, 0)), suffix="pad"), "valid"


def bias_of(layer: Any, channels: int) -> np.ndarray:
    """The layer's bias, zeros where it has none."""
    return as_array(layer.bias) if layer.use_bias else np.zeros(channels, np.float32)


def _conv(b: Builder, x: Node, kernel: np.ndarray, bias: np.ndarray, strides: Any, padding: str, dilation: Any) -> Node:
    """Convolution of a sequence or an image with a Keras kernel [(h,) w, cin / groups, cout], as an image."""
    rank = kernel.ndim - 2
    if rank > 2:
        raise NotLowered("three-dimensional convolutions have no integer kernel")
    if rank == 1:
        kernel = kernel[None]
    dilation = pair(dilation, rank)
    x, padding = causal(b, to_2d(b, x), padding, kernel.shape[1], dilation[1])
    return b.emit(
        "conv2d",
        x,
        weights={"kernel": kernel, "bias": bias},
        strides=pair(strides, rank),
        padding=padding,
        dilation=dilation,
        groups=x.shape[-1] // kernel.shape[2],
    )


def _depthwise(
    b: Builder,
    x: Node,
    kernel: np.ndarray,
    bias: np.ndarray,
    strides: Any,
    padding: str,
    dilation: Any,
    suffix: str = "",
) -> Node:
    """Depthwise convolution with a Keras kernel [(h,) w, c, multiplier], as an image."""
    rank = kernel.ndim - 2
    if rank == 1:
        kernel = kernel[None]
    dilation = pair(dilation, rank)
    x, padding = causal(b, to_2d(b, x), padding, kernel.shape[1], dilation[1])
    return b.emit(
        "depthwise_conv2d",
        x,
        suffix=suffix,
        weights={"kernel": kernel, "bias": bias},
        strides=pair(strides, rank),
        padding=padding,
        dilation=dilation,
    )


@lowers_layer(L.Conv1D, L.Conv2D, L.Conv3D)
def conv(b: Builder, layer: Any, x: Node) -> Node:
    y = _conv(
        b,
        x,
        as_array(layer.kernel),
        bias_of(layer, layer.filters),
        layer.strides,
        layer.padding,
        layer.dilation_rate,
    )
    return from_2d(b, activate(b, layer.activation, y), len(x.shape))


@lowers_layer(L.DepthwiseConv1D, L.DepthwiseConv2D)
def depthwise_conv(b: Builder, layer: Any, x: Node) -> Node:
    kernel = as_array(layer.kernel)
    bias = bias_of(layer, kernel.shape[-2] * kernel.shape[-1])
    y = _depthwise(b, x, kernel, bias, layer.strides, layer.padding, layer.dilation_rate)
    return from_2d(b, activate(b, layer.activation, y), len(x.shape))


def _separable(
    b: Builder, x: Node, kernels: tuple[np.ndarray, np.ndarray], bias: np.ndarray, strides: Any, pad: str, dil: Any
) -> Node:
    depthwise, pointwise = kernels
    zeros = np.zeros(depthwise.shape[-2] * depthwise.shape[-1], np.float32)
    y = _depthwise(b, x, depthwise, zeros, strides, pad, dil, suffix="depthwise")
    return _conv(b, y, pointwise.reshape(1, 1, *pointwise.shape[-2:]), bias, 1, "valid", 1)


@lowers_layer(L.SeparableConv1D, L.SeparableConv2D)
def separable_conv(b: Builder, layer: Any, x: Node) -> Node:
    kernels = as_array(layer.depthwise_kernel), as_array(layer.pointwise_kernel)
    y = _separable(b, x, kernels, bias_of(layer, layer.filters), layer.strides, layer.padding, layer.dilation_rate)
    return from_2d(b, activate(b, layer.activation, y), len(x.shape))


def _transposed(
    b: Builder, x: Node, kernel: np.ndarray, bias: np.ndarray, strides: Any, padding: str, dilation: Any
) -> Node:
    """Transposed convolution with a Keras kernel [(h,) w, cout, cin], as an image.

    A dilated kernel is written out with its zeros. The output size is the one that Keras declares,
    which is where its output padding shows.
    """
    rank = kernel.ndim - 2
    shape = without_batch(b.scope.shapes[0])
    if rank > 2:
        raise NotLowered("three-dimensional convolutions have no integer kernel")
    if rank == 1:
        kernel, shape = kernel[None], (None, 1, *shape[1:])
    strides = pair(strides, rank)
    kernel = dilate(kernel, pair(dilation, rank))
    x = to_2d(b, x)
    for axis in (1, 2):
        size, out, k, s = x.shape[axis], int(shape[axis] or 0), kernel.shape[axis - 1], strides[axis - 1]
        # the forward convolution of an `out` long line must have `size` positions, or the kernel does not exist
        if (-(-out // s) if padding == "same" else -(-(out - k + 1) // s)) != size:
            raise NotLowered(f"an output of {out} from {size} with kernel {k}, stride {s}, padding {padding!r}")
    return b.emit(
        "conv2d_transpose",
        x,
        shape=shape,
        weights={"kernel": kernel, "bias": bias},
        strides=strides,
        padding=padding,
    )


def dilate(kernel: np.ndarray, dilation: tuple[int, int]) -> np.ndarray:
    """A kernel [h, w, ...] with dilation - 1 zeros between its taps."""
    (h, w), (dh, dw) = kernel.shape[:2], dilation
    if (dh, dw) == (1, 1):
        return kernel
    spread = np.zeros(((h - 1) * dh + 1, (w - 1) * dw + 1, *kernel.shape[2:]), np.float32)
    spread[::dh, ::dw] = kernel
    return spread


@lowers_layer(L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose)
def conv_transpose(b: Builder, layer: Any, x: Node) -> Node:
    bias = bias_of(layer, layer.filters)
    y = _transposed(b, x, as_array(layer.kernel), bias, layer.strides, layer.padding, layer.dilation_rate)
    return from_2d(b, activate(b, layer.activation, y), len(x.shape))


@lowers_op("Conv", "DepthwiseConv")
def conv_op(b: Builder, op: Any, inputs: Node, kernel: Any) -> Node:
    """keras.ops.conv and relatives with a constant kernel."""
    if isinstance(kernel, Node):
        raise NotLowered("its kernel is not a constant")
    array = as_array(kernel)
    emit = _depthwise if type(op).__name__ == "DepthwiseConv" else _conv
    channels = array.shape[-2] * array.shape[-1] if emit is _depthwise else array.shape[-1]
    y = emit(b, inputs, array, np.zeros(channels, np.float32), op.strides, op.padding, op.dilation_rate)
    return from_2d(b, y, len(inputs.shape))


@lowers_op("SeparableConv")
def separable_conv_op(b: Builder, op: Any, inputs: Node, depthwise_kernel: Any, pointwise_kernel: Any) -> Node:
    if isinstance(depthwise_kernel, Node) or isinstance(pointwise_kernel, Node):
        raise NotLowered("its kernels are not constants")
    kernels = as_array(depthwise_kernel), as_array(pointwise_kernel)
    bias = np.zeros(kernels[1].shape[-1], np.float32)
    y = _separable(b, inputs, kernels, bias, op.strides, op.padding, op.dilation_rate)
    return from_2d(b, y, len(inputs.shape))


@lowers_layer(L.Dense)
def dense(b: Builder, layer: Any, x: Node) -> Node:
    y = b.emit("dense", x, weights={"kernel": as_array(layer.kernel), "bias": bias_of(layer, layer.units)})
    return activate(b, layer.activation, y)


@lowers_layer(L.EinsumDense)
def einsum_dense(b: Builder, layer: Any, x: Node) -> Node:
    bias = as_array(layer.bias) if layer.bias is not None else None
    y = contract(b, layer.equation, x, as_array(layer.kernel), bias)
    return activate(b, layer.activation, y)


def contract(b: Builder, equation: str, x: Node, w: np.ndarray, bias: np.ndarray | None = None) -> Node:
    """einsum(equation, x, w) + bias with a constant second operand, as a dense operation.

    Every label is either free in x, free in w, or summed over in both; x is permuted and reshaped to
    [batch, free, summed], w to [summed, free], and the product back to the order of the output.

    Args:
        b: the builder.
        equation: "<x>,<w>-><output>", an ellipsis allowed in x and output.
        x: the tensor.
        w: the constant.
        bias: constant that broadcasts against the output.

    Raises:
        NotLowered: a label is shared by x, w and the output, or the equation has another form.
    """
    xs, ws, out = _labels(equation, len(x.shape))
    summed = [c for c in xs if c in ws and c not in out]
    free_x, free_w = [c for c in xs if c not in summed], [c for c in ws if c not in summed]
    if set(xs) & set(ws) & set(out) or set(free_x + free_w) != set(out) or out[0] != xs[0] or not summed:
        raise NotLowered(f"the equation {equation!r} is not a matrix product with a constant")
    sizes = {**dict(zip(ws, w.shape, strict=True)), **dict(zip(xs, x.shape, strict=True))}
    x = transpose(b, x, [xs.index(c) for c in free_x + summed])
    x = reshape(b, x, (*(sizes[c] for c in free_x), int(np.prod([sizes[c] for c in summed]))))
    kernel = w.transpose([ws.index(c) for c in summed + free_w]).reshape(int(x.shape[-1] or 0), -1)
    order = [(free_x + free_w).index(c) for c in out]
    fused, rest = _split_bias(bias, out, free_w, sizes)
    y = b.emit("dense", x, weights={"kernel": kernel, "bias": fused})
    y = reshape(b, y, [sizes[c] for c in free_x + free_w], "split")
    y = transpose(b, y, order, "order")
    return y if rest is None else b.emit("add", y, b.const(rest), suffix="bias")


def _labels(equation: str, rank: int) -> tuple[str, str, str]:
    equation = equation.replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or "." in terms[1]:
        raise NotLowered(f"the equation {equation!r} is not a matrix product with a constant")
    spare = "".join(c for c in "ABCDEFGHIJKLMNOP" if c not in equation)
    dots = spare[: rank - len(terms[0].replace("...", ""))]
    xs, ws, out = terms[0].replace("...", dots), terms[1], out.replace("...", dots)
    if any(len(set(t)) != len(t) for t in (xs, ws, out)) or not out:
        raise NotLowered(f"the equation {equation!r} repeats a label")
    return xs, ws, out


def _split_bias(
    bias: np.ndarray | None, out: str, free_w: list[str], sizes: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The bias as a vector over the free labels of w, or zeros and the bias as it is."""
    columns = [sizes[c] for c in free_w]
    zeros = np.zeros(int(np.prod(columns)), np.float32)
    if bias is None:
        return zeros, None
    full = bias.reshape((1,) * (len(out) - bias.ndim) + bias.shape)
    if any(d != 1 and c not in free_w for c, d in zip(out, full.shape, strict=True)):
        return zeros, full[0]
    order = [out.index(c) for c in free_w]
    rows = full.transpose([i for i in range(len(out)) if i not in order] + order).reshape(
        [full.shape[i] for i in order]
    )
    return np.broadcast_to(rows, columns).reshape(-1), None


def contract_two(b: Builder, equation: str, x: Node, y: Node) -> Node:
    """einsum(equation, x, y) of two tensors, as products of matrices.

    Raises:
        NotLowered: the batch is not first in all three, or a label is summed over in one of them alone.
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    xs, _, ys = left.partition(",")
    if not arrow or "." in equation or any(len(set(t)) != len(t) for t in (xs, ys, out)):
        raise NotLowered(f"the equation {equation!r} is not a product of matrices")
    sizes = {**dict(zip(xs, x.shape, strict=True)), **dict(zip(ys, y.shape, strict=True))}
    both = [c for c in xs if c in ys]
    batch, summed = [c for c in both if c in out], [c for c in both if c not in out]
    free_x, free_y = [c for c in xs if c not in ys], [c for c in ys if c not in xs]
    if not batch or not xs[0] == ys[0] == out[0:1] or set(out) != {*batch, *free_x, *free_y}:
        raise NotLowered(f"the equation {equation!r} is not a product of matrices of each sample")

    def matrices(t: Node, labels: str, rows: list[str], columns: list[str], suffix: str) -> Node:
        t = transpose(b, t, [labels.index(c) for c in (*batch, *rows, *columns)], f"{suffix}_order")
        groups = [math.prod(int(sizes[c] or 1) for c in batch[1:])] if batch[1:] else []
        shape = [None, *groups, *(math.prod(int(sizes[c] or 1) for c in part) for part in (rows, columns))]
        return reshape(b, t, shape, f"{suffix}_matrices")

    z = b.emit("batch_matmul", matrices(x, xs, free_x, summed, "first"), matrices(y, ys, summed, free_y, "second"))
    z = reshape(b, z, [sizes[c] for c in (*batch, *free_x, *free_y)], "split")
    return transpose(b, z, [[*batch, *free_x, *free_y].index(c) for c in out], "order")


@lowers_layer(L.Dot)
def dot_layer(b: Builder, layer: Any, inputs: Sequence[Any]) -> Node:
    x, y = inputs
    if layer.normalize or not (isinstance(x, Node) and isinstance(y, Node)):
        raise NotLowered("a product of normalized vectors, or with a constant")
    axes = layer.axes if isinstance(layer.axes, list | tuple) else (layer.axes, layer.axes)
    first, second = (int(a) % len(t.shape) for a, t in zip(axes, inputs, strict=True))
    xs, ys = list("bcdefgh"[: len(x.shape)]), list("bijklmn"[: len(y.shape)])
    xs[first] = ys[second] = "z"
    out = "b" + "".join(c for c in (*xs[1:], *ys[1:]) if c != "z")
    return reshape(b, contract_two(b, f"{''.join(xs)},{''.join(ys)}->{out}", x, y), output_shape(b))


@lowers_op("Matmul")
def matmul(b: Builder, op: Any, x1: Any, x2: Any) -> Node:
    if isinstance(x1, Node) and isinstance(x2, Node):
        return _of_two(b, x1, x2)
    if isinstance(x1, Node):
        w = as_array(x2)
        if w.ndim == 2:
            return b.emit("dense", x1, weights={"kernel": w, "bias": np.zeros(w.shape[1], np.float32)})
        raise NotLowered(f"its constant has shape {w.shape}")
    w, rank = as_array(x1), len(x2.shape)
    if w.ndim != 2 or rank < 3:
        raise NotLowered(f"a constant of shape {w.shape} times a tensor of rank {rank}")
    return contract(b, "...kn,mk->...mn", x2, w)


def _of_two(b: Builder, x1: Node, x2: Node) -> Node:
    """The product of two computed tensors, matrix by matrix."""
    if len(x1.shape) != len(x2.shape) or len(x1.shape) < 3 or x1.shape[:-2] != x2.shape[:-2]:
        raise NotLowered(f"it multiplies matrices of tensors of shapes {x1.shape} and {x2.shape}")
    return b.emit("batch_matmul", x1, x2)


@lowers_op("Dot")
def dot(b: Builder, op: Any, x1: Any, x2: Any) -> Node:
    return matmul(b, op, x1, x2)


@lowers_op("Einsum")
def einsum(b: Builder, op: Any, *operands: Any) -> Node:
    if len(operands) != 2 or not any(isinstance(o, Node) for o in operands):
        raise NotLowered("it is not a product of two")
    if all(isinstance(o, Node) for o in operands):
        return contract_two(b, op.subscripts, *operands)
    if isinstance(operands[0], Node):
        return contract(b, op.subscripts, operands[0], as_array(operands[1]))
    left, _, out = op.subscripts.partition("->")
    first, second = left.split(",")
    return contract(b, f"{second},{first}->{out}", operands[1], as_array(operands[0]))


@lowers_layer(L.Embedding)
def embedding(b: Builder, layer: Any, ids: Node) -> Node:
    return b.emit("embedding", ids, weights={"table": as_array(layer.embeddings)})


def output_shape(b: Builder) -> Shape:
    """Shape of the operation's (first) output, as Keras declares it."""
    return without_batch(b.scope.shapes[0])
