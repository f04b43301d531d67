"""Inputs that hold bytes get the range of bytes, whatever the calibration data contain."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kquant

BYTES = (np.float32(1.0), -128)


def model(*first: layers.Layer, dtype: str = "float32", shape: tuple[int, ...] = (8, 8, 3)) -> keras.Model:
    keras.utils.set_random_seed(1)
    image = keras.Input(shape, dtype=dtype, name="image")
    x = image if dtype == "float32" else keras.ops.cast(image, "float32")
    for layer in first:
        x = layer(x)
    return keras.Model(image, layers.Dense(4)(x))


def images(low: float = 9, high: float = 231, dtype: str = "float32", channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(low, high, (16, 8, 8, channels)).astype(dtype)


def input_grid(model: keras.Model, data: Any, config: Any = "w8a8") -> tuple[float, int]:
    grid = kquant.quantize_model(model, data, config=config, progress=False).quantized_layers["image"].output_quantizer
    return grid.to_grid().scale, int(grid.to_grid().zero_point)


def colours() -> layers.Layer:
    return layers.Normalization(mean=[124.0, 117.0, 104.0], variance=[58.0**2, 57.0**2, 57.0**2])


@pytest.mark.parametrize(
    "first",
    [
        [layers.Rescaling(1 / 255)],
        [layers.Rescaling(1 / 127.5, offset=-1.0)],
        [colours()],
        [layers.Rescaling(1 / 255), layers.Normalization(mean=[0.5] * 3, variance=[0.1] * 3)],
    ],
)
def test_a_first_layer_for_bytes_says_that_the_input_has_bytes(first: list[layers.Layer]) -> None:
    assert input_grid(model(*first), images()) == BYTES


def test_the_type_of_the_input_or_of_the_data_says_so_too() -> None:
    assert input_grid(model(dtype="uint8"), images(dtype="uint8")) == BYTES
    assert input_grid(model(), images(dtype="uint8")) == BYTES
    assert input_grid(model(), [images(dtype="uint8")[:8], images(dtype="uint8")[8:]]) == BYTES
    assert input_grid(model(dtype="int8"), images(-70, 90, "int8")) == (np.float32(1.0), 0)


@pytest.mark.parametrize(
    ("first", "low", "high"),
    [
        ([], 9, 231),  # nothing says so
        ([layers.Rescaling(0.5)], 9, 231),
        ([layers.Rescaling(1 / 255)], 0, 4000),  # the data say otherwise
        ([layers.Normalization(mean=[1.0] * 3, variance=[4.0] * 3)], 0, 9),
    ],
)
def test_other_inputs_have_the_range_of_the_data(first: list[layers.Layer], low: float, high: float) -> None:
    data = images(low, high)
    scale, _ = input_grid(model(*first), data, {"activations": {"method": "min_max"}})
    assert scale == pytest.approx(data.max() / 255, rel=1e-3)


def test_a_range_in_the_config_goes_first() -> None:
    config = {"preset": "w8a8", "inputs": {"range": [0.0, 127.5]}}
    assert input_grid(model(layers.Rescaling(1 / 255)), images(), config)[0] == np.float32(0.5)


def test_without_data_the_range_is_that_of_bytes() -> None:
    keras.utils.set_random_seed(1)
    image = keras.Input((8, 8, 3), name="image")
    x = layers.BatchNormalization()(layers.Conv2D(4, 3)(layers.Rescaling(1 / 255)(image)))
    assert input_grid(keras.Model(image, layers.ReLU()(x)), None) == BYTES


def test_bytes_go_into_the_file_as_they_are() -> None:
    float_model = model(layers.Rescaling(1 / 255), dtype="uint8")
    data = images(dtype="uint8")
    qmodel = kquant.quantize_model(float_model, data, progress=False)
    expected = float_model.predict(data, verbose=0)
    raw = images(0, 256, "uint8")
    for input_type in ("uint8", "int8"):
        file = kquant.TFLiteModel(kquant.export_tflite(qmodel, input_type=input_type).content)
        assert file.inputs[0]["quantization"] == (1.0, {"uint8": 0, "int8": -128}[input_type])
        found = file.predict(data)[0]
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
        assert np.array_equal(file.predict(raw)[0], file.predict(raw.astype(np.float32))[0])
    assert "'image' holds bytes: 0 to 255" in qmodel.report
