"""The demo's model: a small residual CNN on the 8 x 8 digits that come with scikit-learn.

python -m models.digits_cnn        # trains it anew (seconds) and writes models/digits_cnn.keras
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

PATH = Path(__file__).with_suffix(".keras")
SEED = 1
CALIBRATION, TEST = 200, 500  # of the 1797 images; training uses all others and the calibration images


@dataclass(frozen=True)
class Digits:
    """Images [n, 8, 8, 1] float32 in 0..1 and labels [n] of a fixed split.

    `calibration` is a part of `train`; `test` is used for nothing but the final accuracy.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def calibration(self) -> np.ndarray:
        """The first images of the training set."""
        return self.x_train[:CALIBRATION]


def load_split() -> Digits:
    """The split, the same on every call."""
    images, labels = load_digits(return_X_y=True)
    x = (images / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(SEED).permutation(len(x))
    train, test = order[:-TEST], order[-TEST:]
    return Digits(x[train], labels[train], x[test], labels[test])


def calibration_batches() -> Iterator[np.ndarray]:
    """Batches of calibration images, for --data=models.digits_cnn:calibration_batches."""
    yield from np.array_split(load_split().calibration, 4)


def test_batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of test images with labels, for --data=models.digits_cnn:test_batches."""
    digits = load_split()
    yield from zip(np.array_split(digits.x_test, 5), np.array_split(digits.y_test, 5), strict=True)


def _conv_bn(x: Any, conv: layers.Layer, name: str, relu: bool = True) -> Any:
    x = layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(conv(x))
    return layers.ReLU(name=f"{name}_relu")(x) if relu else x


def build() -> keras.Model:
    """Convolution, two residual blocks of depthwise and pointwise convolutions, pooling, dense: 15,322 parameters."""
    settings: dict[str, Any] = {"padding": "same", "use_bias": False}
    x = inputs = keras.Input((8, 8, 1), name="image")
    x = _conv_bn(x, layers.Conv2D(48, 3, name="stem", **settings), "stem")
    for block, (width, stride) in enumerate([(48, 1), (96, 2)]):
        name = f"block{block}"
        y = _conv_bn(x, layers.DepthwiseConv2D(3, stride, name=f"{name}_dw", **settings), f"{name}_dw")
        y = _conv_bn(y, layers.Conv2D(width, 1, name=f"{name}_pw", **settings), f"{name}_pw", relu=False)
        if stride > 1:
            x = _conv_bn(
                x, layers.Conv2D(width, 1, stride, name=f"{name}_skip", **settings), f"{name}_skip", relu=False
            )
        x = layers.ReLU(name=f"{name}_out")(layers.Add(name=f"{name}_add")([x, y]))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x), name="digits_cnn")


def train(epochs: int = 20, verbose: int = 2) -> keras.Model:
    """Train from scratch.

    Args:
        epochs: passes over the training images.
        verbose: as in `keras.Model.fit`.
    """
    keras.utils.set_random_seed(SEED)
    digits, model = load_split(), build()
    batch_size = 32
    schedule = keras.optimizers.schedules.CosineDecay(4e-3, epochs * -(-len(digits.x_train) // batch_size))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=1e-3), loss, metrics=["accuracy"])
    model.fit(digits.x_train, digits.y_train, batch_size, epochs, verbose=verbose)
    return model


def main() -> None:
    model, digits = train(), load_split()
    accuracy = np.mean(np.argmax(model.predict(digits.x_test, verbose=0), -1) == digits.y_test)
    keras.Model(model.inputs, model.outputs, name=model.name).save(PATH)  # without the optimizer's state
    print(f"{model.count_params():,} parameters, test accuracy {100 * accuracy:.2f} %, {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
