"""The table of operations: how each is written, and what its kernels accept.

Every entry of `RULES` was run on LiteRT's kernels (XNNPACK, builtin, and reference, which lack ELU);
what is not in it cannot be exported. An operation is written by a function (emitter, node, input tensors, sink).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kquant.graph.ir import Node
from kquant.targets.litert import linear
from kquant.targets.litert.emitter import Emitter, Sink
from kquant.targets.litert.linear import ACTIVATION, PADDING

Emit = Callable[[Emitter, Node, Sequence[int], Sink], None]
_ALL = ("NONE", "RELU", "RELU6", "RELU_N1_TO_1")
_BOTH = frozenset({8, 16})
_INT8 = frozenset({8})


@dataclass(frozen=True)
class Rule:
    """How an operation is written.

    Attributes:
        emit: the function that writes it.
        containers: bits of the activation types for which it has an integer kernel.
        fuses: activations that its kernel applies.
        max_rank: most axes that the kernels take, None for any number.
    """

    emit: Emit
    containers: frozenset[int] = _BOTH
    fuses: tuple[str, ...] = ("NONE",)
    max_rank: int | None = None


def _plain(builtin: str) -> Emit:
    def emit(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
        e.op(builtin, x, [out.tensor])

    return emit


def _sum(builtin: str) -> Emit:
    def emit(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
        # False selects the int16 kernel for scales that are no powers of two.
        e.op(builtin, x, [out.tensor], fusedActivationFunction=ACTIVATION[out.fused], potScaleInt16=False)

    return emit


def _mul(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("MUL", x, [out.tensor], fusedActivationFunction=ACTIVATION[out.fused])


def _clip(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """RELU and RELU6 requantize on their way; without them it is a change of grid."""
    builtin = out.fused if out.fused != "NONE" else "QUANTIZE"
    e.op(builtin, x, [out.tensor])


def _leaky_relu(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("LEAKY_RELU", x, [out.tensor], alpha=float(node.attrs["alpha"]))


def _gelu(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("GELU", x, [out.tensor], approximate=bool(node.attrs["approximate"]))


def _softmax(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("SOFTMAX", x, [out.tensor], beta=1.0)


def _concat(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("CONCATENATION", x, [out.tensor], axis=node.attrs["axis"])


def _pool(builtin: str) -> Emit:
    def emit(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
        (h, w), (sh, sw) = node.attrs["pool_size"], node.attrs["strides"]
        padding = PADDING[node.attrs["padding"]]
        e.op(builtin, x, [out.tensor], filterHeight=h, filterWidth=w, strideH=sh, strideW=sw, padding=padding)

    return emit


def _reduce(builtin: str) -> Emit:
    def emit(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
        axes = e.indices(node, "axes", list(node.attrs["axes"]))
        e.op(builtin, [x[0], axes], [out.tensor], keepDims=bool(node.attrs["keepdims"]))

    return emit


def _reshape(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    shape = [-1 if d is None else d for d in e.shape(node)]
    e.op("RESHAPE", [x[0], e.indices(node, "shape", shape)], [out.tensor])


def _transpose(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("TRANSPOSE", [x[0], e.indices(node, "perm", list(node.attrs["perm"]))], [out.tensor])


def _slice(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    begin, end, strides = (list(node.attrs[k]) for k in ("begin", "end", "strides"))
    masks = [sum(1 << k for k, v in enumerate(values) if v is None) for values in (begin, end)]
    operands = [
        e.indices(node, name, [default if v is None else v for v in values])
        for name, values, default in (("begin", begin, 0), ("end", end, 0), ("strides", strides, 1))
    ]
    e.op("STRIDED_SLICE", [x[0], *operands], [out.tensor], beginMask=masks[0], endMask=masks[1])


def _pad(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    paddings, mode = e.indices(node, "paddings", node.attrs["paddings"]), node.attrs["mode"]
    value = float(node.attrs.get("value") or 0.0)
    if mode != "constant":
        e.op("MIRROR_PAD", [x[0], paddings], [out.tensor], mode={"reflect": 0, "symmetric": 1}[mode])
    elif value == 0.0:
        e.op("PAD", [x[0], paddings], [out.tensor])
    else:
        e.op("PADV2", [x[0], paddings, e.real_constant(f"{node.name}/value", value, out.q)], [out.tensor])


def _resize(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    builtin = "RESIZE_BILINEAR" if node.attrs["method"] == "bilinear" else "RESIZE_NEAREST_NEIGHBOR"
    size = e.indices(node, "size", list(node.attrs["size"]))
    e.op(builtin, [x[0], size], [out.tensor], halfPixelCenters=bool(node.attrs["half_pixel_centers"]))


RULES: dict[str, Rule] = {
    "conv2d": Rule(linear.conv2d, fuses=_ALL),
    "depthwise_conv2d": Rule(linear.depthwise_conv2d, fuses=_ALL),
    "conv2d_transpose": Rule(linear.conv2d_transpose),
    "dense": Rule(linear.dense, fuses=_ALL),
    "affine": Rule(linear.affine, fuses=_ALL),
    "embedding": Rule(linear.embedding),
    "prelu": Rule(linear.prelu, _INT8),
    "add": Rule(_sum("ADD"), fuses=_ALL),
    "sub": Rule(_sum("SUB"), fuses=_ALL),
    "mul": Rule(_mul, fuses=_ALL),
    "maximum": Rule(_plain("MAXIMUM")),
    "minimum": Rule(_plain("MINIMUM")),
    "clip": Rule(_clip, fuses=("NONE", "RELU", "RELU6")),
    "leaky_relu": Rule(_leaky_relu),
    "logistic": Rule(_plain("LOGISTIC")),
    "tanh": Rule(_plain("TANH")),
    "softmax": Rule(_softmax),
    "gelu": Rule(_gelu, _INT8),
    "elu": Rule(_plain("ELU"), _INT8),
    "hard_swish": Rule(_plain("HARD_SWISH"), _INT8),
    "concat": Rule(_concat),
    "max_pool2d": Rule(_pool("MAX_POOL_2D")),
    "avg_pool2d": Rule(_pool("AVERAGE_POOL_2D")),
    "mean": Rule(_reduce("MEAN")),
    "reduce_max": Rule(_reduce("REDUCE_MAX")),
    "reshape": Rule(_reshape),
    "transpose": Rule(_transpose, max_rank=6),
    "slice": Rule(_slice, max_rank=5),
    "pad": Rule(_pad, max_rank=5),
    "resize": Rule(_resize),
    "requantize": Rule(_plain("QUANTIZE")),
}
