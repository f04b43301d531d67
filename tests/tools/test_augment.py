"""Random changes of training images."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from kquant_tools.augment import augmented, flip_crop


def windows(image: np.ndarray, shift: int) -> list[np.ndarray]:
    """Everything that a flip and a shift can make of an image."""
    height, width, _ = image.shape
    padded = np.pad(image, ((shift, shift), (shift, shift), (0, 0)), mode="reflect")
    steps = range(2 * shift + 1)
    cut = [padded[r : r + height, c : c + width] for r in steps for c in steps]
    return cut + [window[:, ::-1] for window in cut]


def test_an_image_is_mirrored_and_shifted():
    images = np.random.default_rng(0).normal(size=(200, 5, 6, 2)).astype(np.float32)
    changed = flip_crop(tf.constant(images), tf.constant([1, 2], tf.int64), shift=2).numpy()
    found = [[(w == c).all() for w in windows(i, 2)] for i, c in zip(images, changed, strict=True)]
    counts = np.sum(found, axis=0)
    assert counts.sum() == len(images)  # each is one of the 50, and they are all drawn
    assert (counts > 0).sum() >= 40 and abs(counts[:25].sum() - 100) < 35


def test_changes_differ_between_epochs_and_repeat_with_the_seed():
    images = np.random.default_rng(0).normal(size=(8, 6, 6, 1)).astype(np.float32)
    batches = tf.data.Dataset.from_tensor_slices((images, np.arange(8))).batch(4)
    data, again = augmented(batches, 3), augmented(batches, 3)
    epochs = [np.concatenate([x for x, _ in d.as_numpy_iterator()]) for d in (data, data, again, again)]
    np.testing.assert_array_equal(epochs[0], epochs[2])
    np.testing.assert_array_equal(epochs[1], epochs[3])
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(np.concatenate([y for _, y in data.as_numpy_iterator()]), np.arange(8))
