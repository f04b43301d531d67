"""A small chain of convolutions on the digits, made without training: random features, a readout by least squares."""

from __future__ import annotations

from functools import cache

import keras
import numpy as np
from keras import layers

from models import digits_cnn

DIGITS = digits_cnn.load_split()
TEST = (DIGITS.x_test[:300], DIGITS.y_test[:300])
CHANNELS = 8
OFF = {"equalize": False, "absorb_bias": False, "adaround": False, "correct_bias": False}
PER_TENSOR = {"preset": "w8a8-per_tensor", **OFF}
RIDGE = 0.03  # of the features' variance: no weight grows so large that rounding matters


def features() -> keras.Model:
    """Convolution, depthwise and 1x1 convolution with ReLUs: 8 x 8 images to 256 features."""
    random = {"kernel_initializer": keras.initializers.HeNormal(seed=1), "activation": "relu"}
    x = inputs = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(CHANNELS, 3, padding="same", name="conv", **random)(x)
    x = layers.DepthwiseConv2D(
        3, 2, "same", activation="relu", depthwise_initializer=keras.initializers.HeNormal(seed=2), name="dw"
    )(x)
    x = layers.Conv2D(16, 1, name="pw", **random)(x)
    return keras.Model(inputs, layers.Flatten(name="flat")(x), name="features")


def with_readout(base: keras.Model) -> keras.Model:
    """The features and the linear classes that fit the training labels best (ridge regression)."""
    y = layers.Dense(10, name="logits")(base.output)
    model = keras.Model(base.inputs, y, name="chain")
    h = np.asarray(base.predict_on_batch(DIGITS.x_train), np.float64)
    mean, targets = h.mean(0), np.eye(10)[DIGITS.y_train] - 0.1
    z = h - mean
    ridge = RIDGE * np.mean(np.square(z)) * len(z) * np.eye(z.shape[1])
    weights = np.linalg.solve(z.T @ z + ridge, z.T @ targets)
    model.get_layer("logits").set_weights([weights * 10, (0.1 - mean @ weights) * 10])
    return model


@cache
def chain() -> keras.Model:
    """The model that nothing is wrong with; not to be changed."""
    return with_readout(features())


def wide_depthwise() -> keras.Model:
    """The same function with depthwise channels of ranges 1 to 1000, undone in the next layer."""
    model = keras.models.clone_model(chain())
    model.set_weights(chain().get_weights())
    scales = np.geomspace(1, 1000, CHANNELS)
    dw, pw = model.get_layer("dw"), model.get_layer("pw")
    dw.set_weights([dw.get_weights()[0] * scales[:, None], dw.get_weights()[1] * scales])
    pw.set_weights([pw.get_weights()[0] / scales[:, None], pw.get_weights()[1]])
    return model


def outlying_channel() -> keras.Model:
    """One depthwise channel is a few hundred times as wide as the others, and nothing reads it."""
    base = features()
    dw, pw = base.get_layer("dw"), base.get_layer("pw")
    only = np.arange(CHANNELS)[:, None] == 3
    dw.set_weights([np.where(only, 400, 1) * np.abs(dw.get_weights()[0]), dw.get_weights()[1]])
    pw.set_weights([np.where(only, 0, pw.get_weights()[0]), pw.get_weights()[1]])
    return with_readout(base)
