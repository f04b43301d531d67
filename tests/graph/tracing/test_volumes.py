"""Volumes, frames and windows: several entries of the first axis for every sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import kquant
from kquant.graph.ops import evaluate
from kquant.graph.tracing.trace import trace_model
from tests.support.tracing import assert_equal, build, ops

L = keras.layers
k = keras.ops
VOLUME = (5, 6, 6, 3)


def windows(x: Any) -> Any:
    """Windows of 2 x 2 in the first axis, a layer on each, and back."""
    y = k.transpose(k.reshape(x, (-1, 3, 2, 3, 2, 4)), (0, 1, 3, 2, 4, 5))
    y = L.Dense(4, activation="relu")(k.reshape(y, (-1, 4, 4)))
    y = k.transpose(k.reshape(y, (-1, 3, 3, 2, 2, 4)), (0, 1, 3, 2, 4, 5))
    return k.reshape(y, (-1, 6, 6, 4))


CASES: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    "conv3d": (lambda x: L.Conv3D(4, 3, activation="relu")(x), VOLUME),
    "conv3d same": (lambda x: L.Conv3D(4, (2, 3, 2), strides=(2, 1, 2), padding="same")(x), VOLUME),
    "conv3d dilated": (lambda x: L.Conv3D(4, (2, 3, 3), dilation_rate=(2, 1, 1))(x), VOLUME),
    "conv3d flat": (lambda x: L.Conv3D(6, (1, 3, 3), groups=3)(x), VOLUME),
    "conv3d transposed": (lambda x: L.Conv3DTranspose(4, 2, strides=2, activation="relu")(x), VOLUME),
    "conv3d transposed same": (lambda x: L.Conv3DTranspose(4, (2, 3, 3), strides=2, padding="same")(x), VOLUME),
    "max pooling": (lambda x: L.MaxPooling3D(2)(x), VOLUME),
    "max pooling same": (lambda x: L.MaxPooling3D((2, 3, 2), 2, padding="same")(x), VOLUME),
    "average pooling": (lambda x: L.AveragePooling3D(2)(x), VOLUME),
    "average pooling same": (lambda x: L.AveragePooling3D(3, 2, padding="same")(x), VOLUME),
    "global": (lambda x: L.GlobalAveragePooling3D()(x) + L.GlobalMaxPooling3D()(x), VOLUME),
    "padding": (lambda x: L.Cropping3D((1, 0, 1))(L.ZeroPadding3D(((1, 2), (0, 1), (1, 0)))(x)), VOLUME),
    "up": (lambda x: L.UpSampling3D((2, 1, 3))(x), VOLUME),
    "norm": (lambda x: L.ReLU()(L.BatchNormalization()(L.Conv3D(4, 2)(x))), VOLUME),
    "frames": (lambda x: L.TimeDistributed(L.Conv2D(4, 3, padding="same"))(x), VOLUME),
    "frames pooled": (lambda x: L.TimeDistributed(L.Flatten())(L.TimeDistributed(L.MaxPooling2D())(x)), VOLUME),
    "frames dense": (lambda x: L.TimeDistributed(L.Dense(7, activation="relu"))(x), (5, 6)),
    "spectral": (lambda x: L.SpectralNormalization(L.Conv2D(4, 3))(x), (6, 6, 3)),
    "windows": (windows, (6, 6, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_graph_computes_what_keras_computes(name: str) -> None:
    function, shape = CASES[name]
    model = build(function, shape)
    graph = trace_model(model)
    assert_equal(graph, model)
    assert "float" not in ops(graph)


@pytest.mark.parametrize("config", ["w8a8", pytest.param("w4a8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["conv3d same", "conv3d transposed", "average pooling", "frames", "windows"])
def test_the_file_computes_it_in_integers(name: str, config: str) -> None:
    function, shape = CASES[name]
    model = build(lambda x: L.Dense(3)(L.Flatten()(keras.ops.max(function(x), axis=(1, 2)))), shape)
    data = np.random.default_rng(0).normal(size=(24, *shape)).astype(np.float32)
    qmodel = kquant.quantize_model(model, data, config=config, progress=False)
    content = kquant.export_tflite(qmodel, allow_float=False).content
    assert kquant.verify_tflite(qmodel, content, data).ok
    expected, found = model.predict(data, verbose=0), kquant.TFLiteModel(content).predict(data)[0]
    assert np.square(expected - found).sum() < (0.002 if config == "w8a8" else 0.05) * np.square(expected).sum()


@pytest.mark.slow
def test_bias_correction_and_adaround_see_whole_samples() -> None:
    """A walk over more samples than fit at once cuts between samples, not between frames."""
    function, shape = CASES["frames"]
    model = build(lambda x: L.Dense(3)(L.Flatten()(L.TimeDistributed(L.Conv2D(4, 3))(function(x)))), shape)
    data = np.random.default_rng(0).normal(size=(70, *shape)).astype(np.float32)
    outputs = [
        kquant.quantize_model(model, batches, config="w4a8", progress=False).predict(data, verbose=0)
        for batches in (data, [data[:33], data[33:]])
    ]
    assert np.array_equal(*outputs)


@pytest.mark.parametrize(
    "layer",
    [
        lambda f: L.Conv2D(4, 3, strides=2, padding="same", activation="relu", data_format=f),
        lambda f: L.DepthwiseConv2D(3, data_format=f),
        lambda f: L.Conv2DTranspose(4, 3, strides=2, data_format=f),
        lambda f: L.MaxPooling2D(data_format=f),
        lambda f: L.GlobalAveragePooling2D(data_format=f),
        lambda f: L.GlobalAveragePooling2D(data_format=f, keepdims=True),
        lambda f: L.Flatten(data_format=f),
        lambda f: L.UpSampling2D(data_format=f),
        lambda f: L.ZeroPadding2D(data_format=f),
        lambda f: L.Conv1D(4, 3, data_format=f),
    ],
)
def test_channels_first_is_channels_last_between_transposes(layer: Callable[[str], Any]) -> None:
    """The CPU runs no convolutions with channels first, so the twin with channels last is the reference."""
    first, last = layer("channels_first"), layer("channels_last")
    shape = (6, 3) if isinstance(first, L.Conv1D) else (6, 8, 3)
    x, y = keras.Input((3, *shape[:-1])), keras.Input(shape)
    model, twin = keras.Model(x, first(x)), keras.Model(y, last(y))
    first.set_weights(last.get_weights())
    data = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    graph = trace_model(model)
    (found,) = (np.asarray(y) for y in evaluate(graph, [np.moveaxis(data, -1, 1)]))
    expected = twin.predict(data, verbose=0)
    if found.ndim == data.ndim:
        expected = np.moveaxis(expected, -1, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert "float" not in ops(graph)
