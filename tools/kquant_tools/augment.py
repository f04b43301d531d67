"""Training images in random order, with random changes, as a `tf.data.Dataset` of batches."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

SHIFT = 4  # pixels, the usual one for images of 32


def flip_crop(images: Any, seed: Any, shift: int = SHIFT) -> Any:
    """Every image mirrored or not, and shifted by up to `shift` pixels each way, its border reflected.

    Args:
        images: [n, height, width, channels], both sizes above `shift`.
        seed: int64 [2]; the same images and seed give the same result.
        shift: pixels.
    """
    count, height, width = tf.unstack(tf.shape(images)[:3])
    draws = tf.random.stateless_uniform([3, count], seed)
    steps = tf.cast(tf.floor(draws[:2] * float(2 * shift + 1)), tf.int32)  # 0 .. 2 shift
    rows = steps[0][:, None] + tf.range(height)
    columns = tf.range(width)[None]
    columns = steps[1][:, None] + tf.where(draws[2][:, None] < 0.5, columns, width - 1 - columns)
    padded = tf.pad(images, [[0, 0], [shift, shift], [shift, shift], [0, 0]], "REFLECT")
    cut = tf.gather(tf.gather(padded, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)
    return tf.ensure_shape(cut, images.shape)


def augmented(dataset: Any, seed: int) -> Any:
    """A dataset of batches, x or (x, y), with `flip_crop` of x; other images in every epoch, the same for one seed."""
    seeds = tf.data.Dataset.random(seed, rerandomize_each_iteration=True).batch(2, drop_remainder=True)

    def change(batch: Any, draw: Any) -> Any:
        x, *rest = batch if isinstance(batch, tuple) else (batch,)
        changed = flip_crop(x, draw)
        return (changed, *rest) if rest else changed

    return tf.data.Dataset.zip(dataset, seeds).map(change, num_parallel_calls=tf.data.AUTOTUNE)


def training_batches(x: Any, y: Any, batch_size: int, seed: int) -> Any:
    """Arrays as a dataset of augmented batches (x, y); another order in every epoch, the same for one seed.

    Args:
        x: images [n, height, width, channels].
        y: labels [n].
        batch_size: samples of a batch; the last one may be smaller.
        seed: of the order and of the changes.
    """
    images, labels = tf.constant(x), tf.constant(y)
    order = tf.data.Dataset.range(len(x)).shuffle(len(x), seed).batch(batch_size)
    batches = order.map(lambda i: (tf.gather(images, i), tf.gather(labels, i)))
    return augmented(batches, seed).prefetch(tf.data.AUTOTUNE)
