"""Operations that move, select, join and interpolate values.

| op | attrs | weights |
| --- | --- | --- |
| reshape | (the node's shape) | |
| transpose | perm (perm[0] == 0) | |
| slice | begin, end, strides (full rank, the batch entry is 0, None, 1) | |
| pad | paddings (full rank), mode constant / reflect / symmetric, value | |
| concat | axis (positive) | |
| gather | axis (positive, not the batch), indices: of the entries along it | |
| take_along | two inputs: the last axis of the second has indices along that axis of the first | |
| resize | size (h, w), method nearest / bilinear, half_pixel_centers | |
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node, Shape
from kquant.graph.moments import Array, Moments, joined, regroup
from kquant.graph.ops.record import Op, Tensor, Tie, collect, same_moments
from kquant.graph.ops.reductions import AVERAGE
from kquant.graph.scaling import Channels, Scaling

# Stands for minus infinity where only the largest value counts: below every value, and sums of it are finite.
LOWEST = -3e26


def pads_zeros(node: Node) -> bool:
    """Whether it puts zeros beside its input."""
    return node.op == "pad" and node.attrs["mode"] == "constant" and not node.attrs.get("value")


def pads_lowest(node: Node) -> bool:
    """Whether it puts `LOWEST` beside its input: values that no maximum takes."""
    return node.op == "pad" and node.attrs["mode"] == "constant" and (node.attrs.get("value") or 0.0) <= LOWEST


# reshape


def _reshape_in_front(node: Node, sources: Sequence[Shape], s: Scaling) -> Sequence[Scaling] | None:
    moved = s.tile(sources[0][-1])
    return None if moved is None else (moved,)


def _reshape_moments(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    old, new = len(xs[0].mean), int(node.shape[-1] or 1)
    return regroup(xs[0], int(np.gcd(old, new)), new)


# transpose


def _channels_stay_last(node: Node, source: Shape) -> bool:
    return bool(node.attrs["perm"][-1] == len(source) - 1)


def _transpose_behind(node: Node, source: Shape, s: Scaling) -> Scaling | None:
    return s if _channels_stay_last(node, source) else None


def _transpose_in_front(node: Node, sources: Sequence[Shape], s: Scaling) -> Sequence[Scaling] | None:
    return (s,) if _channels_stay_last(node, sources[0]) else None


def _transpose_moments(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    return xs[0] if _channels_stay_last(node, node.shape) else regroup(xs[0], 1, node.shape[-1])


# slice


def _slice(n: Node, xs: Sequence[Tensor], w: Mapping[str, Tensor]) -> Tensor:
    a = n.attrs
    return xs[0][tuple(slice(b, e, s) for b, e, s in zip(a["begin"], a["end"], a["strides"], strict=True))]


def _last(node: Node) -> slice:
    return slice(*(node.attrs[k][-1] for k in ("begin", "end", "strides")))


def _slice_in_front(node: Node, sources: Sequence[Shape], s: Scaling) -> Sequence[Scaling] | None:
    return None if sources[0][-1] != node.shape[-1] else (s.without_stats(),)


def _slice_unchanged(node: Node, source: Shape) -> bool:
    return node.shape == source and all(s == 1 for s in node.attrs["strides"])


# pad


def _pad(n: Node, xs: Sequence[Tensor], w: Mapping[str, Tensor]) -> Tensor:
    return tf.pad(xs[0], n.attrs["paddings"], n.attrs["mode"].upper(), n.attrs.get("value", 0.0))


def _pad_carry(node: Node, index: Array) -> Array | None:
    commutes = pads_zeros(node) or node.attrs["mode"] != "constant" or pads_lowest(node)
    return index if commutes and not any(node.attrs["paddings"][-1]) else None


def _pad_constant(node: Node, x: Array) -> Array:
    return np.where(x == 0, x, np.nan) if node.attrs["mode"] == "constant" else x  # zeros beside it


def _pad_moments(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    x, paddings, source = xs[0], node.attrs["paddings"], sources[0].shape
    if node.attrs["mode"] != "constant":
        return x.map(lambda v: np.pad(v, paddings[-1], mode=node.attrs["mode"]))
    value = float(node.attrs.get("value") or 0.0)
    if pads_lowest(node):
        return x
    within = np.prod([(s or 1) / (t or 1) for s, t in zip(source[1:-1], node.shape[1:-1], strict=True)])
    if within < 1:
        x = Moments.mixture([x, Moments.normal(np.full_like(x.mean, value), 0 * x.std)], [within, 1 - within])
    front, back = (Moments.normal(np.full(n, value), np.zeros(n)) for n in paddings[-1])
    return joined([front, x, back])


# concat


def _concat_in_front(node: Node, sources: Sequence[Shape], s: Scaling) -> Sequence[Scaling]:
    if node.attrs["axis"] != len(node.shape) - 1:
        return [s] * len(sources)
    edges = np.cumsum([0, *(int(shape[-1] or 0) for shape in sources)])
    return [s.select(slice(lo, hi)) for lo, hi in itertools.pairwise(edges)]


def _concat_moments(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    if node.attrs["axis"] != len(node.shape) - 1:
        sizes = np.asarray([p.shape[node.attrs["axis"]] for p in sources], np.float64)
        return Moments.mixture(xs, sizes / sizes.sum())
    return joined(xs)


# resize


def _resize(n: Node, xs: Sequence[Tensor], w: Mapping[str, Tensor]) -> Tensor:
    name = "ResizeBilinear" if n.attrs["method"] == "bilinear" else "ResizeNearestNeighbor"
    return getattr(tf.raw_ops, name)(
        images=xs[0], size=n.attrs["size"], half_pixel_centers=n.attrs["half_pixel_centers"]
    )


# gather


def _gathers_channels(node: Node) -> bool:
    return bool(node.attrs["axis"] == len(node.shape) - 1)


def _gather_behind(node: Node, source: Shape, s: Scaling) -> Scaling:
    return s.select(np.asarray(node.attrs["indices"])) if _gathers_channels(node) else s


def _gather_in_front(node: Node, sources: Sequence[Shape], s: Scaling) -> Sequence[Scaling] | None:
    return None if _gathers_channels(node) else (s.without_stats(),)


def _gather_moments(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    return xs[0].map(lambda v: v[list(node.attrs["indices"])]) if _gathers_channels(node) else xs[0]


def _gather_unchanged(node: Node, source: Shape) -> bool:
    return list(node.attrs["indices"]) == list(range(int(source[node.attrs["axis"]] or 0)))


def _take_along(n: Node, xs: Sequence[Tensor], w: Mapping[str, Tensor]) -> Tensor:
    axis = len(xs[1].shape) - 1
    return tf.gather(xs[0], tf.cast(xs[1], tf.int32), axis=axis, batch_dims=axis)


def _taken(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    rows = len(sources[1].shape) < len(node.shape)
    return xs[0] if rows else regroup(xs[0], 1, node.shape[-1])


RECORDS = collect(
    Op(
        name="reshape",
        compute=lambda n, xs, w: tf.reshape(xs[0], (-1, *n.shape[1:])),
        grid=Tie.OF_INPUT,
        channels=Channels(
            behind=lambda node, source, s: s.tile(node.shape[-1]),
            in_front=_reshape_in_front,
            offset=lambda node: True,
        ),
        moments=_reshape_moments,
        unchanged=lambda node, source: node.shape == source,  # then a sample has as many entries, too
        merge=lambda first, node: node.with_(inputs=first.inputs),
    ),
    Op(
        name="transpose",
        compute=lambda n, xs, w: tf.transpose(xs[0], n.attrs["perm"]),
        grid=Tie.OF_INPUT,
        channels=Channels(behind=_transpose_behind, in_front=_transpose_in_front, offset=lambda node: True),
        moments=_transpose_moments,
        unchanged=lambda node, source: tuple(node.attrs["perm"]) == tuple(range(len(node.shape))),
        merge=lambda first, node: node.with_(inputs=first.inputs).with_attrs(
            perm=tuple(first.attrs["perm"][p] for p in node.attrs["perm"])
        ),
    ),
    Op(
        name="slice",
        compute=_slice,
        grid=Tie.OF_INPUT,
        channels=Channels(
            behind=lambda node, source, s: s.select(_last(node)), in_front=_slice_in_front, offset=lambda node: True
        ),
        moments=lambda node, sources, xs: xs[0].map(lambda v: v[_last(node)]),
        unchanged=_slice_unchanged,
    ),
    Op(
        name="pad",
        compute=_pad,
        grid=Tie.OF_INPUT,
        inserts="value",
        channels=Channels(
            carry=_pad_carry,
            offset=lambda node: node.attrs["mode"] != "constant" or pads_lowest(node),
            constant=_pad_constant,
        ),
        moments=_pad_moments,
        unchanged=lambda node, source: not np.any(node.attrs["paddings"]),
    ),
    Op(
        name="concat",
        compute=lambda n, xs, w: tf.concat(xs, n.attrs["axis"]),
        grid=Tie.SHARED,
        channels=Channels(in_front=_concat_in_front),
        moments=_concat_moments,
    ),
    Op(
        name="gather",
        compute=lambda n, xs, w: tf.gather(xs[0], n.attrs["indices"], axis=n.attrs["axis"]),
        grid=Tie.OF_INPUT,
        channels=Channels(behind=_gather_behind, in_front=_gather_in_front, offset=lambda node: True),
        moments=_gather_moments,
        unchanged=_gather_unchanged,
    ),
    Op(
        name="take_along",
        compute=_take_along,
        selects=True,
        grid=Tie.OF_INPUT,
        moments=_taken,
    ),
    Op(name="resize", compute=_resize, grid=Tie.OF_INPUT, averages=True, channels=AVERAGE, moments=same_moments),
)
