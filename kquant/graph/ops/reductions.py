"""Averages, maxima and minima over places, and where they are.

| op | attrs | weights |
| --- | --- | --- |
| max_pool2d, avg_pool2d | pool_size, strides, padding ("same" or "valid") | |
| window_mean | pool_size, strides, padding, whose zeros count | |
| mean, reduce_max, reduce_min | axes (positive, never the batch), keepdims | |
| argmax, argmin | axis (positive) | |
| top_k, top_k_indices | k: how many of the last axis | |

An average pooling is on the grid of its input, a mean on a grid of its own. An average needs smaller steps than what it
averages, most of all where the input has few bits, so that a pooling of whole images becomes a mean, and one of windows
a window_mean when it is quantized (`transforms/average_windows.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node, Shape
from kquant.graph.moments import POINTS, Moments, phi, regroup
from kquant.graph.ops.record import Op, Tensor, Tie, collect, same_moments
from kquant.graph.scaling import Array, Channels, Scaling

WINDOW = 0.5  # correlation of the places of a maximum,
PLACES = 0.25  # and of a mean, which are farther apart


def _keeps_channels(node: Node, source: Shape) -> bool:
    return len(source) - 1 not in node.attrs.get("axes", ())


def _average_behind(node: Node, source: Shape, s: Scaling) -> Scaling | None:
    return s if _keeps_channels(node, source) else None


def _maximum_behind(node: Node, source: Shape, s: Scaling) -> Scaling | None:
    return s if _keeps_channels(node, source) and (s.scale > 0).all() else None


def _average_in_front(node: Node, sources: Sequence[Shape], s: Scaling) -> Sequence[Scaling] | None:
    return None if _average_behind(node, sources[0], s) is None else (s.without_stats(),)


def _maximum_in_front(node: Node, sources: Sequence[Shape], s: Scaling) -> Sequence[Scaling] | None:
    return None if _maximum_behind(node, sources[0], s) is None else (s.without_stats(),)


def _counts_no_zeros(node: Node) -> bool:
    return str(node.attrs["padding"]) == "valid"


def _window_behind(node: Node, source: Shape, s: Scaling) -> Scaling | None:
    return s if _counts_no_zeros(node) or not s.offset.any() else None


def _window_in_front(node: Node, sources: Sequence[Shape], s: Scaling) -> Sequence[Scaling] | None:
    return None if _window_behind(node, sources[0], s) is None else (s.without_stats(),)


def _constant_of_window(node: Node, x: Array) -> Array:
    return x if _counts_no_zeros(node) else np.where(x == 0, x, np.nan)


def inside(node: Node, source: Shape) -> Array:
    """How many places of each window of a pooling are in the image, [1, rows, columns, 1]."""
    lines = []
    for axis, (size, stride) in enumerate(zip(node.attrs["pool_size"], node.attrs["strides"], strict=True), 1):
        length = int(source[axis] or 0)
        padded = str(node.attrs["padding"]) == "same"
        count = -(-length // stride) if padded else (length - size) // stride + 1
        before = max((count - 1) * stride + size - length, 0) // 2 if padded else 0
        first = np.arange(count) * stride - before
        lines.append(np.minimum(first + size, length) - np.maximum(first, 0))
    return np.multiply.outer(*lines)[None, :, :, None]


def _window_mean(node: Node, x: Tensor) -> Tensor:
    share = (inside(node, x.shape) / np.prod(node.attrs["pool_size"])).astype(np.float32)
    return tf.nn.avg_pool2d(x, node.attrs["pool_size"], node.attrs["strides"], _padding(node)) * share


AVERAGE = Channels(behind=_average_behind, in_front=_average_in_front, offset=lambda node: True)
MAXIMUM = Channels(behind=_maximum_behind, in_front=_maximum_in_front, offset=lambda node: True)


def _largest(x: Moments, count: int) -> Moments:
    """The maximum of `count` normal variables of correlation rho: mean + sqrt(1 - rho) std E[max of N(0, 1)]."""
    cdf = phi(POINTS[:, 0])
    most = float((POINTS[1:, 0] + POINTS[:-1, 0]) @ np.diff(cdf**count)) / 2
    mean = np.clip(x.mean + np.sqrt(1 - WINDOW) * most * x.std, x.low, x.high)
    return Moments(mean, x.std, x.low, x.high)


def _max_pool(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    return _largest(xs[0], int(np.prod(node.attrs["pool_size"])))


def _reduce_max(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    return _largest(_merged(node, sources, xs), _count(node, sources))


def _reduce_min(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    return _negative(_largest(_negative(_merged(node, sources, xs)), _count(node, sources)))


def _negative(x: Moments) -> Moments:
    return Moments(-x.mean, x.std, -x.high, -x.low)


def _places(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    """Every index is as likely."""
    count = int(sources[0].shape[node.attrs.get("axis", -1)] or 1)
    return Moments.sample(np.repeat(np.arange(count)[:, None], int(node.shape[-1] or 1), 1))


def _top(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    return regroup(xs[0], 1, node.shape[-1])


def _mean(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    """The mean of n places of correlation rho has variance (1 / n + (1 - 1 / n) rho) Var[x]."""
    count, x = _count(node, sources), _merged(node, sources, xs)
    return Moments(x.mean, x.std * np.sqrt(PLACES + (1 - PLACES) / count), x.low, x.high)


def _merged(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    """In front of a reduction, with the channels of its output."""
    return xs[0] if _keeps_channels(node, sources[0].shape) else regroup(xs[0], 1, node.shape[-1])


def _count(node: Node, sources: Sequence[Node]) -> int:
    return int(np.prod([sources[0].shape[a] or 1 for a in node.attrs["axes"]]))


def _mean_of_all(node: Node, source: Shape) -> Node | None:
    """A mean in place of a pooling of whole images."""
    if node.attrs["padding"] != "valid" or tuple(node.attrs["pool_size"]) != source[1:3]:
        return None
    return node.with_(op="mean", attrs={"axes": (1, 2), "keepdims": True})


def _padding(node: Node) -> str:
    return str(node.attrs["padding"].upper())


RECORDS = collect(
    Op(
        name="max_pool2d",
        compute=lambda n, xs, w: tf.nn.max_pool2d(xs[0], n.attrs["pool_size"], n.attrs["strides"], _padding(n)),
        grid=Tie.OF_INPUT,
        channels=MAXIMUM,
        moments=_max_pool,
        largest=True,
    ),
    Op(
        name="avg_pool2d",
        compute=lambda n, xs, w: tf.nn.avg_pool2d(xs[0], n.attrs["pool_size"], n.attrs["strides"], _padding(n)),
        grid=Tie.OF_INPUT,
        averages=True,
        apart="window_mean",
        channels=AVERAGE,
        moments=same_moments,
        simpler=_mean_of_all,
    ),
    Op(
        name="window_mean",
        compute=lambda n, xs, w: _window_mean(n, xs[0]),
        channels=Channels(
            behind=_window_behind, in_front=_window_in_front, offset=_counts_no_zeros, constant=_constant_of_window
        ),
        moments=same_moments,
    ),
    Op(
        name="mean",
        compute=lambda n, xs, w: tf.reduce_mean(xs[0], n.attrs["axes"], n.attrs["keepdims"]),
        channels=AVERAGE,
        moments=_mean,
    ),
    Op(
        name="reduce_max",
        compute=lambda n, xs, w: tf.reduce_max(xs[0], n.attrs["axes"], n.attrs["keepdims"]),
        grid=Tie.OF_INPUT,
        channels=MAXIMUM,
        moments=_reduce_max,
        largest=True,
    ),
    Op(
        name="reduce_min",
        compute=lambda n, xs, w: tf.reduce_min(xs[0], n.attrs["axes"], n.attrs["keepdims"]),
        grid=Tie.OF_INPUT,
        channels=MAXIMUM,
        moments=_reduce_min,
    ),
    Op(
        name="argmax",
        compute=lambda n, xs, w: tf.argmax(xs[0], n.attrs["axis"], tf.int32),
        moments=_places,
    ),
    Op(
        name="argmin",
        compute=lambda n, xs, w: tf.argmin(xs[0], n.attrs["axis"], tf.int32),
        moments=_places,
    ),
    Op(
        name="top_k",
        compute=lambda n, xs, w: tf.math.top_k(xs[0], n.attrs["k"]).values,
        grid=Tie.OF_INPUT,
        moments=_top,
    ),
    Op(
        name="top_k_indices",
        compute=lambda n, xs, w: tf.math.top_k(xs[0], n.attrs["k"]).indices,
        moments=_places,
    ),
)
