"""What quantization destroys is said, with layer, cause and a remedy that works; what it does not destroy is not."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.keras.damage import LEAST_DB, sqnr

ops = keras.ops


def images(n: int = 24) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(n, 8, 8, 3)).astype(np.float32)


def detector(joined: bool) -> keras.Model:
    """Boxes in pixels and scores, in one tensor or as two outputs."""
    keras.utils.set_random_seed(5)
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(8, 3, activation="relu", name="features")(image)
    x = layers.Reshape((36, 8))(x)
    boxes = 640.0 * layers.Dense(4, activation="sigmoid", name="boxes")(x)
    scores = layers.Dense(3, activation="sigmoid", name="scores")(x)
    outputs = layers.Concatenate(name="predictions")([boxes, scores]) if joined else [boxes, scores]
    return keras.Model(image, outputs)


def quantized(model: keras.Model, data: Any = None, config: Any = "w8a8") -> kquant.QuantizedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kquant.QuantizationWarning)
        return kquant.quantize_model(model, images() if data is None else data, config=config, progress=False)


def file_scores(model: keras.Model, qmodel: kquant.QuantizedModel) -> tuple[np.ndarray, np.ndarray]:
    file = kquant.TFLiteModel(kquant.export_tflite(qmodel).content)
    return model.predict(images(), verbose=0)[..., 4:], file.predict(images())[0][..., 4:]


def test_scores_beside_boxes_are_reported_and_the_remedy_works() -> None:
    model = detector(joined=True)
    with pytest.warns(kquant.QuantizationWarning, match=r"layer 'scores'.*shared with 'predictions'.*Remedy"):
        qmodel = kquant.quantize_model(model, images(), progress=False)
    (damage,) = qmodel.quantization.damage
    assert str(damage) in qmodel.report
    expected, found = file_scores(model, qmodel)
    assert not found.any()  # the damage is real
    assert f"quantization destroys {damage}" in str(
        kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, images(4))
    )
    rule = json.loads(re.search(r"\{.*\}\}", damage.remedy)[0])
    rules = [{**rule, "name": name} for name in ("^scores$", "^predictions$", "^boxes$", "^multiply")]
    mended = quantized(model, config={"preset": "w8a8", "rules": rules})
    assert not mended.quantization.damage
    expected, found = file_scores(model, mended)
    assert sqnr(expected, found) > 25


def test_two_outputs_have_a_grid_each() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", kquant.QuantizationWarning)
        qmodel = kquant.quantize_model(detector(joined=False), images(), progress=False)
    assert not qmodel.quantization.damage


def test_channels_of_one_layer_that_are_lost_beside_larger_ones_are_reported() -> None:
    keras.utils.set_random_seed(5)
    image = keras.Input((8, 8, 3))
    head = layers.Conv2D(6, 3, name="head")
    model = keras.Model(image, head(image))
    head.kernel.assign(np.asarray(head.kernel) * np.array([500, 500, 500, 500, 0.1, 0.1]))
    (damage,) = quantized(model).quantization.damage
    assert damage.layer == "head" and "channels 4, 5 reach" in damage.cause


def test_a_mask_that_no_grid_holds_is_reported_behind_the_layer_that_reads_it() -> None:
    keras.utils.set_random_seed(5)
    scores, mask = keras.Input((6,), name="scores"), keras.Input((6,), name="mask")
    hidden = layers.Dense(6, name="query")(scores) + layers.Dense(
        6, use_bias=False, kernel_initializer=keras.initializers.Constant(-1e9), name="bias"
    )(mask)
    model = keras.Model([scores, mask], layers.Softmax(name="attention")(hidden))
    data = {"scores": 3 * np.random.default_rng(5).normal(size=(16, 6)), "mask": np.zeros((16, 6))}
    data["mask"][::2, 0] = 1
    damage = quantized(model, {k: v.astype(np.float32) for k, v in data.items()}).quantization.damage
    assert any(d.layer == "attention" and "in steps of" in d.cause and "narrow" in d.remedy for d in damage)


def test_the_report_of_a_damage_survives_saving(tmp_path: Any) -> None:
    qmodel = quantized(detector(joined=True))
    qmodel.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.quantization.damage == qmodel.quantization.damage != ()


@pytest.mark.parametrize("config", ["w8a8", "w4a8", "w8a16"])
def test_an_ordinary_network_is_not_reported(config: str) -> None:
    keras.utils.set_random_seed(5)
    image = keras.Input((8, 8, 3))
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same")(image))
    x = layers.ReLU()(x) + layers.Conv2D(8, 1)(image)
    model = keras.Model(image, layers.Dense(5, activation="softmax")(layers.GlobalAveragePooling2D()(x)))
    assert quantized(model, config=config).quantization.damage == ()


def test_what_is_lost_and_missed_by_nobody_is_not_reported() -> None:
    """The mean of rows that have hardly one, and what is left without it."""
    row = keras.Input((256,))
    model = keras.Model(row, row - ops.mean(row, -1, keepdims=True))
    data = np.random.default_rng(5).normal(size=(64, 256)).astype(np.float32)
    data += 1e-5 * np.arange(64)[:, None] - data.mean(-1, keepdims=True)
    qmodel = quantized(model, data)
    mean = next(n for n in qmodel.quantized_layers if "mean" in n)
    expected, found = data.mean(-1), np.asarray(qmodel.inner([mean])(data)).reshape(-1)
    assert sqnr(expected, found) < LEAST_DB  # the mean is lost
    assert sqnr(model.predict(data, verbose=0), qmodel.predict(data, verbose=0)) > 30
    assert not qmodel.quantization.damage


def test_a_sum_that_cancels_is_not_lost() -> None:
    """What is left is the rounding of float32, and no signal."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, activation="relu")(inputs)
    zero = (x * 1.1 + x * 0.3) - x * 1.4
    assert np.any(keras.Model(inputs, zero).predict(images(), verbose=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", kquant.QuantizationWarning)
        qmodel = kquant.quantize_model(keras.Model(inputs, [x, zero + 0.0]), images(), progress=False)
    assert not qmodel.quantization.damage


def test_sqnr_is_that_of_uniform_noise() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    step = 2 / 256
    assert sqnr(x, np.rint(x / step) * step) == pytest.approx(10 * np.log10((1 / 3) / (step**2 / 12)), abs=0.1)
    assert sqnr(x, x) == float("inf")
