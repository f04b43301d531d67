"""Operations that are linear in their input, with trained weights or not, and the look-up in a trained table.

| op | attrs | weights |
| --- | --- | --- |
| conv2d | strides, padding, dilation, groups | kernel [h, w, cin / groups, cout], bias [cout] |
| depthwise_conv2d | strides, padding, dilation | kernel [h, w, c, m], bias [c * m] |
| conv2d_transpose | strides, padding | kernel [h, w, cout, cin], bias [cout] |
| dense | | kernel [cin, cout], bias [cout]; contracts the last axis, any rank |
| affine | | scale [c], offset [c]: x * scale + offset on the last axis (batch norm at inference) |
| embedding | clamp (or false): ids beyond the last row read it | table [rows, depth]; reads int32 ids |
| batch_matmul | adjoint (or false) | two inputs [..., n, k], [..., k, m], the same in front: their products |

The second input of an adjoint batch_matmul is [..., m, k].
padding is "same" or "valid". conv2d_transpose produces the node's own shape (output padding). The kernel of a depthwise
convolution is quantized as [h, w, c * m], since each of the c * m outputs has a scale of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node, Shape
from kquant.graph.moments import SIGMAS, Array, Moments
from kquant.graph.ops.blocks import Linear
from kquant.graph.ops.functions import Program
from kquant.graph.ops.record import Op, Tensor, Weight, collect
from kquant.graph.scaling import Channels, Scaling

Tensors = Mapping[str, Tensor]


def _padding(node: Node) -> str:
    return str(node.attrs["padding"].upper())


def _conv2d(n: Node, xs: Sequence[Tensor], w: Tensors) -> Tensor:
    a = n.attrs
    y = tf.nn.convolution(xs[0], w["kernel"], strides=a["strides"], padding=_padding(n), dilations=a["dilation"])
    return y + w["bias"]


def _depthwise(n: Node, xs: Sequence[Tensor], w: Tensors) -> Tensor:
    (x,), (sh, sw) = xs, n.attrs["strides"]
    if sh == sw:
        y = tf.nn.depthwise_conv2d(x, w["kernel"], (1, sh, sw, 1), _padding(n), dilations=n.attrs["dilation"])
    else:  # the kernel takes equal strides only: a grouped convolution computes the same
        h, k, c, m = w["kernel"].shape
        kernel = tf.reshape(w["kernel"], (h, k, 1, c * m))
        y = tf.nn.convolution(x, kernel, strides=(sh, sw), padding=_padding(n), dilations=n.attrs["dilation"])
    return y + w["bias"]


def _transposed(n: Node, xs: Sequence[Tensor], w: Tensors) -> Tensor:
    shape = tf.concat([tf.shape(xs[0])[:1], tf.constant(n.shape[1:], tf.int32)], 0)
    return tf.nn.conv2d_transpose(xs[0], w["kernel"], shape, n.attrs["strides"], _padding(n)) + w["bias"]


def _moments(
    linear: Linear, key: str, bias: str, node: Node, sources: Sequence[Node], xs: Sequence[Moments]
) -> Moments:
    """mean W E[x] + b, variance W^2 Var[x]; it reaches as far as the largest of three guesses.

    Distances of the inputs from their means to low and high, added in squares; `SIGMAS` standard deviations; and all
    inputs one standard deviation off, to the same effect: so far the logits of a clear image lie apart. The plain sum
    of the distances is the limit.
    """
    (x,), w = xs, node.weights[key].astype(np.float64)
    shares, contract = linear.shares(node, sources[0].shape, w), partial(linear.contract, node)
    mean = contract(w, x.mean, shares) + node.weights[bias]
    std = np.sqrt(contract(np.square(w), np.square(x.std), shares))
    together = np.maximum(contract(np.abs(w), x.std), SIGMAS * std)
    up, down, plus, minus = x.high - x.mean, x.mean - x.low, np.maximum(w, 0), np.maximum(-w, 0)

    def reach(along: Array, against: Array) -> Array:
        squares = [contract(np.square(v), np.square(d)) for v, d in ((plus, along), (minus, against))]
        possible = contract(plus, along) + contract(minus, against)
        return np.minimum(np.maximum(np.sqrt(squares[0] + squares[1]), together), possible)

    return Moments(mean, std, mean - reach(down, up), mean + reach(up, down))


def _product_moments(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    """Sums of k products of independent numbers: E[a b] = E[a] E[b], Var[a b] = (Va + a^2) (Vb + b^2) - a^2 b^2."""
    a, b = xs
    second = [np.square(x.mean) + np.square(x.std) for x in xs]
    if node.attrs.get("adjoint"):  # the channels of both are summed over; a tensor's own product is its squares
        own, product = len(set(node.inputs)) == 1, a.mean * b.mean
        mean = np.full(node.shape[-1] or 1, (second[0] if own else product).sum())
        return Moments.normal(mean, np.sqrt((second[0] * second[1] - np.square(product)).sum()) * np.ones_like(mean))
    variance = second[0].sum() * second[1] - np.square(a.mean).sum() * np.square(b.mean)
    return Moments.normal(a.mean.sum() * b.mean, np.sqrt(variance))


def _rows(node: Node, xs: Sequence[Tensor], w: Tensors) -> Tensor:
    ids, table = tf.cast(xs[0], tf.int32), w["table"]
    return tf.gather(table, tf.minimum(ids, table.shape[0] - 1) if node.attrs.get("clamp") else ids)


def _into_first(node: Node, sources: Sequence[Shape], s: Scaling) -> Sequence[Scaling] | None:
    """A factor that all entries share, to the first operand."""
    if np.ptp(s.scale) or s.offset.any():
        return None
    sizes = [int(shape[-1] or 0) for shape in sources]
    return Scaling.factors(np.full(sizes[0], s.scale[0])), Scaling.factors(np.ones(sizes[1]))


def _outputs_on_one_axis(w: Any) -> Any:
    """[h, w, c, m] as [h, w, c * m]."""
    reshape = np.reshape if isinstance(w, np.ndarray) else tf.reshape
    return reshape(w, (*w.shape[:2], -1))


def _uniform(node: Node) -> Program | None:
    """An affine that is the same for all channels."""
    factor, offset = (np.unique(node.weights[k]) for k in ("scale", "offset"))
    if len(factor) > 1 or len(offset) > 1:
        return None
    return ("mul", 0, float(factor[0])), ("add", 1, float(offset[0]))


def _op(name: str, compute: Any, linear: Linear, weight: Weight, bias: str = "bias", **facts: Any) -> Op:
    return Op(
        name=name,
        compute=compute,
        weight=weight,
        bias=bias,
        linear=linear,
        fuses_clip=True,
        moments=partial(_moments, linear, weight.name, bias),
        **facts,
    )


RECORDS = collect(
    _op(
        "conv2d",
        _conv2d,
        Linear(groups=lambda n: int(n.attrs["groups"]), window=True),
        Weight(channels=3, fan_in=(0, 1, 2)),
    ),
    _op(
        "depthwise_conv2d",
        _depthwise,
        Linear(groups=lambda n: int(n.weights["kernel"].shape[2]), window=True, channelwise=True),
        Weight(channels=2, view=_outputs_on_one_axis, fan_in=(0, 1)),
    ),
    _op("conv2d_transpose", _transposed, Linear(window=True, transposed=True), Weight(channels=2, fan_in=(0, 1, 3))),
    _op(
        "dense",
        lambda n, xs, w: tf.tensordot(xs[0], w["kernel"], 1) + w["bias"],
        Linear(),
        Weight(channels=1, fan_in=(0,)),
    ),
    _op(
        "affine",
        lambda n, xs, w: xs[0] * w["scale"] + w["offset"],
        Linear(groups=lambda n: len(n.weights["scale"]), channelwise=True),
        Weight(name="scale", channels=0),
        bias="offset",
        program=_uniform,
    ),
    Op(
        name="batch_matmul",
        compute=lambda n, xs, w: tf.matmul(*xs, transpose_b=n.attrs.get("adjoint", False)),
        fuses_clip=True,
        products=True,
        channels=Channels(in_front=_into_first, constant=lambda n, x: np.full_like(x, np.nan)),
        moments=_product_moments,
    ),
    Op(
        name="embedding",
        compute=_rows,
        weight=Weight(name="table", channels=0),
        values="table",
        given=True,
        moments=lambda node, sources, xs: Moments.sample(node.weights["table"]),
    ),
)
