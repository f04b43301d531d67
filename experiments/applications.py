"""One network of every family of keras.applications: `python -m experiments.applications [NAME ...]`.

Each with random weights on small random images, at w8a8 and at w4a8: a row of a table.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from experiments.passages import HEADER, row

FAMILIES = (
    *("ConvNeXtTiny", "DenseNet121", "EfficientNetB0", "EfficientNetV2B0", "InceptionResNetV2", "InceptionV3"),
    *("MobileNet", "MobileNetV2", "MobileNetV3Large", "MobileNetV3Small", "NASNetMobile", "ResNet50", "ResNet50V2"),
    *("VGG16", "Xception"),
)
BYTES = ("ConvNeXt", "EfficientNet", "MobileNetV3")  # they normalize by themselves, and read 0..255
CONFIGS = ("w8a8", "w4a8")
SIDE, SAMPLES = 96, 8


def build(name: str) -> Callable[[], keras.Model]:
    """What makes a network of ten classes."""
    return lambda: getattr(keras.applications, name)(weights=None, input_shape=(SIDE, SIDE, 3), classes=10)


def samples(name: str, _: Any = None) -> Any:
    """Random images, smooth as photographs are, in the range that a network reads: [8, 96, 96, 3] float32."""
    rough = np.random.default_rng(0).random((SAMPLES, 12, 12, 3), "float32")
    images = np.asarray(keras.ops.image.resize(rough, (SIDE, SIDE)))
    return images * 255 if name.startswith(BYTES) else images * 2 - 1


def main(names: Sequence[str]) -> None:
    """Print the table."""
    print(HEADER, flush=True)
    for name in names or FAMILIES:
        for config in CONFIGS:
            print(row(f"{name}, {config}", build(name), functools.partial(samples, name), config), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
