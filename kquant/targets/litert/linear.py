"""Operations that multiply by weights and accumulate: convolutions, dense layers, a factor and offset per channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.ops import bias_of, compute, weight_of
from kquant.grids.gradients import round_ste
from kquant.targets.builtin import Builtin, Reference, Use
from kquant.targets.kernel import Arithmetic, Kernel, Layout
from kquant.targets.litert.arithmetic import (
    multiply_double_rounding,
    multiply_reduced,
    quantize_multiplier,
    saturate,
)
from kquant.targets.litert.emitter import PADDING, Emitter, Sink
from kquant.targets.litert.fixed_point import Requantize, Tensor, double_rounding, in_float32, reduced, single_rounding
from kquant.targets.litert.reader import Operator
from kquant.targets.litert.reference import layout, linear, optimized
from kquant.targets.litert.weights import weights
from kquant.targets.operand import Call

ALL = ("NONE", "RELU", "RELU6", "RELU_N1_TO_1")


def accumulate(rounding: Callable[[Call], Requantize]) -> Arithmetic:
    """The exact sum of products and bias, brought to the output's grid.

        acc = op(x_int, w_int) + round(b / (s_x s_w));   q - z_y = requantize(acc, s_x, s_w, s_y)

    (eq. 3 of the white paper, then requantization).

    Args:
        rounding: how the kernel that runs a call requantizes.
    """

    def arithmetic(call: Call) -> Tensor:
        x, out = call.inputs[0], call.out
        bias = call.weights[bias_of(call.node)]
        if call.weight is None:  # weights in float, activations in integers: simulation only
            return round_ste(_products(call.node, x.value, call.weights[weight_of(call.node).name], bias) / out.scale)
        w = call.weight
        b_int = round_ste(bias / (x.scale * w.scale))
        # an int16 input overflows the 24 bits in which float32 is exact
        wide = tf.float64 if out.bits > 8 else tf.float32
        acc = _products(call.node, *(tf.cast(t, wide) for t in (x.centered, w.centered, b_int)))
        return rounding(call)(acc, x.scale, w.scale, out.scale)

    return arithmetic


def _matrix_product(rounding: Requantize) -> Arithmetic:
    """The exact sums of products of two tensors, brought to the output's grid."""

    def arithmetic(call: Call) -> Tensor:
        a, b = call.inputs
        acc = compute(call.node, [tf.cast(x.centered, tf.float64) for x in (a, b)])
        acc = acc if call.out.bits > 8 else tf.cast(acc, tf.float32)
        return rounding(acc, a.scale * b.scale, tf.ones_like(b.scale), call.out.scale)  # that product is in float32

    return arithmetic


_OWN_MATRIX_PRODUCT = _matrix_product(double_rounding(True))


def _matrix_product_8(call: Call) -> Tensor:
    """XNNPACK takes a second operand whose zero point is 0; LiteRT's own kernel does the rest."""
    in_xnnpack = _matrix_product(in_float32)(call)
    return tf.where(call.inputs[1].zero_point == 0, in_xnnpack, _OWN_MATRIX_PRODUCT(call))


def _batch_matmul(op: Operator, x: linear.Values) -> np.ndarray:
    """BATCH_MATMUL of two tensors, as the reference kernels compute it."""
    a, b = (np.asarray(v).astype(np.int64) - op.given(k).z for k, v in enumerate(x[:2]))
    out = op.outputs[0]
    by = quantize_multiplier(np.float64(np.float32(op.given(0).s * op.given(1).s)) / np.float64(out.s))
    multiply = multiply_reduced if out.dtype == np.int16 else multiply_double_rounding
    product = a @ (b.swapaxes(-1, -2) if op.option("adjY", False) else b)
    return saturate(multiply(product, by) + out.z, out.dtype)


def _products(node: Node, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return compute(node, [x], {weight_of(node).name: weight, bias_of(node): bias})


# How LiteRT's default kernels requantize. XNNPACK takes int8 weights, but no transposed convolution whose output shape
# depends on a dynamic batch. Packed weights (int4, in dense layers also int2) it takes only in dense layers whose input
# depth fills whole bytes; LiteRT's own kernels do the rest. Those round halves up where they are vectorized: depthwise
# and transposed convolutions in whole blocks of 8 channels, grouped convolutions not at all.


def _is_packed(call: Call) -> bool:
    return call.weight is not None and call.weight.bits < 8


def _in_blocks_of_8(call: Call) -> Requantize:
    channels = call.node.shape[-1] or 0
    return double_rounding(np.arange(channels) >= channels - channels % 8)


def _conv2d_rounding(call: Call) -> Requantize:
    return double_rounding(call.node.attrs["groups"] > 1) if _is_packed(call) else in_float32


def _depthwise_rounding(call: Call) -> Requantize:
    return _in_blocks_of_8(call) if _is_packed(call) else in_float32


def _dense_rounding(call: Call) -> Requantize:
    if call.weight is None or not _is_packed(call):
        return in_float32
    whole_bytes = call.node.weights["kernel"][-2] % (8 // call.weight.bits) == 0
    return in_float32 if whole_bytes else double_rounding(False)


def _write_conv2d(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """CONV_2D; groups follow from the shape of the kernel."""
    w, a = weights(e, node, x[0], out), node.attrs
    (sh, sw), (dh, dw) = a["strides"], a["dilation"]
    e.op(
        "CONV_2D", [x[0], w.kernel, w.bias], [out.tensor], w.kernel, w.per_channel,
        padding=PADDING[a["padding"]], strideH=sh, strideW=sw, dilationHFactor=dh, dilationWFactor=dw,
        fusedActivationFunction=out.activation,
    )  # fmt: skip


def _write_depthwise_conv2d(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """DEPTHWISE_CONV_2D."""
    w, a = weights(e, node, x[0], out), node.attrs
    (sh, sw), (dh, dw) = a["strides"], a["dilation"]
    e.op(
        "DEPTHWISE_CONV_2D", [x[0], w.kernel, w.bias], [out.tensor], w.kernel, w.per_channel,
        padding=PADDING[a["padding"]], strideH=sh, strideW=sw, dilationHFactor=dh, dilationWFactor=dw,
        depthMultiplier=node.weights["kernel"].shape[3], fusedActivationFunction=out.activation,
    )  # fmt: skip


def _write_dense(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """FULLY_CONNECTED on the last axis."""
    w = weights(e, node, x[0], out)
    hybrid = out.q is None and e.builder.dtype(w.kernel).startswith("INT")
    e.op(
        "FULLY_CONNECTED", [x[0], w.kernel, w.bias], [out.tensor], w.kernel, w.per_channel,
        keepNumDims=len(node.shape) > 2, asymmetricQuantizeInputs=hybrid,
        fusedActivationFunction=out.activation,
    )  # fmt: skip


def _is_pointwise(node: Node) -> bool:
    """Whether a convolution is a dense layer at every position, whose packed weights XNNPACK takes."""
    kernel = node.weights["kernel"]
    h, w, depth, _ = getattr(kernel, "shape", kernel)
    return (h, w, node.attrs["groups"]) == (1, 1, 1) and depth % 4 == 0


def _write_pointwise(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """FULLY_CONNECTED at every position; strides are taken in front of it."""
    (sh, sw), source = node.attrs["strides"], x[0]
    if (sh, sw) != (1, 1):
        given = e.shape(e.graph[node.inputs[0]])
        shape, q = (*e.shape(node)[:3], given[3]), e.grid(node.inputs[0]) if out.q is not None else None
        source = e.helper(node, "strided", shape, q)
        slices = [e.indices(node, s, v) for s, v in (("begin", [0] * 4), ("end", [0] * 4), ("strides", [1, sh, sw, 1]))]
        e.op("STRIDED_SLICE", [x[0], *slices], [source], beginMask=15, endMask=15)
    _write_dense(e, node, [source], out)


def _write_conv2d_transpose(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """TRANSPOSE_CONV, whose output shape is computed where the batch may be resized."""
    w, shape = weights(e, node, x[0], out), e.shape(node)
    if shape[0] is not None:
        size = e.indices(node, "shape", shape)
    else:
        read, batch = (e.builder.tensor(f"{node.name}/{s}", d, "INT32") for s, d in (("read", [4]), ("batch", [])))
        e.op("SHAPE", [x[0]], [read], outType=2)
        ends = [e.indices(node, s, [v]) for s, v in (("begin", 0), ("end", 1), ("step", 1))]
        e.op("STRIDED_SLICE", [read, *ends], [batch], shrinkAxisMask=1)
        parts = [e.indices(node, f"dim{k}", d) for k, d in enumerate(shape[1:], 1)]
        size = e.builder.tensor(f"{node.name}/shape", [4], "INT32")
        e.op("PACK", [batch, *parts], [size], valuesCount=4, axis=0)
    sh, sw = node.attrs["strides"]
    e.op(
        "TRANSPOSE_CONV", [size, w.kernel, x[0], w.bias], [out.tensor], w.kernel, w.per_channel,
        padding=PADDING[node.attrs["padding"]], strideH=sh, strideW=sw,
    )  # fmt: skip


def _write_affine(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """DEPTHWISE_CONV_2D of size 1x1, on a tensor of four axes."""
    shape, grid = e.shape(node), e.grid(node.inputs[0]) if out.q is not None else None
    flat = len(shape) != 4
    source, result = x[0], out.tensor
    if flat:
        middle = [int(d or 0) for d in shape[1:-1]]
        four = (shape[0], 1, math.prod(middle), shape[-1]) if len(middle) < 3 else (
            shape[0], math.prod(middle[:-1]), middle[-1], shape[-1]
        )  # fmt: skip
        source, result = e.helper(node, "input4d", four, grid), e.helper(node, "output4d", four, out.q)
        e.op("RESHAPE", [x[0], e.indices(node, "shape4d", _with_batch(four))], [source])
    w = weights(e, node, source, out)
    e.op(
        "DEPTHWISE_CONV_2D", [source, w.kernel, w.bias], [result], w.kernel, w.per_channel,
        padding=PADDING["valid"], strideH=1, strideW=1, depthMultiplier=1,
        fusedActivationFunction=out.activation,
    )  # fmt: skip
    if flat:
        e.op("RESHAPE", [result, e.indices(node, "shape", _with_batch(shape))], [out.tensor])


def _with_batch(shape: Sequence[int | None]) -> list[int]:
    return [-1 if d is None else d for d in shape]


def _depthwise_least(use: Use) -> int:
    return 2 if max(use.fields.get("dilationHFactor", 1), use.fields.get("dilationWFactor", 1)) > 1 else 1


def _fully_connected_least(use: Use) -> int:
    return 12 if use.per_channel else 5 if use.fields["keepNumDims"] else 1


def _write_batch_matmul(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op(
        "BATCH_MATMUL",
        x,
        [out.tensor],
        adjX=False,
        adjY=bool(node.attrs.get("adjoint")),
        asymmetricQuantizeInputs=False,
    )


_CONVOLUTION_16 = accumulate(lambda call: reduced)
_REFERENCE_CONVOLUTION = accumulate(lambda call: double_rounding(True))
# operation -> what the reference kernels compute on int8 tensors, where that is something else
REFERENCE: Mapping[str, Arithmetic] = {
    "conv2d": _REFERENCE_CONVOLUTION,
    "depthwise_conv2d": _REFERENCE_CONVOLUTION,
    "conv2d_transpose": _REFERENCE_CONVOLUTION,
    "affine": _REFERENCE_CONVOLUTION,
    "dense": accumulate(lambda call: single_rounding),
    "batch_matmul": _OWN_MATRIX_PRODUCT,
}


def _stored_as_int8(kernel: Kernel) -> Kernel:
    """The kernel of int8 weights, for weights of any number of bits."""
    return replace(kernel, weights={}, slowdown={}, variants={})


_FULLY_CONNECTED = Builtin(
    options="FullyConnectedOptions",
    versions=(1, 4, 7),
    weight_versions={
        ("INT8", "INT4"): 10,
        ("INT16", "INT4"): 10,
        ("INT8", "INT2"): 13,
        ("FLOAT32", "INT8"): 9,
    },
    least=_fully_connected_least,
    reference=Reference(compute=linear.fully_connected),
    optimized=Reference(compute=optimized.fully_connected),
)
_DENSE_SLOWDOWN = {4: 1.1, 2: 2.6}
# a convolution of one tap as a dense layer at every position: XNNPACK takes packed weights there
_POINTWISE = Kernel(
    op="conv2d",
    arithmetic={8: accumulate(_dense_rounding)},
    write=_write_pointwise,
    operators={"FULLY_CONNECTED": _FULLY_CONNECTED},
    layout=Layout(lambda w: w[0, 0].T),
    weights={8: (2, 4)},
    fuses=ALL,
    slowdown=_DENSE_SLOWDOWN,
    takes=_is_pointwise,
)
_CONV2D = Kernel(
    op="conv2d",
    arithmetic={8: accumulate(_conv2d_rounding), 16: _CONVOLUTION_16},
    write=_write_conv2d,
    operators={
        "CONV_2D": Builtin(
            options="Conv2DOptions",
            versions=(1, 3, 4),
            weight_versions={("INT8", "INT4"): 7, ("INT16", "INT4"): 7, ("FLOAT32", "INT8"): 5},
            reference=Reference(compute=linear.conv_2d),
            optimized=Reference(compute=optimized.conv_2d),
        )
    },
    layout=Layout(lambda w: w.transpose(3, 0, 1, 2), hybrid=(4, 8)),  # HWIO -> OHWI
    weights={8: (4,), 16: (4,)},
    fuses=ALL,
    slowdown={4: 3.0},
)
_DEPTHWISE = Kernel(
    op="depthwise_conv2d",
    arithmetic={8: accumulate(_depthwise_rounding), 16: _CONVOLUTION_16},
    write=_write_depthwise_conv2d,
    operators={
        "DEPTHWISE_CONV_2D": Builtin(
            options="DepthwiseConv2DOptions",
            versions=(1, 3, 5),
            weight_versions={("INT8", "INT4"): 7, ("FLOAT32", "INT8"): 6},
            least=_depthwise_least,
            reference=Reference(compute=linear.depthwise_conv_2d),
            optimized=Reference(compute=optimized.depthwise_conv_2d),
        )
    },
    layout=Layout(lambda w: w[None], axis=3, hybrid=(8,)),  # HW(CM) -> 1HW(CM)
    weights={8: (4,)},  # with int16 activations the kernel accepts int4 and is silently wrong
    fuses=ALL,
    slowdown={4: 6.0},
)
_DENSE = Kernel(
    op="dense",
    arithmetic={8: accumulate(_dense_rounding), 16: accumulate(lambda call: single_rounding)},
    write=_write_dense,
    operators={"FULLY_CONNECTED": _FULLY_CONNECTED},
    layout=Layout(lambda w: w.T, hybrid=(2, 4, 8), blocks=(4,)),
    weights={8: (2, 4), 16: (4,)},
    fuses=ALL,
    slowdown=_DENSE_SLOWDOWN,
)

KERNELS = (
    replace(
        _CONV2D,
        variants={
            "fully_connected": _POINTWISE,
            "fully_connected_int4": replace(_POINTWISE, weights={8: (4,)}),
            "int8": _stored_as_int8(_CONV2D),
        },
    ),
    replace(_DEPTHWISE, variants={"int8": _stored_as_int8(_DEPTHWISE)}),
    replace(_DENSE, variants={"int4": replace(_DENSE, weights={8: (4,), 16: (4,)}), "int8": _stored_as_int8(_DENSE)}),
    Kernel(
        op="conv2d_transpose",
        arithmetic={8: accumulate(_in_blocks_of_8), 16: _CONVOLUTION_16},
        write=_write_conv2d_transpose,
        operators={
            "TRANSPOSE_CONV": Builtin(
                options="TransposeConvOptions",
                versions=(3, 3, 3),
                typed_by=2,
                reference=Reference(compute=linear.transpose_conv),
            ),
            "SHAPE": Builtin(options="ShapeOptions", reference=Reference(compute=layout.shape, any_type=True)),
        },
        layout=Layout(lambda w: w.transpose(2, 0, 1, 3)),  # HWOI -> OHWI
    ),
    Kernel(
        op="batch_matmul",
        arithmetic={8: _matrix_product_8, 16: _matrix_product(reduced)},
        write=_write_batch_matmul,
        operators={
            "BATCH_MATMUL": Builtin(
                options="BatchMatMulOptions", versions=(1, 2, 3), reference=Reference(compute=_batch_matmul)
            )
        },
        centered=(1,),
        max_rank=5,
    ),
    Kernel(
        op="affine",  # written as a depthwise convolution
        arithmetic={8: accumulate(lambda call: in_float32), 16: _CONVOLUTION_16},
        write=_write_affine,
        layout=Layout(lambda w: w.reshape(1, 1, 1, -1), axis=3),
        fuses=ALL,
    ),
)
