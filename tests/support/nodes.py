"""A node of every operation (several of some) with arrays to run it on: `EXAMPLES`, those with weights in `LINEAR`."""

from __future__ import annotations

from typing import Any

import numpy as np

from kquant.graph.ir import Node
from kquant.graph.ops import OPS, compute

Example = tuple[Node, list[np.ndarray]]
IMAGE = (5, 6, 4)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
_RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    """Standard normal float32."""
    return _RNG.normal(size=shape).astype(np.float32)


def example(
    op: str,
    *shapes: tuple[int, ...],
    shape: Any = None,
    weights: dict[str, tuple[int, ...]] | None = None,
    **attrs: Any,
) -> Example:
    """A node that reads arrays of these shapes (without the batch), with random weights."""
    xs = [normal(2, *s) for s in shapes]
    node = Node(
        name="n",
        op=op,
        inputs=tuple("abc"[: len(shapes)]),
        attrs=attrs,
        shape=shape or (),
        weights={k: normal(*s) for k, s in (weights or {}).items()},
    )
    return (node if shape else node.with_(shape=(None, *compute(node, xs).shape[1:]))), xs


def conv(op: str, kernel: tuple[int, ...], outputs: int, shape: Any = None, **attrs: Any) -> Example:
    """A convolution of an `IMAGE`."""
    settings = {"strides": (1, 1), "padding": "valid", "dilation": (1, 1)} | attrs
    return example(op, IMAGE, shape=shape, weights={"kernel": kernel, "bias": (outputs,)}, **settings)


LINEAR: dict[str, Example] = {
    "conv2d": conv("conv2d", (3, 2, 4, 5), 5, groups=1, dilation=(2, 1)),
    "conv2d, same": conv("conv2d", (3, 2, 4, 5), 5, groups=1, padding="same", strides=(2, 2)),
    "conv2d, groups": conv("conv2d", (2, 2, 2, 6), 6, groups=2),
    "depthwise_conv2d": conv("depthwise_conv2d", (3, 3, 4, 1), 4, strides=(2, 2)),
    "depthwise_conv2d, same": conv("depthwise_conv2d", (2, 3, 4, 2), 8, padding="same"),
    "conv2d_transpose": conv(
        "conv2d_transpose", (3, 2, 5, 4), 5, shape=(None, 10, 12, 5), strides=(2, 2), padding="same"
    ),
    "dense": example("dense", (3, 6), weights={"kernel": (6, 5), "bias": (5,)}),
    "affine": example("affine", IMAGE, weights={"scale": (4,), "offset": (4,)}),
}
_POOL = {"pool_size": (2, 3), "strides": (2, 2)}
_PADS = ((0, 0), (1, 2), (0, 1), (0, 0))
_SLICE = {"begin": (0, 1, 0, 0), "end": (None, 5, 6, 4), "strides": (1, 2, 1, 1)}
_NORMALIZE = {"scale": (4,), "gamma": (4,), "beta": (4,)}
_CHANNELS = {"begin": (0, 0, 0, 1), "end": (None, 5, 6, 4), "strides": (1, 1, 1, 2)}
EXAMPLES: dict[str, Example] = {
    **LINEAR,
    "const": (Node(name="n", op="const", shape=(4,), weights={"value": normal(4)}), []),
    "requantize": example("requantize", IMAGE),
    "train_only": example("train_only", IMAGE, user_shape=(None, *IMAGE), scale=None, offset=None, drops=True),
    "embedding": (
        Node(name="n", op="embedding", inputs=("ids",), shape=(None, 3, 5), weights={"table": normal(7, 5)}),
        [np.asarray([[0, 6, 2], [1, 1, 5]], np.int32)],
    ),
    **{op: example(op, IMAGE, IMAGE) for op in ("add", "sub", "mul", "maximum", "minimum")},
    "batch_matmul": example("batch_matmul", (3, 4), (4, 5)),
    "batch_matmul, adjoint": example("batch_matmul", (3, 4), (5, 4), adjoint=True),
    "clip": example("clip", IMAGE, lo=0.0, hi=None),
    "clip, both": example("clip", IMAGE, lo=-0.5, hi=0.8),
    "leaky_relu": example("leaky_relu", IMAGE, alpha=0.1),
    "prelu": example("prelu", IMAGE, weights={"alpha": (1, 6, 4)}),
    **{op: example(op, IMAGE) for op in ("logistic", "tanh", "elu", "hard_swish", "softmax")},
    "rsqrt": (Node(name="n", op="rsqrt", inputs=("a",), shape=(None, *IMAGE)), [np.square(normal(2, *IMAGE)) + 0.1]),
    "normalize": example("normalize", IMAGE, weights=_NORMALIZE, center=True, epsilon=0.1, limit=False),
    "normalize, length": example("normalize", IMAGE, weights=_NORMALIZE, center=False, epsilon=0.1, limit=True),
    "function": example("function", IMAGE, steps=(("exp", 0), ("add", 1, 1.0), ("log", 2), ("mul", 0, 3))),
    "function, jumps": example("function", IMAGE, steps=(("greater", 0, 0.25), ("select", 1, 0, -0.5))),
    "select": (
        Node(name="n", op="select", inputs=("c", "a", "b"), shape=(None, *IMAGE)),
        [normal(2, *IMAGE) > 0, normal(2, *IMAGE), normal(2, *IMAGE)],
    ),
    "gelu": example("gelu", IMAGE, approximate=True),
    "max_pool2d": example("max_pool2d", IMAGE, padding="same", **_POOL),
    "avg_pool2d": example("avg_pool2d", IMAGE, padding="same", **_POOL),
    "avg_pool2d, all": example("avg_pool2d", IMAGE, padding="valid", pool_size=(5, 6), strides=(1, 1)),
    "window_mean": example("window_mean", IMAGE, padding="valid", **_POOL),
    "window_mean, zeros": example("window_mean", IMAGE, padding="same", **_POOL),
    "mean": example("mean", IMAGE, axes=(1, 2), keepdims=False),
    "mean, channels": example("mean", IMAGE, axes=(3,), keepdims=True),
    "reduce_max": example("reduce_max", IMAGE, axes=(1,), keepdims=True),
    "reduce_min": example("reduce_min", IMAGE, axes=(1,), keepdims=True),
    **{op: (node.with_(dtype="int32"), xs) for op in ("argmax", "argmin") for node, xs in [example(op, IMAGE, axis=2)]},
    "top_k": example("top_k", IMAGE, k=3),
    "top_k_indices": (example("top_k_indices", IMAGE, k=3)[0].with_(dtype="int32"), [normal(2, *IMAGE)]),
    "gather": example("gather", IMAGE, axis=1, indices=(4, 0, 2)),
    "gather, channels": example("gather", IMAGE, axis=3, indices=(3, 1, 1, 0, 2)),
    "take_along": (
        Node(name="n", op="take_along", inputs=("a", "ids"), shape=(None, 3, 2)),
        [normal(2, 3, 4), np.asarray([[[0, 3], [1, 1], [2, 0]]] * 2, np.int32)],
    ),
    "reshape": example("reshape", IMAGE, shape=(None, 30, 4)),
    "reshape, flat": example("reshape", IMAGE, shape=(None, 120)),
    "transpose": example("transpose", IMAGE, perm=(0, 2, 1, 3)),
    "transpose, channels": example("transpose", IMAGE, perm=(0, 3, 1, 2)),
    "slice": example("slice", IMAGE, **_SLICE),
    "slice, channels": example("slice", IMAGE, **_CHANNELS),
    "pad": example("pad", IMAGE, paddings=_PADS, mode="constant", value=0.0),
    "pad, value": example("pad", IMAGE, paddings=_PADS, mode="constant", value=1.5),
    "pad, reflect": example("pad", IMAGE, paddings=_PADS, mode="reflect", value=0.0),
    "concat": example("concat", IMAGE, (5, 6, 2), axis=3),
    "concat, rows": example("concat", IMAGE, (3, 6, 4), axis=1),
    "resize": example("resize", IMAGE, size=(7, 6), method="bilinear", half_pixel_centers=True),
    "resize, nearest": example("resize", IMAGE, size=(7, 6), method="nearest", half_pixel_centers=True),
}
assert {node.op for node, _ in EXAMPLES.values()} == set(OPS) - {"input", "float"}
