"""Average poolings on grids of their own, from end to end."""

import keras
import numpy as np
import pytest

import kquant
from tests.support.toy import config

L = keras.layers


def pooled(settings, padding="valid"):
    """A model of one pooling, its data, and the grids of its input and output."""
    image = keras.Input((12, 12, 3))
    model = keras.Model(image, L.AveragePooling2D(3, padding=padding, strides=2, name="pool")(image))
    x = np.random.default_rng(0).normal(size=(64, 12, 12, 3)).astype("float32")
    return model, x, kquant.quantize_model(model, x, config=settings, progress=False)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_an_average_has_the_resolution_of_its_own_values(padding: str) -> None:
    model, x, qmodel = pooled("w8a8", padding)
    error = qmodel.predict(x, verbose=0) - model.predict(x, verbose=0)
    # means of nine numbers reach a third as far: the grid of the input alone would add step / sqrt(12)
    step = np.abs(x).max() / 127
    assert np.sqrt(np.mean(error**2)) < 0.75 * step / np.sqrt(12)
    assert kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, x).ok


@pytest.mark.parametrize("settings, operators", [("w8a8", "DEPTHWISE_CONV_2D"), ("w8a16", "AVERAGE_POOL_2D")])
def test_sixteen_bits_keep_the_grid_of_the_input(settings: str, operators: str) -> None:
    _, _, qmodel = pooled(settings)
    assert kquant.export_tflite(qmodel).op_counts.get(operators) == 1


def test_a_target_without_the_kernel_keeps_the_pooling() -> None:
    from dataclasses import replace

    from kquant.targets.litert.target import LITERT
    from kquant.targets.target import register_target

    kernels = {op: k for op, k in LITERT.kernels.items() if op != "window_mean"}
    name = register_target(replace(LITERT, name="without_means", kernels=kernels)).name
    _, _, qmodel = pooled(config(target=name))
    assert kquant.export_tflite(qmodel).op_counts.get("AVERAGE_POOL_2D") == 1


def test_padded_windows_of_what_is_smooth_keep_the_grid_of_the_input() -> None:
    """The averages reach as far as the input does: one rounding is better than two."""
    image = keras.Input((12, 12, 3))
    model = keras.Model(image, L.AveragePooling2D(3, 2, padding="same")(image))
    levels = np.random.default_rng(0).uniform(-1, 1, (64, 1, 1, 3))
    x = np.broadcast_to(levels, (64, 12, 12, 3)).astype("float32").copy()
    qmodel = kquant.quantize_model(model, x, config("w8a8"), progress=False)
    assert kquant.export_tflite(qmodel).op_counts.get("AVERAGE_POOL_2D") == 1
