"""Random models through quantize -> export -> interpreter: parity, and nearness to the float model.

A failure names the seed. Nearness is measured on the data of the calibration, where no value lies beyond its grid: what
is left are roundings. The signal is the power of the output with its mean, since heads of random networks vary little
from sample to sample; a file that gave the mean would have some 20 dB.

Run once when attention, recurrence, ids and volumes came in: 85 seeds at w8a8, 84 at w4a8, 85 at w8a16, 83 at w4a4.
They found nine kinds of faults, all mended: a sum that aborts LiteRT where an operand is always zero; masks of ids
that Attention and AdditiveAttention lost; an input that nothing reads; the scale of `dot_product_attention`; slices
with negative steps in float; and in 16 bits the factor of a product of tensors, that of a curve, a curve's scale at
a power of two, and a mask at the floor of the grid.
"""

from __future__ import annotations

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf

import kquant
from kquant.graph.ops import evaluate
from kquant.graph.tracing.trace import trace_model
from tests.support.random_choices import random_choices
from tests.support.random_models import random_data, random_model

pytestmark = pytest.mark.usefixtures("eagerly")
CONFIGS = ("w8a8", "w8a8", "w4a8", "w8a8-per_tensor", "w8a16", "w4a4")
# dB of each output. The lowest of 85 seeds at w8a8, w4a8 and w8a16, and of 83 at w4a4: 27.4, 17.8, 36.0, 8.5. All
# but that of w8a16 are seed 35, whose output is an image behind 14 layers of 3 to 6 channels, mostly near zero with
# tails of 12 deviations: every layer costs a dB and nothing averages it. The next ones have 32.7, 22.4, 40.1, 12.9.
# The lowest of w8a16, seed 31, has hardly more at 8 bits (33.2); why was not looked into.
# w8a8-per_tensor was measured on 6 of these seeds only; its bound is that of w8a8 less 5.
LEAST = {"w8a8": 25, "w8a8-per_tensor": 20, "w4a8": 15, "w8a16": 33, "w4a4": 6}
# dB of the median output, which for those seeds has 46.8, 42.1, 60.7, 29.7
MEDIAN = {"w8a8": 39, "w8a8-per_tensor": 38, "w4a8": 33, "w8a16": 52, "w4a4": 20}


def drawn(seed: int) -> tuple[keras.Model, list[np.ndarray]]:
    """The model of a seed and its data; what earlier seeds left is freed."""
    keras.backend.clear_session()
    gc.collect()
    model = random_model(seed)
    return model, random_data(seed, model)


def sqnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Signal to quantization noise in dB, 10 log10(sum y^2 / sum (found - y)^2)."""
    y = np.asarray(expected, np.float64)
    return float(10 * np.log10(np.sum(np.square(y)) / max(np.sum(np.square(found - y)), 1e-30)))


def nearness(model: keras.Model, content: bytes, data: list[np.ndarray]) -> list[float]:
    """SQNR of every output of the file."""
    expected = keras.tree.flatten(model(data if len(data) > 1 else data[0]))
    return [sqnr(f, y) for f, y in zip(kquant.TFLiteModel(content).predict(data), expected, strict=True)]


def check(seed: int) -> None:
    """Quantize the model of a seed and hold its file to the parity contract and to the float model."""
    (model, data), config = drawn(seed), CONFIGS[seed % len(CONFIGS)]
    before = [w.numpy().copy() for w in model.weights]
    expected = keras.tree.flatten(model(data if len(data) > 1 else data[0]))
    for found, y in zip(evaluate(trace_model(model), data), expected, strict=True):
        np.testing.assert_allclose(found, y, rtol=0, atol=1e-4 * np.abs(y).max(), err_msg=f"seed {seed}")
    qmodel = kquant.quantize_model(model, data, config, progress=False)
    content = kquant.export_tflite(qmodel).content
    report = kquant.verify_tflite(qmodel, content, random_data(seed + 1, model), tensor_samples=4)
    where = f"seed {seed}, {config}, layers {[layer.name for layer in model.layers]}\n{report}"
    assert not report.structure, where
    assert report.float_error < 1e-4, where
    assert report.reference_max_lsb == 0, where
    assert report.op_by_op_max_lsb <= 1, where
    assert min(near := nearness(model, content, data)) >= LEAST[config], f"SQNR {near}, {where}"
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(before, model.weights, strict=True)), where


@pytest.mark.parametrize("seed", range(3))
def test_parity_and_nearness_of_random_models(seed: int) -> None:
    check(seed)


def check_choices(seed: int) -> None:
    """What compares and chooses, or is written in TensorFlow: without an operation in float, and as simulated."""
    keras.backend.clear_session()
    model, config = random_choices(seed), ("w8a8", "w4a8", "w8a8-per_tensor")[seed % 3]
    data = random_data(seed, model)
    expected = np.asarray(model(data[0]))
    found = evaluate(trace_model(model), data)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=f"seed {seed}")
    qmodel = kquant.quantize_model(model, data, config, progress=False)
    content = kquant.export_tflite(qmodel, allow_float=False).content
    report = kquant.verify_tflite(qmodel, content, random_data(seed + 1, model), tensor_samples=4)
    assert report.ok, f"seed {seed}, {config}\n{report}"


@pytest.mark.parametrize("seed", range(2))
def test_random_choices(seed: int) -> None:
    check_choices(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(2, 42, 10))
def test_more_random_choices(start: int) -> None:
    for seed in range(start, start + 10):
        check_choices(seed)


@pytest.mark.parametrize("seed", [20])
def test_the_compiled_simulation_equals_the_eager_one(seed: int) -> None:
    model, data = drawn(seed)
    qmodel = kquant.quantize_model(model, data, progress=False)
    eager = keras.tree.flatten(qmodel.predict_on_batch(data))
    tf.config.run_functions_eagerly(False)
    qmodel.make_predict_function(force=True)
    for a, b in zip(eager, keras.tree.flatten(qmodel.predict_on_batch(data)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(3, 133, 10))
def test_parity_and_nearness_of_130_more_random_models(start: int) -> None:
    for seed in range(start, start + 10):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("config", MEDIAN)
def test_half_of_the_outputs_are_as_near_as_the_bits_permit(config: str) -> None:
    found = []
    for seed in range(100, 120):  # the same models at every preset
        model, data = drawn(seed)
        content = kquant.export_tflite(kquant.quantize_model(model, data, config, progress=False)).content
        found += nearness(model, content, data)
    assert np.median(found) >= MEDIAN[config] and min(found) >= LEAST[config], np.sort(np.round(found, 1))
