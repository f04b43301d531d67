"""Pooling, and reductions over axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.ops import compute
from kquant.grids.gradients import exact, round_ste
from kquant.targets.builtin import Builtin, Reference
from kquant.targets.kernel import Arithmetic, Kernel
from kquant.targets.litert.elementwise import move
from kquant.targets.litert.emitter import PADDING, Emitter, Sink
from kquant.targets.litert.fixed_point import (
    Requantize,
    Tensor,
    double_rounding,
    doubles,
    integers,
    multiplier,
    reduced,
    scale_twice,
    with_gradient_of,
)
from kquant.targets.litert.flatbuffer import FileGrid
from kquant.targets.litert.reference import elementwise, optimized
from kquant.targets.operand import Call


def _count(call: Call) -> int:
    """How many elements a mean averages."""
    return int(np.prod([call.inputs[0].centered.shape[a] for a in call.node.attrs["axes"]]))


def _mean(call: Call) -> Tensor:
    """Integer sum, then one float32 scale s_x / s_o / N; halves to even of the stored integer (XNNPACK)."""
    x, out, attrs = call.inputs[0], call.out, call.node.attrs
    total = tf.reduce_sum(x.centered, attrs["axes"], attrs["keepdims"])
    # float64 for a float32 quotient that does not depend on how the graph optimizer writes the division
    ratio = tf.cast(tf.cast(x.scale / out.scale, tf.float64) / float(_count(call)), tf.float32)
    return round_ste(total * ratio + out.zero_point) - out.zero_point


def fixed_point_mean(call: Call) -> Tensor:
    """The sum times (s_x / s_o) / N, N divided into the multiplier (LiteRT's own kernel)."""
    x, out, attrs, count = call.inputs[0], call.out, call.node.attrs, _count(call)
    s_x, s_o = doubles(x.scale, out.scale)
    mantissa, exponent = multiplier(s_x / s_o)
    shift = tf.minimum(tf.constant(min(count.bit_length() - 1, 32), tf.int64), 31 + exponent)
    mantissa = tf.bitwise.left_shift(mantissa, shift) // count
    total = scale_twice(tf.reduce_sum(integers(x), attrs["axes"], attrs["keepdims"]), mantissa, exponent - shift)
    return with_gradient_of(compute(call.node, [x.value]) / out.scale, total)


def average(call: Call) -> Tensor:
    """Average of the stored integers (zero point included), rounded half away from zero."""
    x, attrs = call.inputs[0], call.node.attrs
    size, strides, padding = attrs["pool_size"], attrs["strides"], attrs["padding"].upper()
    ones = tf.ones((1, *x.centered.shape[1:3], 1))
    count = tf.nn.convolution(ones, tf.ones((*size, 1, 1)), strides=strides, padding=padding)
    mean = tf.nn.avg_pool2d(x.centered + x.zero_point, size, strides, padding)
    # in integers, since TensorFlow's graph optimizer makes a division by a constant a product with its reciprocal
    total, n = tf.cast(tf.round(mean * count), tf.int32), tf.cast(count, tf.int32)
    rounded = tf.sign(total) * ((tf.abs(total) + n // 2) // n)
    return exact(mean - x.zero_point, tf.cast(rounded, tf.float32) - x.zero_point)


def _total(call: Call) -> Tensor:
    """The exact sums of windows, with the gradient of real ones."""
    size = float(np.prod(call.node.attrs["pool_size"]))
    total = compute(call.node, [call.inputs[0].centered]) * size
    return exact(total, tf.round(total))


def _share(call: Call) -> np.float32:
    """The scale of the ones that a kernel multiplies with."""
    return np.float32(1 / np.prod(call.node.attrs["pool_size"]))


def _window_mean(call: Call) -> Tensor:
    """The sum times s_x (1 / N) / s_o in float32, halves to even (XNNPACK's depthwise convolution with ones)."""
    # products in float64, rounded to float32: not to depend on how the graph optimizer writes them
    s_x, s_o = (tf.cast(s, tf.float64) for s in (call.inputs[0].scale, call.out.scale))
    product = tf.cast(tf.cast(s_x * np.float64(_share(call)), tf.float32), tf.float64)
    return round_ste(_total(call) * tf.cast(product / s_o, tf.float32))


def _as_convolution(rounding: Requantize) -> Arithmetic:
    """As a depthwise convolution with ones that is rounded so."""
    return lambda call: rounding(_total(call), call.inputs[0].scale, tf.constant(_share(call)), call.out.scale)


def _write_window_mean(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """DEPTHWISE_CONV_2D with ones: XNNPACK has it, and no average pooling of integers; any grid."""
    (h, w), (sh, sw), channels = node.attrs["pool_size"], node.attrs["strides"], node.shape[-1]
    assert channels is not None, "pooling has channels"
    ones, share = np.ones((1, h, w, channels)), np.full(channels, np.float32(1 / (h * w)))
    if out.q is None:
        kernel = e.constant(f"{node.name}/ones", ones * share, "FLOAT32")
        bias = e.constant(f"{node.name}/bias", np.zeros(channels), "FLOAT32")
    else:
        source = e.grid(node.inputs[0])
        assert source is not None, "an integer operation reads integers"
        kernel = e.constant(f"{node.name}/ones", ones, "INT8", FileGrid(share, 0, 3))
        dtype = "INT64" if out.q.container == 16 else "INT32"
        scales = np.float32(source.scale) * share
        bias = e.constant(f"{node.name}/bias", np.zeros(channels), dtype, FileGrid(scales, 0))
    e.op(
        "DEPTHWISE_CONV_2D", [x[0], kernel, bias], [out.tensor], kernel, out.q is not None,
        padding=PADDING[node.attrs["padding"]], strideH=sh, strideW=sw, dilationHFactor=1, dilationWFactor=1,
        depthMultiplier=1,
    )  # fmt: skip


def _write_pool(builtin: str) -> Callable[[Emitter, Node, Sequence[int], Sink], None]:
    def write(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
        (h, w), (sh, sw) = node.attrs["pool_size"], node.attrs["strides"]
        padding = PADDING[node.attrs["padding"]]
        e.op(builtin, x, [out.tensor], filterHeight=h, filterWidth=w, strideH=sh, strideW=sw, padding=padding)

    return write


def _write_reduction(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """The operator is called as the operation is."""
    axes = e.indices(node, "axes", list(node.attrs["axes"]))
    e.op(node.op.upper(), [x[0], axes], [out.tensor], keepDims=bool(node.attrs["keepdims"]))


def _write_place(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """ARG_MAX and ARG_MIN take no int16."""
    builtin = {"argmax": "ARG_MAX", "argmin": "ARG_MIN"}[node.op]
    if e.builder.dtype(x[0]) == "INT16":
        wide = e.builder.tensor(
            f"{node.name}/wide", e.builder.shape(x[0]), "INT32", batch=e.graph[node.inputs[0]].batch
        )
        e.op("CAST", [x[0]], [wide])
        x = [wide]
    e.op(builtin, [x[0], e.indices(node, "axis", node.attrs["axis"])], [out.tensor], outputType=_INT32)


def _write_top_k(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """TOPK_V2, of whose two outputs one is not read."""
    values = node.op == "top_k"
    b, name = e.builder, f"{node.name}/unread"
    grid = None if b.dtype(x[0]) == "FLOAT32" else e.grid(node.inputs[0])
    unread = e.new_tensor(node, name, e.shape(node), None if values else grid, "INT32" if values else "FLOAT32")
    outputs = [out.tensor, unread] if values else [unread, out.tensor]
    e.op("TOPK_V2", [x[0], e.indices(node, "k", node.attrs["k"])], outputs)


_INT32 = 2  # as the schema numbers types

# operation -> what the reference kernels compute on int8 tensors, where that is something else
REFERENCE: Mapping[str, Arithmetic] = {
    "mean": fixed_point_mean,
    "window_mean": _as_convolution(double_rounding(True)),
}

KERNELS = (
    Kernel(
        op="max_pool2d",
        arithmetic={8: move, 16: move},
        write=_write_pool("MAX_POOL_2D"),
        operators={
            "MAX_POOL_2D": Builtin(
                options="Pool2DOptions", versions=(1, 2, 3), reference=Reference(compute=elementwise.max_pool_2d)
            )
        },
    ),
    Kernel(
        op="avg_pool2d",
        arithmetic={8: average, 16: average},
        write=_write_pool("AVERAGE_POOL_2D"),
        operators={
            "AVERAGE_POOL_2D": Builtin(
                options="Pool2DOptions", versions=(1, 2, 3), reference=Reference(compute=elementwise.average_pool_2d)
            )
        },
    ),
    Kernel(
        op="window_mean",  # written as a depthwise convolution
        arithmetic={8: _window_mean, 16: _as_convolution(reduced)},
        write=_write_window_mean,
    ),
    Kernel(
        op="mean",
        arithmetic={8: _mean, 16: fixed_point_mean},
        write=_write_reduction,
        operators={
            "MEAN": Builtin(
                options="ReducerOptions",
                versions=(1, 2, 3),
                reference=Reference(compute=elementwise.mean),
                optimized=Reference(compute=optimized.mean),
            )
        },
    ),
    Kernel(
        op="reduce_max",
        arithmetic={8: move, 16: move},
        write=_write_reduction,
        operators={
            "REDUCE_MAX": Builtin(
                options="ReducerOptions",
                versions=(1, 2, 3),
                reference=Reference(compute=elementwise.reduce_extremum(np.maximum)),
            ),
        },
    ),
    Kernel(
        op="reduce_min",
        arithmetic={8: move, 16: move},
        write=_write_reduction,
        operators={
            "REDUCE_MIN": Builtin(
                options="ReducerOptions",
                versions=(1, 2, 3),
                reference=Reference(compute=elementwise.reduce_extremum(np.minimum)),
            )
        },
    ),
    Kernel(
        op="argmax",
        arithmetic={},
        discrete=(8, 16),
        write=_write_place,
        operators={
            "ARG_MAX": Builtin(
                options="ArgMaxOptions",
                versions=(1, 2, 3),
                reference=Reference(compute=elementwise.place(np.argmax), any_type=True),
            )
        },
    ),
    Kernel(
        op="argmin",
        arithmetic={},
        discrete=(8, 16),
        write=_write_place,
        operators={
            "ARG_MIN": Builtin(
                options="ArgMinOptions",
                versions=(1, 2, 3),
                reference=Reference(compute=elementwise.place(np.argmin), any_type=True),
            )
        },
    ),
    Kernel(
        op="top_k",
        arithmetic={8: move, 16: move},
        write=_write_top_k,
        operators={
            "TOPK_V2": Builtin(versions=(1, 2, 3), reference=Reference(compute=elementwise.top_k, any_type=True))
        },
    ),
    Kernel(op="top_k_indices", arithmetic={}, discrete=(8, 16), write=_write_top_k),
)
