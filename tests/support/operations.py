"""One graph for each operation and its variants: `GRAPHS`; those with weights in every container: `LINEAR`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kquant.graph.ir import Graph, Node
from tests.support.graphs import chain, conv, dense, depthwise, op, rng

IMAGE = (6, 7, 3)


def two(kind: str, **attrs: object) -> Graph:
    return chain(IMAGE, op(kind, IMAGE, inputs=("x", "y"), **attrs))


def _with_const(kind: str, shape: tuple[int, ...], **attrs: object) -> Graph:
    value = Node(name="c", op="const", shape=shape, weights={"value": rng(5).normal(size=shape).astype(np.float32)})
    return chain(IMAGE, op(kind, IMAGE, inputs=("x", "c"), **attrs), consts=[value])


def _concat() -> Graph:
    return chain(IMAGE, op("concat", (6, 7, 9), inputs=("x", "y", "x"), axis=3))


def _transposed(padding: str, size: tuple[int, int]) -> Graph:
    g = rng(3)
    weights = {"kernel": g.normal(size=(3, 3, 4, 3)).astype(np.float32), "bias": g.normal(size=4).astype(np.float32)}
    node = Node(name="up", op="conv2d_transpose", shape=(None, *size, 4), attrs={"strides": (2, 2), "padding": padding,
                "clip": (0.0, None)}, weights=weights)  # fmt: skip
    return chain(IMAGE, node)


def _affine(shape: tuple[int, ...]) -> Graph:
    g, c = rng(4), shape[-1]
    weights = {"scale": g.normal(size=c).astype(np.float32), "offset": g.normal(size=c).astype(np.float32)}
    return chain(
        shape, Node(name="affine", op="affine", shape=(None, *shape), attrs={"clip": (0.0, 6.0)}, weights=weights)
    )


def _prelu() -> Graph:
    alpha = rng(2).uniform(-0.5, 1.0, (1, 1, 3)).astype(np.float32)
    return chain(IMAGE, Node(name="prelu", op="prelu", shape=(None, *IMAGE), weights={"alpha": alpha}))


def _pool(kind: str, padding: str) -> Graph:
    size = (3, 4) if padding == "same" else (2, 3)
    return chain(IMAGE, op(kind, (*size, 3), pool_size=(3, 2), strides=(2, 2), padding=padding))


def _pad(mode: str, value: float = 0.0) -> Graph:
    return chain(IMAGE, op("pad", (9, 10, 3), paddings=((0, 0), (1, 2), (2, 1), (0, 0)), mode=mode, value=value))


def _resize(method: str, half: bool) -> Graph:
    return chain(IMAGE, op("resize", (12, 9, 3), size=(12, 9), method=method, half_pixel_centers=half))


def _relu(lo: float | None, hi: float | None) -> Graph:
    return chain(IMAGE, op("clip", IMAGE, lo=lo, hi=hi))


def _function(*steps: tuple[str | float, ...]) -> Graph:
    return chain(IMAGE, op("function", IMAGE, steps=steps))


OUT = (None, 6, 7, 4)
GRAPHS: dict[str, Callable[[], Graph]] = {
    "conv": lambda: chain(IMAGE, conv(shape=OUT)),
    "conv_relu": lambda: chain(IMAGE, conv(shape=OUT, clip=(0.0, None))),
    "conv_relu6": lambda: chain(IMAGE, conv(shape=OUT, clip=(0.0, 6.0))),
    "conv_stride_valid": lambda: chain(IMAGE, conv(shape=(None, 2, 3, 4), strides=(2, 2), padding="valid")),
    "conv_dilated": lambda: chain(IMAGE, conv(shape=(None, 2, 3, 4), dilation=(2, 2), padding="valid")),
    "conv_groups": lambda: chain(IMAGE, conv(shape=(None, 6, 7, 6), cout=6, groups=3)),
    "depthwise": lambda: chain(IMAGE, depthwise(shape=(None, *IMAGE), clip=(0.0, None))),
    "depthwise_multiplier": lambda: chain(IMAGE, depthwise(m=2, shape=(None, 3, 4, 6), strides=(2, 2))),
    "depthwise_dilated": lambda: chain(IMAGE, depthwise(shape=(None, *IMAGE), dilation=(2, 2))),
    "dense": lambda: chain((10,), dense(cin=10, cout=5, clip=(0.0, None))),
    "dense_rank4": lambda: chain(IMAGE, dense(cin=3, cout=5, shape=(None, 6, 7, 5))),
    "transposed_same": lambda: _transposed("same", (12, 14)),
    "transposed_valid": lambda: _transposed("valid", (13, 15)),
    "affine_rank4": lambda: _affine(IMAGE),
    "affine_rank2": lambda: _affine((5,)),
    "affine_rank3": lambda: _affine((6, 5)),
    "affine_rank5": lambda: _affine((2, 3, 2, 5)),
    "prelu": _prelu,
    "add": lambda: two("add"),
    "add_relu": lambda: two("add", clip=(0.0, None)),
    "add_const": lambda: _with_const("add", (3,)),
    "sub": lambda: two("sub", clip=(0.0, 6.0)),
    "sub_const": lambda: _with_const("sub", (7, 3)),
    "mul": lambda: two("mul"),
    "mul_const": lambda: _with_const("mul", (1, 1, 3), clip=(-1.0, 1.0)),
    "batch_matmul": lambda: chain((2, 5, 5), op("batch_matmul", (2, 5, 5), inputs=("x", "y"))),
    "batch_matmul_adjoint": lambda: chain((2, 5, 6), op("batch_matmul", (2, 5, 5), inputs=("x", "y"), adjoint=True)),
    "maximum": lambda: two("maximum"),
    "minimum_const": lambda: _with_const("minimum", (3,)),
    "concat": _concat,
    "relu": lambda: _relu(0.0, None),
    "relu6": lambda: _relu(0.0, 6.0),
    "clip": lambda: _relu(-0.4, 0.7),
    "clip_floor": lambda: _relu(-0.4, None),
    "leaky_relu": lambda: chain(IMAGE, op("leaky_relu", IMAGE, alpha=0.2)),
    "logistic": lambda: chain(IMAGE, op("logistic", IMAGE)),
    "tanh": lambda: chain(IMAGE, op("tanh", IMAGE)),
    "softmax": lambda: chain(IMAGE, op("softmax", IMAGE)),
    "rsqrt": lambda: chain(IMAGE, op("mul", IMAGE, inputs=("x", "x")), op("rsqrt", IMAGE)),
    "gelu": lambda: chain(IMAGE, op("gelu", IMAGE, approximate=False)),
    "elu": lambda: chain(IMAGE, op("elu", IMAGE)),
    "hard_swish": lambda: chain(IMAGE, op("hard_swish", IMAGE)),
    "function": lambda: _function(("exp", 0), ("add", 1, 1.0), ("log", 2), ("tanh", 3), ("mul", 0, 4)),
    "function_jumps": lambda: _function(("floor", 0), ("greater", 0, 0.3), ("select", 2, 0, -0.7), ("add", 1, 3)),
    "function_infinite": lambda: _function(("add", 0, 5.0), ("div", 1.0, 1), ("abs", 0), ("sqrt", 3), ("sub", 2, 4)),
    "max_pool_same": lambda: _pool("max_pool2d", "same"),
    "max_pool_valid": lambda: _pool("max_pool2d", "valid"),
    "avg_pool_same": lambda: _pool("avg_pool2d", "same"),
    "avg_pool_valid": lambda: _pool("avg_pool2d", "valid"),
    "window_mean_valid": lambda: _pool("window_mean", "valid"),
    "window_mean_zeros": lambda: _pool("window_mean", "same"),
    "mean": lambda: chain(IMAGE, op("mean", (3,), axes=(1, 2), keepdims=False)),
    "mean_keepdims": lambda: chain(IMAGE, op("mean", (6, 1, 3), axes=(2,), keepdims=True)),
    "reduce_max": lambda: chain(IMAGE, op("reduce_max", (3,), axes=(1, 2), keepdims=False)),
    "reduce_min": lambda: chain(IMAGE, op("reduce_min", (6, 1, 3), axes=(2,), keepdims=True)),
    "gather": lambda: chain(IMAGE, op("gather", (6, 9, 3), axis=2, indices=(6, 0, 1, 1, 1, 3, 5, 2, 4))),
    "gather_channels": lambda: chain(IMAGE, op("gather", (6, 7, 4), axis=3, indices=(2, 0, 1, 1))),
    "top_k": lambda: chain(IMAGE, op("top_k", (6, 7, 2), k=2)),
    "reshape": lambda: chain(IMAGE, op("reshape", (42, 3))),
    "transpose": lambda: chain(IMAGE, op("transpose", (3, 6, 7), perm=(0, 3, 1, 2))),
    "slice": lambda: chain(
        IMAGE, op("slice", (2, 6, 2), begin=(0, 1, None, 0), end=(None, 5, -1, 2), strides=(1, 2, 1, 1))
    ),
    "pad": lambda: _pad("constant"),
    "pad_value": lambda: _pad("constant", -0.7),
    "pad_reflect": lambda: _pad("reflect"),
    "pad_symmetric": lambda: _pad("symmetric"),
    "nearest": lambda: _resize("nearest", True),
    "nearest_corner": lambda: _resize("nearest", False),
    "bilinear": lambda: _resize("bilinear", True),
    "bilinear_corner": lambda: _resize("bilinear", False),
}  # fmt: skip
INT8_ONLY = {"prelu", "gelu", "elu", "hard_swish", "function", "function_jumps", "function_infinite"}


def _linear_transposed() -> Graph:
    g = rng(3)
    weights = {"kernel": g.normal(size=(3, 3, 4, 3)).astype(np.float32), "bias": g.normal(size=4).astype(np.float32)}
    attrs = {"strides": (2, 2), "padding": "same"}
    return chain(IMAGE, Node(name="up", op="conv2d_transpose", shape=(None, 12, 14, 4), attrs=attrs, weights=weights))


def _linear_affine() -> Graph:
    g = rng(4)
    weights = {"scale": g.normal(size=3).astype(np.float32), "offset": g.normal(size=3).astype(np.float32)}
    return chain(IMAGE, Node(name="affine", op="affine", shape=(None, *IMAGE), weights=weights))


LINEAR: dict[str, Callable[[], Graph]] = {
    "conv": lambda: chain(IMAGE, conv(shape=(None, 6, 7, 4), clip=(0.0, None))),
    "groups": lambda: chain(IMAGE, conv(shape=(None, 6, 7, 6), cout=6, groups=3)),
    "depthwise": lambda: chain(IMAGE, depthwise(m=2, shape=(None, 6, 7, 6))),
    "dense": lambda: chain((11,), dense(cin=11, cout=5)),
    "dense_rank3": lambda: chain((4, 11), dense(cin=11, cout=5, shape=(None, 4, 5))),
    "transposed": _linear_transposed,
    "affine": _linear_affine,
}
