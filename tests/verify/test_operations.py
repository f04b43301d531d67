"""Whole models of operations that choose, order and count: simulation, file and Keras say the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import kquant

k, L = keras.ops, keras.layers
SHAPE = (8, 6, 4)


def built(function: Callable[[Any], Any]) -> tuple[keras.Model, np.ndarray]:
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input(SHAPE)
    model = keras.Model(inputs, function(L.Conv2D(4, 1)(x)))
    return model, np.random.default_rng(0).normal(size=(32, *SHAPE)).astype(np.float32)


def quantized(function: Callable[[Any], Any], config: Any = "w8a8") -> tuple[Any, Any, np.ndarray, list[np.ndarray]]:
    """(quantized model, export report, data, outputs of the float model), parity checked."""
    model, data = built(function)
    q = kquant.quantize_model(model, data, config=config, progress=False)
    report = kquant.export_tflite(q)
    parity = kquant.verify_tflite(q, report.content, data)
    assert parity.ok, str(parity)
    return q, report, data, [np.asarray(y) for y in keras.tree.flatten(model.predict(data, verbose=0))]


def decibels(expected: np.ndarray, found: np.ndarray) -> float:
    noise = np.square(expected.astype(np.float64) - found).mean()
    return float(10 * np.log10(np.square(expected.astype(np.float64)).mean() / (noise + 1e-30)))


CASES: dict[str, Callable[[Any], Any]] = {
    "where": lambda x: k.where(k.flip(x, 1) > 0.1, x, L.Conv2D(4, 1)(x) * 0.1 + x),
    "minimum": lambda x: k.min(x, axis=(1, 2)),
    "variance": lambda x: k.var(x, axis=-1, keepdims=True),
    "deviation": lambda x: k.std(x, axis=(1, 2)),
    "cumulative": lambda x: k.cumsum(x, axis=1),
    "logarithms": lambda x: k.log_softmax(3.0 * x),
    "log of a sum": lambda x: k.logsumexp(x, axis=-1),
    "largest": lambda x: k.top_k(x, 2)[0],
    "sorted": lambda x: k.sort(x, axis=1),
    "taken": lambda x: k.take(x, [[3, 0], [-1, 2]], axis=1),
    "taken along": lambda x: k.take_along_axis(x, k.argmax(x, axis=2, keepdims=True), axis=2),
    "rolled": lambda x: k.roll(x, (1, -2), axis=(1, 2)),
    "repeated": lambda x: k.tile(k.repeat(x, 2, axis=2), (1, 2, 1, 1)),
    "patches": lambda x: k.image.extract_patches(x, 3, strides=2, padding="same"),
    "bicubic": L.Resizing(11, 9, interpolation="bicubic"),
    "antialiased": lambda x: k.image.resize(x, (5, 3), antialias=True),
    "cropped": L.CenterCrop(5, 6),
    "gated": lambda x: k.glu(x) + 0.5,
    "products": lambda x: k.einsum("bijc,bijd->bcd", x, k.tanh(x)),
    "dot": lambda x: L.Dot(axes=(1, 1))([L.Reshape((48, 4))(x), L.Reshape((48, 4))(k.tanh(x))]),
    "divided": lambda x: L.Conv2D(4, 1)(x) / (1.5 + k.abs(x)),
    "normalized weights": L.SpectralNormalization(L.Conv2D(3, 2)),
}

if hasattr(L, "AdaptiveAveragePooling2D"):
    CASES["adaptive"] = L.AdaptiveAveragePooling2D((3, 4))
    CASES["adaptive maximum"] = L.AdaptiveMaxPooling2D((3, 4))


@pytest.mark.slow
def test_in_integers() -> None:
    q, report, data, expected = quantized(lambda x: [function(x) for function in CASES.values()])
    assert not report.float_ops
    found, simulated = kquant.TFLiteModel(report.content).predict(data), q.predict(data, verbose=0)
    for name, real, file, ours in zip(CASES, expected, found, simulated, strict=True):
        np.testing.assert_array_equal(file, ours, err_msg=name)
        assert decibels(real, file) > 28, name


@pytest.mark.parametrize("config", ["w8a8", "w8a16"])
def test_places_are_integers(config: str) -> None:
    def places(x: Any) -> Any:
        best = k.argmax(x, axis=-1)
        return [best, best[:, 1:3], k.argmin(x, axis=1, keepdims=True), k.top_k(x, 2)[1], x > 0.5]

    q, report, data, expected = quantized(places, config)
    found = kquant.TFLiteModel(report.content).predict(data)
    simulated = [np.asarray(y) for y in q.predict(data, verbose=0)]
    for real, file, ours in zip(expected, found, simulated, strict=True):
        assert file.dtype == ours.dtype == real.dtype and file.shape == real.shape
        np.testing.assert_array_equal(file, ours)
        assert np.mean(file == real) > 0.95
    as_bytes = kquant.export_tflite(q, output_type="int8").content  # places have no grid: they stay what they are
    for file, ours in zip(kquant.TFLiteModel(as_bytes).predict(data), simulated, strict=True):
        np.testing.assert_array_equal(file, ours)


def test_a_model_with_functions_is_saved_and_trained(tmp_path: Path) -> None:
    def head(x: Any) -> Any:
        return L.Dense(3)(L.Flatten()(k.softplus(x) * k.where(x > 0, 1.0, k.sin(x))))

    model, data = built(head)
    trained = kquant.prepare_qat(model, data, progress=False)
    trained.compile("sgd", "mse")
    losses = trained.fit(data, np.zeros((len(data), 3), np.float32), epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    trained.save(tmp_path / "model.keras")
    content = kquant.export_tflite(trained).content
    assert kquant.export_tflite(keras.models.load_model(tmp_path / "model.keras")).content == content
    assert kquant.verify_tflite(trained, content, data).ok


def test_sixteen_bits_have_no_table() -> None:
    model, data = built(k.softplus)
    q = kquant.quantize_model(model, data, config="w8a16", progress=False)
    report = kquant.export_tflite(q)
    ((layer, reason),) = report.float_ops
    assert "softplus" in layer and reason == "litert has no 16-bit kernel for function"
    assert kquant.verify_tflite(q, report.content, data).ok


def test_a_mask_beside_numbers_stays_float() -> None:
    """One grid cannot hold -1e9 and the numbers."""
    model, data = built(lambda x: k.where(x > 0, x, -1e9))
    q = kquant.quantize_model(model, data, progress=False)
    (skip,) = q.quantization.skipped
    assert "where" in skip.layer and "mask" in skip.reason
    (found,), want = kquant.TFLiteModel(kquant.export_tflite(q).content).predict(data), model.predict(data, verbose=0)
    clear = want > 0.02 * want.max()  # others may round to 0
    assert np.abs(found - want)[clear].max() < 0.02 * want.max() and (found[want < 0] < -9e8).mean() > 0.98


@pytest.mark.parametrize("masked", [lambda x: k.where(x > 0, x, -1e9), lambda x: x + k.cast(x <= 0, "float32") * -1e9])
def test_a_mask_in_front_of_a_maximum_is_an_integer(masked: Any) -> None:
    """The largest of the numbers that a mask leaves, as in pooling over the tokens of a sentence."""
    model, data = built(lambda x: k.max(masked(x), axis=1))
    q = kquant.quantize_model(model, data, progress=False)
    assert not q.quantization.skipped
    (found,), want = kquant.TFLiteModel(kquant.export_tflite(q).content).predict(data), model.predict(data, verbose=0)
    seen = want > 0
    assert seen.mean() > 0.5 and np.abs(found - want)[seen].max() < 0.02 * want.max()


@pytest.mark.parametrize("lo, hi", [(-1.0, 1.0), (-1.0, 0.3), (-0.5, 0.5)])
def test_a_bound_at_the_floor_of_16_bits_is_that_of_the_kernel(lo: float, hi: float) -> None:
    """An activation that the convolution applies ends at -32767, saturation at -32768."""
    model, data = built(lambda x: k.clip(L.Conv2D(4, 3)(x) * 3.0, lo, hi))
    q = kquant.quantize_model(model, data, "w8a16", progress=False)
    parity = kquant.verify_tflite(q, kquant.export_tflite(q).content, data)
    assert parity.ok and parity.op_by_op_max_lsb == 0


TRUTHS: dict[str, Callable[[Any], Any]] = {
    "above": lambda x: x > 0.25,
    "equal": lambda x: k.equal(k.relu(x), 0.0),
    "between": lambda x: k.logical_and(x > -0.5, x < 0.5),
    "always": lambda x: k.relu(x) >= -3.0,
    "never": lambda x: k.relu(x) < -3.0,
    "of two": lambda x: k.logical_or(x > 0.25, k.flip(x, 1) > 0.25),
    "choice": lambda x: k.where(k.flip(x, 1) > 0.1, x, k.tanh(x)),
}


@pytest.mark.parametrize(("config", "target"), [("w8a8", "litert"), ("w8a16", "litert"), ("w8a8", "tflm")])
def test_truth_values_in_integers(config: str, target: str) -> None:
    q, report, data, expected = quantized(lambda x: [f(x) for f in TRUTHS.values()], on(target, config))
    assert not report.float_ops and "DEQUANTIZE" not in report.op_counts
    for name, real, ours in zip(TRUTHS, expected, q.predict(data, verbose=0), strict=True):
        assert ours.dtype == real.dtype and (name == "choice" or np.mean(ours == real) > 0.97), name


@pytest.mark.parametrize("target", ["litert", "tflm"])
def test_numbers_of_truth_values_in_integers(target: str) -> None:
    def numbers(x: Any) -> list[Any]:
        both = k.logical_and(x > 0.0, k.flip(x, 1) > 0.0)
        return [k.where(both, 0.75, -0.25), k.cast(both, "float32") * x, k.cast(k.any(both, axis=2), "float32")]

    q, report, data, expected = quantized(numbers, on(target))
    assert not report.float_ops
    for real, ours in zip(expected, q.predict(data, verbose=0), strict=True):
        assert np.mean(np.abs(ours - real) < 0.03) > 0.97  # one step


def on(target: str, config: str = "w8a8") -> kquant.QuantConfig:
    """A preset for a target, which is installed."""
    if target == "tflm":
        pytest.importorskip("tflite_micro", reason="tflite-micro is not installed: pip install .[tflm]")
    return replace(kquant.QuantConfig.preset(config), target=target)


@pytest.mark.parametrize("target", ["litert", "tflm"])
@pytest.mark.parametrize("size", [1e-6, 1e-12])
def test_scores_that_vanish(size: float, target: str) -> None:
    """On so fine a scale the kernels of softmax abort the process: the grid is wider, and all classes are alike."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    model = keras.Model(
        inputs,
        L.Dense(4, activation="softmax", kernel_initializer=keras.initializers.RandomNormal(stddev=size))(inputs),
    )
    data = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    q = kquant.quantize_model(model, data, on(target), progress=False)
    content = kquant.export_tflite(q, allow_float=False).content
    assert kquant.verify_tflite(q, content, data).ok
    np.testing.assert_allclose(kquant.TFLiteModel(content).predict(data)[0], 0.25, atol=1 / 256)
