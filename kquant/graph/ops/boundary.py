"""Where values come from, and where they change their kind.

| op | attrs | weights |
| --- | --- | --- |
| input | | |
| const | | value (no batch dimension; broadcasts against the other operand) |
| requantize | input_bits: the container it reads, None for a float tensor | |
| float | | |
| train_only | user_shape: of the tensor in the user's model; scale, offset: lists, or None; drops | |

requantize is the identity; a change of quantization parameters. float is the user's own operation (`Node.call`).
train_only is a layer of the user's (`Node.call`) that acts in training, such as Dropout, and the identity otherwise: a
target computes nothing. Only graphs that are made for training have it. Folding changes what its tensor is: the user's
layer works on x * scale + offset. Where it drops, it multiplies by zeros and a positive constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from kquant.errors import ModelError
from kquant.graph.ir import Node
from kquant.graph.moments import Moments
from kquant.graph.ops.record import Op, Tensor, Tie, collect, same_moments
from kquant.graph.scaling import Channels, Scaling


def _fed(node: Node, xs: Sequence[Tensor], w: Mapping[str, Tensor]) -> Tensor:
    raise AssertionError(f"{node.name!r} is an input: its values are fed, not computed")


def _sample(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    return Moments.sample(node.weights["value"])


def _reframed(node: Node, s: Scaling) -> Node:
    """user = old * scale + offset = (new - s.offset) / s.scale * scale + offset."""
    scale, offset = (np.asarray(node.attrs[k] or default) for k, default in (("scale", 1.0), ("offset", 0.0)))
    scale = scale / np.where(s.scale == 0, 1.0, s.scale)  # a channel without a scale is one that nothing reads
    return node.with_attrs(scale=scale.tolist(), offset=(offset - s.offset * scale).tolist())


def _own(node: Node, xs: Sequence[Tensor], w: Mapping[str, Tensor]) -> Tensor:
    """What the user's own layer computes.

    Raises:
        ModelError: it is a truth value, and the layer declares a number, or the other way round.
    """
    y = node.call(xs)
    kind = tf.as_dtype(y.dtype).name
    if ("bool" in kind) != (node.dtype == "bool"):
        raise ModelError(
            f"Layer {node.origin or node.name!r} ({node.origin_type}) declares {node.dtype} and returns {kind}: give "
            "it that type (dtype=, or a compute_output_spec), or cast what it returns."
        )
    return y


RECORDS = collect(
    Op(name="input", compute=_fed, given=True),
    Op(name="const", compute=lambda n, xs, w: tf.constant(w["value"]), values="value", given=True, moments=_sample),
    Op(
        name="requantize",
        compute=lambda n, xs, w: tf.identity(xs[0]),
        moments=same_moments,
        unchanged=lambda node, source: True,
    ),
    Op(name="float", compute=_own),
    Op(
        name="train_only",
        compute=lambda n, xs, w: tf.identity(xs[0]),
        grid=Tie.OF_INPUT,
        elementwise=True,
        channels=Channels(
            behind=lambda node, source, s: s,
            in_front=lambda node, sources, s: (s,) if s.scale.all() else None,
            equivariant=True,
            offset=lambda node: True,
            constant=lambda node, x: np.full_like(x, np.nan),
        ),
        moments=same_moments,
        reframed=_reframed,
    ),
)
