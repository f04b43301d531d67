"""How operations with weights are written: layouts, containers, biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kquant.errors import ExportError
from kquant.graph.ir import Node
from kquant.graph.ops import QUANTIZED_WEIGHT, weight_view
from kquant.grids.grid import BIAS_MAX, Grid, quantize_bias
from kquant.targets.litert.emitter import Emitter, Sink
from kquant.targets.litert.flatbuffer import FileGrid

PADDING = {"same": 0, "valid": 1}
ACTIVATION = {"NONE": 0, "RELU": 1, "RELU_N1_TO_1": 2, "RELU6": 3}


@dataclass(frozen=True)
class Layout:
    """How the weights of an operation are stored.

    Attributes:
        to_file: from `graph.ops.weight_view` to the file's axes.
        axis: the file's axis of the output channels.
        bias: name of the weight that is the bias.
        hybrid: whether the float kernel takes int8 weights and quantizes its input itself.
    """

    to_file: Callable[[np.ndarray], np.ndarray]
    axis: int = 0
    bias: str = "bias"
    hybrid: bool = False


LAYOUTS = {
    "conv2d": Layout(lambda w: w.transpose(3, 0, 1, 2), hybrid=True),  # HWIO -> OHWI
    "depthwise_conv2d": Layout(lambda w: w[None], axis=3, hybrid=True),  # HW(CM) -> 1HW(CM)
    "conv2d_transpose": Layout(lambda w: w.transpose(2, 0, 1, 3)),  # HWOI -> OHWI
    "dense": Layout(lambda w: w.T, hybrid=True),
    "affine": Layout(lambda w: w.reshape(1, 1, 1, -1), axis=3, bias="offset"),
    "prelu": Layout(lambda w: w),
    "embedding": Layout(lambda w: w),
}


@dataclass(frozen=True)
class Weights:
    """Tensors of an operation's weights."""

    kernel: int
    bias: int = -1
    per_channel: bool = False


def weights(e: Emitter, node: Node, x: int, out: Sink) -> Weights:
    """Write the kernel and the bias of a linear operation (the alpha of a prelu, the table of an embedding).

    Args:
        e: the emitter.
        node: the operation.
        x: its input tensor.
        out: its output, which says whether it runs in integers.
    """
    layout, q = LAYOUTS[node.op], e.weight_grid(node.name)
    name, view = f"{node.name}/{QUANTIZED_WEIGHT[node.op][0]}", weight_view(node)
    if q is None:
        if out.q is not None:
            raise ExportError(
                f"{node.name!r} runs in integers but its weights have no grid; quantize them or keep the layer float."
            )
        kernel, per_channel = _float_kernel(e, name, layout.to_file(view)), False
        e.weight_types[node.name] = "FLOAT16" if e.mode == "float16" else "FLOAT32"
    else:
        hybrid = e.mode == "dynamic_range" and layout.hybrid
        kernel = _integer_kernel(e, node, name, q, out.q, expand=hybrid)
        per_channel = hybrid or q.axis is not None
        e.weight_types[node.name] = e.builder.dtype(kernel)
        if out.q is None and not hybrid:
            kernel = _dequantized(e, name, kernel, view, layout, per_channel)
            per_channel = False
    return Weights(kernel, _bias(e, node, layout, q, out), per_channel)


def _float_kernel(e: Emitter, name: str, values: np.ndarray) -> int:
    if e.mode != "float16":
        return e.constant(name, values, "FLOAT32")
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest > float(np.finfo(np.float16).max):
        raise ExportError(f"{name!r} has a weight of {largest:.3g}, too large for float16; use another mode.")
    small = e.constant(f"{name}/float16", values, "FLOAT16")
    kernel = e.builder.tensor(name, values.shape, "FLOAT32")
    e.op("DEQUANTIZE", [small], [kernel])
    return kernel


def _integer_kernel(e: Emitter, node: Node, name: str, q: Grid, out: Grid | None, expand: bool) -> int:
    layout = LAYOUTS[node.op]
    values = layout.to_file(e.integers(node.name))
    activation = 8 if out is None else out.container
    container = e.target.weight_container(node.op, q.width, activation)
    if out is None and (expand or container == 2):
        container = 8  # the hybrid kernels and DEQUANTIZE
    if container == 4 and activation == 16 and node.op in ("depthwise_conv2d", "affine"):
        raise ExportError(
            f"{node.name!r}: the kernel reads int4 depthwise weights wrongly with int16 activations; "
            "use a target that stores them as int8."
        )
    limit = 2 ** (container - 1)
    if q.qmin < -limit or q.qmax >= limit:
        raise ExportError(
            f"{node.name!r}: weights on [{q.qmin}, {q.qmax}] do not fit int{container}; use at most 8 bits, symmetric."
        )
    scale, zero_point = q.scale, q.zero_point
    if expand and q.axis is None:  # these kernels read one scale per channel
        scale = np.full(values.shape[layout.axis], q.scale, np.float32)
    suffix = "" if out is not None or expand else f"/int{container}"
    return e.constant(name + suffix, values, f"INT{container}", FileGrid(scale, zero_point, layout.axis))


def _dequantized(e: Emitter, name: str, kernel: int, view: np.ndarray, layout: Layout, per_channel: bool) -> int:
    result = e.builder.tensor(name, layout.to_file(view).shape, "FLOAT32")
    e.op("DEQUANTIZE", [kernel], [result], per_channel=per_channel)
    return result


def _bias(e: Emitter, node: Node, layout: Layout, q: Grid | None, out: Sink) -> int:
    if layout.bias not in node.weights:
        return -1
    name, bias = f"{node.name}/{layout.bias}", node.weights[layout.bias]
    if out.q is None:
        return e.constant(name, bias, "FLOAT32")
    source = e.grid(node.inputs[0])
    assert source is not None and q is not None, "checked before"
    stored = quantize_bias(bias, source.scale, q.scale)
    if np.abs(stored).max(initial=0) >= BIAS_MAX:
        raise ExportError(
            f"{node.name!r}: a bias of {np.abs(bias).max():.3g} does not fit 32 bits at the scale of its products; "
            "raise the scale of the weights (kquant.grids.grid.fit_bias) or keep the layer float."
        )
    scale = np.float32(source.scale) * np.asarray(q.scale, np.float32)
    return e.constant(name, stored, "INT64" if out.q.container == 16 else "INT32", FileGrid(scale, 0))


def conv2d(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """CONV_2D; groups follow from the shape of the kernel."""
    w, a = weights(e, node, x[0], out), node.attrs
    (sh, sw), (dh, dw) = a["strides"], a["dilation"]
    e.op(
        "CONV_2D", [x[0], w.kernel, w.bias], [out.tensor], w.kernel, w.per_channel,
        padding=PADDING[a["padding"]], strideH=sh, strideW=sw, dilationHFactor=dh, dilationWFactor=dw,
        fusedActivationFunction=ACTIVATION[out.fused],
    )  # fmt: skip


def depthwise_conv2d(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """DEPTHWISE_CONV_2D."""
    w, a = weights(e, node, x[0], out), node.attrs
    (sh, sw), (dh, dw) = a["strides"], a["dilation"]
    e.op(
        "DEPTHWISE_CONV_2D", [x[0], w.kernel, w.bias], [out.tensor], w.kernel, w.per_channel,
        padding=PADDING[a["padding"]], strideH=sh, strideW=sw, dilationHFactor=dh, dilationWFactor=dw,
        depthMultiplier=node.weights["kernel"].shape[3], fusedActivationFunction=ACTIVATION[out.fused],
    )  # fmt: skip


def dense(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """FULLY_CONNECTED on the last axis."""
    w = weights(e, node, x[0], out)
    hybrid = out.q is None and e.builder.dtype(w.kernel) == "INT8"
    e.op(
        "FULLY_CONNECTED", [x[0], w.kernel, w.bias], [out.tensor], w.kernel, w.per_channel,
        keepNumDims=len(node.shape) > 2, asymmetricQuantizeInputs=hybrid,
        fusedActivationFunction=ACTIVATION[out.fused],
    )  # fmt: skip


def conv2d_transpose(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
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


def affine(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
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
        fusedActivationFunction=ACTIVATION[out.fused],
    )  # fmt: skip
    if flat:
        e.op("RESHAPE", [result, e.indices(node, "shape", _with_batch(shape))], [out.tensor])


def prelu(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """PRELU."""
    e.op("PRELU", [x[0], weights(e, node, x[0], out).kernel], [out.tensor])


def embedding(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """GATHER of rows; an integer table has the grid of the output."""
    ids = x[0]
    if e.builder.dtype(ids) != "INT32":
        ids = e.builder.tensor(f"{node.name}/ids", e.builder.shape(x[0]), "INT32")
        e.op("CAST", [x[0]], [ids], inDataType=0, outDataType=2)
    if out.q is not None:
        table = e.real_constant(f"{node.name}/table", node.weights["table"], out.q)
        e.weight_types[node.name] = e.builder.dtype(table)
    else:
        table = weights(e, node, ids, out).kernel
    e.op("GATHER", [table, ids], [out.tensor], axis=0)


def _with_batch(shape: Sequence[int | None]) -> list[int]:
    return [-1 if d is None else d for d in shape]
