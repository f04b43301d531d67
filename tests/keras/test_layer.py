"""The layers of a quantized model against the arithmetic in numpy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kquant.graph.ops import evaluate
from kquant.grids.grid import Grid, fake_quantize, quantize, quantize_bias
from kquant.keras.fake_quant import FakeQuant, grid_settings
from kquant.keras.layer import QuantizedLayer
from kquant.keras.model import Learning, extract, insert
from tests.support.toy import asked, config, toy_data, toy_graph, toy_qgraph


def fake_quant(q: Grid) -> FakeQuant:
    layer = FakeQuant(**grid_settings(q))
    layer.assign(q)
    return layer


@pytest.mark.parametrize("axis", [None, 1])
def test_fake_quant_equals_numpy(axis):
    rng = np.random.default_rng(0)
    scale = np.float32(0.07) if axis is None else rng.uniform(0.01, 0.1, 5).astype(np.float32)
    q = Grid(np.asarray(scale), np.zeros_like(scale, np.int32), -128, 127, axis)
    x = rng.normal(size=(4, 5, 3)).astype(np.float32) * 10
    np.testing.assert_array_equal(fake_quant(q)(x).numpy(), fake_quantize(x, q))


def test_fake_quant_is_the_same_in_eager_graph_and_xla():
    q = Grid(np.float32(0.0371), np.int32(-5), -128, 127)
    layer, x = fake_quant(q), np.linspace(-9, 9, 10_001, dtype=np.float32)
    eager = layer(x).numpy()
    for jit in (False, True):
        np.testing.assert_array_equal(tf.function(lambda v: layer(v), jit_compile=jit)(x).numpy(), eager)


def test_gradient_is_one_inside_the_grid_and_zero_outside():
    layer = fake_quant(Grid(np.float32(0.1), np.int32(0), -10, 10))
    x = tf.constant([-5.0, -0.93, 0.0, 0.4, 3.0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(layer(x))
    np.testing.assert_allclose(tape.gradient(y, x).numpy(), [0, 1, 1, 1, 0], atol=1e-6)


def build(name: str, learning=None, **changes):
    return insert(toy_qgraph(name, **changes), asked(config(name, **changes).target), learning)


def test_linear_layer_accumulates_the_integers_of_the_target():
    model, x = build("w8a8"), toy_data(8, seed=5)
    qgraph = extract(model)
    node, w, out = qgraph.graph["c1"], qgraph.weights["c1"], qgraph.activations["c1"]
    q_in = qgraph.activations["in"]
    x_int = quantize(x, q_in) - q_in.zero_point
    w_int = quantize(node.weights["kernel"], w)
    acc = tf.nn.conv2d(x_int.astype(np.float64), w_int.astype(np.float64), 1, "SAME").numpy()
    acc += quantize_bias(node.weights["bias"], q_in.scale, w.scale)
    multiplier = (q_in.scale * w.scale / out.scale).astype(np.float32)
    expected = np.clip(np.rint(acc.astype(np.float32) * multiplier) + out.zero_point, out.qmin, out.qmax)
    expected = np.maximum(expected, out.zero_point)
    layer = model.get_layer("c1")
    grid = np.float32([q_in.scale, q_in.zero_point])
    y, (scale, zero_point) = layer([x_int.astype(np.float32) * q_in.scale], [grid])
    np.testing.assert_array_equal(np.rint(y / scale) + zero_point, expected)


@pytest.mark.parametrize("name", ["w8a8", "w8a8-per_tensor", "w4a8", "w4a4", "w8a16", "w8"])
def test_save_load_and_extract_lose_nothing(name, tmp_path):
    model, x = build(name), toy_data(8, seed=5)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    a, b = extract(model), extract(loaded)
    assert list(a.graph.nodes) == list(b.graph.nodes)
    for name in a.graph.nodes:
        for p, q in ((a.activations[name], b.activations[name]), (a.weights.get(name), b.weights.get(name))):
            assert (p is None) == (q is None)
            if p is not None:
                np.testing.assert_array_equal(p.scale, q.scale)
                np.testing.assert_array_equal(p.zero_point, q.zero_point)
                assert (p.qmin, p.qmax, p.axis) == (q.qmin, q.qmax, q.axis)
        for key, value in a.graph[name].weights.items():
            np.testing.assert_array_equal(value, b.graph[name].weights[key])


@pytest.mark.parametrize("bits, bound", [(8, 0.02), (16, 0.01)])
def test_simulation_approaches_the_float_graph(bits, bound):
    x = toy_data(16, seed=5)
    expected = evaluate(toy_graph(), [x])[0].numpy()
    assert np.abs(build(f"w8a{bits}").predict(x, verbose=0) - expected).max() < bound


def test_all_values_lie_on_their_grid():
    model, x = build("w4a4"), toy_data(8, seed=5)
    qgraph = extract(model)
    layers = [layer for layer in model.layers if isinstance(layer, QuantizedLayer)]
    probe = keras.Model(model.inputs, [layer.output[0] for layer in layers])
    for layer, y in zip(layers, probe.predict(x, verbose=0), strict=True):
        q = qgraph.activations[layer.node.name]
        integers = y / q.scale + q.zero_point
        assert np.abs(integers - np.rint(integers)).max() < 1e-3
        assert integers.min() > q.qmin - 0.5 and integers.max() < q.qmax + 0.5


def test_gradients_reach_weights_through_every_layer():
    model, x = build("w8a8", Learning()), toy_data(4, seed=5)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x) ** 2)
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    assert len(gradients) == 6
    assert all(g is not None and np.isfinite(g).all() and np.abs(g).max() > 0 for g in gradients)
