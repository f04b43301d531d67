"""Padding with constants: infinity, and constants outside the range of what they pad."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.graph.ops import LOWEST, evaluate
from kquant.graph.transforms import prepare_graph

LOWEST_FLOAT = float(np.finfo(np.float32).min)


def padded(value: float, *, pooled: bool, size: int = 1) -> keras.Model:
    """A convolution with a ReLU, a constant border, and a max pooling or a convolution."""
    keras.utils.set_random_seed(3)
    image = keras.Input((10, 10, 3))
    x = layers.Conv2D(6, 3, activation=None if pooled else "relu")(image)
    x = keras.ops.pad(x, ((0, 0), (size, size), (size, size), (0, 0)), constant_values=value)
    x = layers.MaxPooling2D(3, strides=2)(x) if pooled else layers.Conv2D(4, 3)(x)
    return keras.Model(image, layers.Conv2D(5, 1)(x))


def images(n: int = 16) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(n, 10, 10, 3)).astype(np.float32)


def decibels(expected: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(expected**2) / np.sum((expected - found) ** 2)))


@pytest.mark.parametrize("value", [-np.inf, LOWEST_FLOAT, -1e30])
def test_a_border_that_no_maximum_takes_is_finite_and_computes_the_same(value: float) -> None:
    model = padded(value, pooled=True)
    graph = prepare_graph(model)
    assert [n.attrs["value"] for n in graph if n.op == "pad"] == [LOWEST]
    (found,) = evaluate(graph, [images()])
    assert np.allclose(found, model.predict(images(), verbose=0), atol=1e-5)


@pytest.mark.parametrize(
    "config, least",
    [("w8a8", 34), *(pytest.param(c, n, marks=pytest.mark.slow) for c, n in (("w8a16", 38), ("w4a4", 14)))],
)
@pytest.mark.parametrize("value, pooled", [(-np.inf, True), (-1e9, True), (4.0, True), (-1.0, False), (2.0, False)])
def test_a_border_outside_the_range_is_kept(value: float, pooled: bool, config: str, least: float) -> None:
    model = padded(value, pooled=pooled)
    qmodel = kquant.quantize_model(model, images(), config=config, progress=False)
    content = kquant.export_tflite(qmodel).content
    assert kquant.verify_tflite(qmodel, content, images(8)).ok
    expected, found = model.predict(images(), verbose=0), kquant.TFLiteModel(content).predict(images())[0]
    inside = (slice(None), slice(1, -1), slice(1, -1))
    assert decibels(expected, found) > least
    assert decibels(expected[inside], found[inside]) > least - 4


def test_a_border_below_all_values_does_not_widen_the_range() -> None:
    def step(value: float) -> float:
        qmodel = kquant.quantize_model(padded(value, pooled=True), images(), progress=False)
        return float(next(n.output_quantizer.scale for k, n in qmodel.quantized_layers.items() if k.startswith("conv")))

    assert step(-1e9) == step(-np.inf)
    assert step(100.0) > 10 * step(-1e9)


@pytest.mark.parametrize("value, pooled, size", [(-np.inf, False, 1), (np.inf, True, 1), (-np.inf, True, 3)])
def test_infinity_that_is_seen_is_refused_by_name(value: float, pooled: bool, size: int) -> None:
    with pytest.raises(kquant.ModelError, match=r"'pad.*pads with -?inf.*Pad with a value of the size"):
        prepare_graph(padded(value, pooled=pooled, size=size))


def test_a_constant_outside_a_fixed_range_is_refused_by_name() -> None:
    image = keras.Input((6, 6, 2))
    x = keras.ops.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-3.0)
    model = keras.Model(image, layers.Conv2D(2, 3)(x))
    config = {"preset": "w8a8", "inputs": {"range": [-1.0, 1.0]}}
    with pytest.raises(kquant.ConfigError, match=r"'pad.*pads with -3.*widen"):
        kquant.quantize_model(model, np.zeros((4, 6, 6, 2), np.float32), config=config, progress=False)
