"""Where values come from, and where they change their kind.

| op | attrs | weights |
| --- | --- | --- |
| input | | |
| const | | value (no batch dimension; broadcasts against the other operand) |
| requantize | input_bits: the container it reads, None for a float tensor | |
| float | | |

requantize is the identity; a change of quantization parameters. float is the user's own operation (`Node.call`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.moments import Moments
from kquant.graph.ops.record import Op, Tensor, collect, same_moments


def _fed(node: Node, xs: Sequence[Tensor], w: Mapping[str, Tensor]) -> Tensor:
    raise AssertionError(f"{node.name!r} is an input: its values are fed, not computed")


def _sample(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    return Moments.sample(node.weights["value"])


RECORDS = collect(
    Op(name="input", compute=_fed, given=True),
    Op(name="const", compute=lambda n, xs, w: tf.constant(w["value"]), values="value", given=True, moments=_sample),
    Op(
        name="requantize",
        compute=lambda n, xs, w: tf.identity(xs[0]),
        moments=same_moments,
        unchanged=lambda node, source: True,
    ),
    Op(name="float", compute=lambda n, xs, w: n.call(xs)),
)
