"""Linear operations as matrix products, and the second moments of their inputs.

Every linear operation is, for each of its groups, y = W^T x + b with a patch x of its input: im2col (`ops.blocks`). A
transposed convolution reads the same kind of patch as others: the inputs that meet an output position, zero where none
does.

For a fixed layer the expected squared error of the output needs the data only through its moments (AdaRound, arXiv
2004.10568, eq. 11-13; white paper, arXiv 2106.08295, eq. 31 and 35 without the activation). With x the input of the
layer in the float network, x^ its input in the network quantized so far, y = W^T x + b and a free bias b^,

    E (y - W^^T x^ - b^)^2 = Var y - 2 W^^T Cov(x^, y) + W^^T Cov(x^, x^) W^    at    b^ = E y - W^^T E x^.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.ops import bias_of, linear_of, weight_of

Array = np.ndarray[Any, Any]
_PATCHES = 32 << 20  # bytes of patches at once


def to_matrices(node: Node, kernel: Array) -> Array:
    """The kernel as [groups, inputs, outputs of the group]; channel g * outputs + m of the layer is [g, :, m]."""
    return linear_of(node).matrices(node, kernel)


def from_matrices(node: Node, matrices: Array) -> Array:
    """The inverse of `to_matrices`."""
    return linear_of(node).from_matrices(matrices, node.weights[weight_of(node).name].shape)


def channels_to_groups(node: Node, values: Array) -> Array:
    """() or (channels,) values shaped to broadcast against `to_matrices`."""
    return values.reshape(1, 1, 1) if values.ndim == 0 else values.reshape(linear_of(node).groups(node), 1, -1)


def patches(node: Node, x: tf.Tensor, positions: Array) -> tf.Tensor:
    """The inputs of some output positions.

    Args:
        node: a linear operation.
        x: its input, batch first.
        positions: [samples, p], numbers of output positions (row by row).

    Returns:
        [groups, samples * p, inputs of the group]; padding is zeros.
    """
    linear, kernel = linear_of(node), node.weights[weight_of(node).name]
    x, groups = tf.convert_to_tensor(x), linear.groups(node)
    samples, channels = x.shape[0], x.shape[-1]
    pixels = tf.reshape(x, (-1, channels))
    first = np.arange(samples)[:, None] * (pixels.shape[0] // samples)  # a sample's first row of `pixels`
    if not linear.window:
        return tf.gather(pixels, (first + positions).reshape(-1))[None]
    rows, cols = linear.lines(node, x.shape, kernel)
    at_row, at_col = np.divmod(positions, len(cols))
    r, c = rows[at_row][..., :, None], cols[at_col][..., None, :]
    inside = (r >= 0) & (c >= 0)
    y = tf.gather(pixels, (first[..., None, None] + np.where(inside, r * x.shape[2] + c, 0)).reshape(-1))
    if not inside.all():
        y *= inside.reshape(-1, 1).astype(np.float32)
    y = tf.reshape(y, (-1, groups, channels // groups))
    y = tf.transpose(y, (1, 0, 2)) if channels > groups else tf.transpose(y[..., 0])  # a matrix: several times faster
    return tf.reshape(y, (groups, positions.size, -1))


def positions_of(node: Node) -> int:
    """How many output positions a sample has."""
    return int(np.prod([d or 1 for d in node.shape[1:-1]], dtype=np.int64))


def sampled_rows(
    node: Node, batches: Iterable[tuple[Any, Any]], positions: int, seed: int
) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
    """Patches (of x, of x^) at random output positions, one pair for each batch or, where large, part of it.

    Args:
        node: a linear operation.
        batches: (x, x^), inputs of the layer; the same object where both are equal.
        positions: how many positions of every sample, at most; one is drawn from each stretch of equal length.
        seed: of the draw, which does not depend on how the samples are cut into batches.
    """
    size, rng = positions_of(node), np.random.default_rng(seed)
    count = min(positions, size)
    inputs = node.weights[weight_of(node).name].size // (node.shape[-1] or 1) * linear_of(node).groups(node)
    step = max(1, _PATCHES // (4 * count * inputs))
    for x, x_hat in _slices(batches, step):
        drawn = np.tile(np.arange(size), (len(x), 1))
        if count < size:
            drawn = ((np.arange(count) + rng.random((len(x), count))) * (size / count)).astype(np.int64)
            drawn = np.minimum(drawn, size - 1)
        rows = patches(node, x_hat, drawn)
        yield (rows if x is x_hat else patches(node, x, drawn)), rows


def _slices(batches: Iterable[tuple[Any, Any]], step: int) -> Iterator[tuple[Any, Any]]:
    """The same samples, at most `step` at once; still the same object where both were."""
    for x, x_hat in batches:
        for k in range(0, len(x), step):
            part = x[k : k + step]
            yield part, part if x is x_hat else x_hat[k : k + step]


@dataclass(frozen=True, eq=False)
class Moments:
    """Means and centred second moments, float64; g groups, k inputs and m outputs of each.

    Attributes:
        rows: how many patches they are of.
        x_mean: E x^ [g, 1, k].
        y_mean: E y [g, 1, m].
        gram: Cov(x^, x^) [g, k, k].
        cross: Cov(x^, y) [g, k, m].
        power: Var y [g, 1, m].
    """

    rows: int
    x_mean: Array
    y_mean: Array
    gram: Array
    cross: Array
    power: Array

    def loss(self, matrices: Array) -> Array:
        """E (y - W^^T x^ - b^)^2 at the best bias [g, 1, m], see the module's docstring."""
        w = matrices.astype(np.float64)
        return self.power + (w * (tf.matmul(self.gram, w).numpy() - 2 * self.cross)).sum(axis=1, keepdims=True)

    def bias(self, matrices: Array) -> Array:
        """E y - W^^T E x^ [channels]."""
        return (self.y_mean - self.x_mean @ matrices).reshape(-1)

    def target(self, matrices: Array, damping: float) -> tuple[Array, Array]:
        """The float weights that are best for x^, and the metric around them.

        (G + d I)^-1 (Cov(x^, y) + d W) and G + d I: directions in which the inputs hardly vary keep the weights W.

        Args:
            matrices: W [g, k, m].
            damping: d relative to the mean of the diagonal of G. With n rows, k / n is added: so few cannot tell the
                best weights for new data.
        """
        g, k = self.gram.shape[:2]
        level = np.trace(self.gram, axis1=1, axis2=2) / k
        d = ((damping + k / self.rows) * level + np.where(level > 0, 1e-6 * level, 1.0)).reshape(g, 1, 1)
        metric = self.gram + d * np.eye(k)
        return tf.linalg.cholesky_solve(tf.linalg.cholesky(metric), self.cross + d * matrices).numpy(), metric


def moments(node: Node, batches: Iterable[tuple[Any, Any]], *, positions: int = 128, seed: int = 0) -> Moments:
    """Moments of a layer from one pass over its inputs; see `sampled_rows` for the arguments.

    Products are in float32 on data shifted by the mean of the first rows, sums in float64. With z = W^T x, or z = x
    where a layer has more outputs than inputs, all is known from the moments of x^ and z.
    """
    w, offset = to_matrices(node, node.weights[weight_of(node).name]), node.weights[bias_of(node)]
    wide = w.shape[2] > w.shape[1]
    total: list[Array] | None = None
    rows = 0
    for x, x_hat in sampled_rows(node, batches, positions, seed):
        z = x if wide else tf.matmul(x, w)
        if total is None:
            z_shift, x_shift = (tf.reduce_mean(t, axis=1, keepdims=True) for t in (z, x_hat))
        z, x_hat = z - z_shift, x_hat - x_shift
        sums = [
            tf.reduce_sum(x_hat, axis=1, keepdims=True),
            tf.reduce_sum(z, axis=1, keepdims=True),
            tf.matmul(x_hat, x_hat, transpose_a=True),
            tf.matmul(x_hat, z, transpose_a=True),
            tf.matmul(z, z, transpose_a=True) if wide else tf.reduce_sum(tf.square(z), axis=1, keepdims=True),
        ]
        arrays = [s.numpy().astype(np.float64) for s in sums]
        total = arrays if total is None else [np.add(t, a, out=t) for t, a in zip(total, arrays, strict=True)]
        rows += x_hat.shape[1]
    assert total is not None
    x_mean, z_mean, gram, cross, power = (t / rows for t in total)
    gram -= x_mean.transpose(0, 2, 1) * x_mean
    cross -= x_mean.transpose(0, 2, 1) * z_mean
    power -= (z_mean.transpose(0, 2, 1) if wide else z_mean) * z_mean
    x_mean, z_mean = x_mean + x_shift.numpy(), z_mean + z_shift.numpy()
    if wide:
        w = w.astype(np.float64)
        z_mean, cross = z_mean @ w, tf.matmul(cross, w).numpy()
        power = (w * tf.matmul(power, w).numpy()).sum(axis=1, keepdims=True)
    return Moments(rows, x_mean, z_mean + channels_to_groups(node, offset), gram, cross, power)
