"""Normalization, as one operation until it is quantized, and the reciprocal square root that it takes then.

| op | attrs | weights |
| --- | --- | --- |
| normalize | center, epsilon, limit | scale, gamma, beta [c] |
| rsqrt | | |

normalize works on the last axis, of c entries:

    d = scale * x - mean(scale * x), or scale * x where it does not center
    y = gamma * d / sqrt(sum(d^2) + epsilon) + beta, or gamma * d / sqrt(max(sum(d^2), epsilon)) + beta with `limit`

so that gamma holds the sqrt(c) of a mean of squares. It is exact for an input whose channels are stored divided by
`scale`. No target has a kernel for it: `transforms.expand_normalization` writes it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.moments import Moments, through
from kquant.graph.ops.record import Op, Tensor, collect


def deviations(node: Node, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """d, and the sum of its squares, of a "normalize"."""
    d = x * scale
    if node.attrs["center"]:
        d = d - tf.reduce_mean(d, -1, keepdims=True)
    return d, tf.reduce_sum(tf.square(d), -1, keepdims=True)


def _normalize(n: Node, xs: Sequence[Tensor], w: Mapping[str, Tensor]) -> Tensor:
    d, total = deviations(n, xs[0], w["scale"])
    epsilon = tf.cast(n.attrs["epsilon"], total.dtype)
    total = tf.maximum(total, epsilon) if n.attrs["limit"] else total + epsilon
    return d * tf.math.rsqrt(total) * w["gamma"] + w["beta"]


def _moments(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    """Each of the c normalized numbers has a mean square of 1 / c."""
    gamma = node.weights["gamma"].astype(np.float64)
    return Moments.normal(node.weights["beta"].astype(np.float64), np.abs(gamma) / np.sqrt(len(gamma)))


def _root_moments(node: Node, sources: Sequence[Node], xs: Sequence[Moments]) -> Moments:
    return through(lambda v: 1 / np.sqrt(np.maximum(v, 1e-12)), xs[0])


RECORDS = collect(
    Op(name="normalize", compute=_normalize, parameters=("scale", "gamma", "beta"), products=True, moments=_moments),
    Op(name="rsqrt", compute=lambda n, xs, w: tf.math.rsqrt(xs[0]), elementwise=True, moments=_root_moments),
)
