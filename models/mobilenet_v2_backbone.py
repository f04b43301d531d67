"""The first 13 blocks of the ImageNet MobileNetV2 (KQUANT_DATA), as the backbone of dense tasks."""

from __future__ import annotations

from typing import Any

import keras

from .data import path

FILE = "models/mobilenet_v2_1.0_imagenet.keras"
LEVELS = {  # stride -> the last layer at that resolution
    4: "expanded_conv_3_add",
    8: "expanded_conv_6_add",
    16: "expanded_conv_13_add",
}


def features(inputs: Any) -> dict[int, Any]:
    """What the backbone sees in images.

    Args:
        inputs: [n, h, w, 3] in -1..1.

    Returns:
        Stride (4, 8, 16) -> features [n, h / stride, w / stride, 24, 32 or 96], rounded up.

    Raises:
        MissingData: the evaluation data is not there.
    """
    source = keras.saving.load_model(path(FILE), compile=False)
    wanted = [source.get_layer(name).output for name in LEVELS.values()]
    trunk = keras.Model(source.inputs, wanted)
    copy = keras.models.clone_model(trunk, input_tensors=[inputs])
    copy.set_weights(trunk.get_weights())
    return dict(zip(LEVELS, copy.outputs, strict=True))
