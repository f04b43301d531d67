"""The first 13 blocks of the ImageNet MobileNetV2 (KQUANT_DATA), as a backbone, and layers to build on it."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers

from .data import path

FILE = "models/mobilenet_v2_1.0_imagenet.keras"
PREFIXES = ("conv2d_0", "expanded_conv_")  # of its convolutions
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


def convolution(x: Any, filters: int, name: str) -> Any:
    """A pointwise convolution with batch normalization and ReLU6."""
    x = layers.Conv2D(filters, 1, use_bias=False, name=name)(x)
    return layers.ReLU(6.0, name=f"{name}_relu")(layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x))


def separable(x: Any, filters: int, name: str, stride: int = 1, rate: int = 1) -> Any:
    """A depthwise and a pointwise convolution, each with batch normalization and ReLU6."""
    settings: dict[str, Any] = {"padding": "same", "dilation_rate": rate, "use_bias": False}
    x = layers.DepthwiseConv2D(3, stride, **settings, name=f"{name}_depthwise")(x)
    x = layers.BatchNormalization(momentum=0.9, name=f"{name}_depthwise_bn")(x)
    return convolution(layers.ReLU(6.0, name=f"{name}_depthwise_relu")(x), filters, name)


def with_batch_norm(model: keras.Model, images: np.ndarray) -> keras.Model:
    """The same function with a batch normalization behind every convolution of the backbone.

    The published backbone has its own folded; these have the statistics of the convolutions' outputs over `images`,
    with gamma and beta that make them the identity. What needs statistics in place of data can work again.

    Args:
        model: with layers of `features`.
        images: its inputs [n, h, w, 3].
    """
    kinds = layers.Conv2D | layers.DepthwiseConv2D
    names = [x.name for x in model.layers if isinstance(x, kinds) and x.name.lower().startswith(PREFIXES)]
    seen = keras.Model(model.inputs, [model.get_layer(name).output for name in names])
    total: list[Any] = [0.0] * (2 * len(names))
    count = 0
    for k in range(0, len(images), 8):
        values = [np.asarray(y, np.float64) for y in seen.predict_on_batch(images[k : k + 8])]
        moments = [np.sum(y**power, (0, 1, 2)) / np.prod(y.shape[1:3]) for power in (1, 2) for y in values]
        total, count = [t + m for t, m in zip(total, moments, strict=True)], count + len(values[0])

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        y = layer(*args, **kwargs)
        return layers.BatchNormalization(momentum=0.9, name=f"{layer.name}_bn")(y) if layer.name in names else y

    copy = keras.models.clone_model(model, call_function=call)
    for layer in model.layers:
        copy.get_layer(layer.name).set_weights(layer.get_weights())
    for name, first, second in zip(names, total[: len(names)], total[len(names) :], strict=True):
        norm, mean = copy.get_layer(f"{name}_bn"), first / count
        variance = np.maximum(second / count - mean**2, 0)
        norm.set_weights([np.sqrt(variance + norm.epsilon), mean, mean, variance])
    return copy
