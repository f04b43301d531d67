"""Switched models: all off is the float network, all on the simulation, and one trace serves every combination."""

from __future__ import annotations

from functools import cache
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import kquant
from kquant.diagnosis.switches import SwitchedModel, rounded
from kquant.errors import ConfigError, ModelError
from kquant.graph.ops import evaluate
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import fake_quantize
from kquant.keras.model import insert
from kquant.quantize.plan import make_plan
from models import digits_cnn
from tests.support import zoo
from tests.support.toy import asked, config, toy_data, toy_graph, toy_qgraph


@cache
def toy(name: str = "w8a8") -> tuple[SwitchedModel, QuantizedGraph, keras.Model]:
    plan = make_plan(toy_graph(), config(name))
    qgraph = toy_qgraph(name)
    return (
        SwitchedModel(qgraph, plan.target),
        qgraph,
        insert(qgraph, asked(plan.target.name)),
    )


def in_float(qgraph: QuantizedGraph, feeds: list[np.ndarray]) -> list[Any]:
    """The float graph, compiled as the switched model is."""
    return tf.function(lambda x: evaluate(qgraph.graph, x), autograph=False)([tf.constant(f) for f in feeds])


def test_all_off_is_the_float_graph() -> None:
    """Up to float32 rounding: oneDNN fuses the operations of the two graphs in different ways."""
    model, qgraph, _ = toy()
    x = toy_data(20, seed=5)
    model.switch(model.names)
    model.switch(())
    expected = in_float(qgraph, [x])[0]
    for found in (model.predict(x, verbose=0), model(x)):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["w8a8", "w8a16"])
def test_all_on_is_the_simulation_up_to_roundings(name: str) -> None:
    model, qgraph, simulation = toy(name)
    x, nodes = toy_data(60, seed=5), ["c1", "dw", "add", "dw/requantize", "cat", "pool"]
    layers = {layer.node.name: layer for layer in simulation.layers if hasattr(layer, "node")}
    inner = keras.Model(simulation.inputs, [layers[n].output[0] for n in nodes])
    model.switch(model.names)
    for node, found, expected in zip(nodes, model.tensors([x], nodes), inner(x), strict=True):
        off = np.rint((found - expected) / float(qgraph.activations[node].scale))  # type: ignore[union-attr]
        assert np.mean(off == 0) > 0.85 and np.abs(off).max() <= 3
    output = np.rint((model.predict(x, verbose=0) - simulation.predict(x, verbose=0)) * 256)
    assert np.mean(output == 0) > 0.5 and (name != "w8a8" or np.mean(output == 0) > 0.9)


def test_all_on_decides_as_the_simulation_does() -> None:
    digits = digits_cnn.load_split()
    qmodel = kquant.quantize_model(keras.saving.load_model(digits_cnn.PATH), digits.calibration, "w8a8", progress=False)
    model = SwitchedModel.of(qmodel)
    model.switch(model.names)
    found, expected = (m.predict(digits.x_test, verbose=0) for m in (model, qmodel))
    assert np.mean(found.argmax(-1) == expected.argmax(-1)) >= 0.99
    step = model.quantizers[-1].grid.scale
    assert np.mean(np.abs(found - expected) < step / 2) > 0.9


@pytest.mark.parametrize("name", ["upsampling", "fire_and_pool", "dict_inputs_and_outputs", "lstm"])
def test_models_of_all_kinds(name: str) -> None:
    """Float layers, resizing, pools on a shared grid, several inputs: float when off, near the simulation when on."""
    user = zoo.build(name)
    x = zoo.inputs(user)
    qmodel = kquant.quantize_model(user, x, progress=False)
    model = SwitchedModel.of(qmodel)
    found, expected = (keras.tree.flatten(m.predict(x, verbose=0)) for m in (model, user))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())
    model.switch(model.names)
    outputs = model.qgraph.graph.outputs
    found, expected = (keras.tree.flatten(m.predict(x, verbose=0)) for m in (model, qmodel))
    for output, ours, theirs in zip(outputs, found, expected, strict=True):
        q = model.qgraph.activations[output]
        step = float(q.scale) if q is not None else 0.02 * np.abs(theirs).max()
        assert np.mean(np.abs(ours - theirs) < 0.5 * step) > 0.6 and np.abs(ours - theirs).max() < 4 * step


def test_one_quantizer_alone_rounds_one_tensor() -> None:
    model, qgraph, _ = toy("w4a8")
    x = toy_data(4, seed=5)
    model.switch(["c1:activations"])
    graph = qgraph.graph
    c1, added, dw = (t.numpy() for t in model.tensors([x], ["c1", "add", "dw"]))
    plain = evaluate(graph, [x], ["c1"])[0].numpy()
    np.testing.assert_allclose(c1, fake_quantize(plain, qgraph.activations["c1"]), atol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_array_equal(added, c1 + dw)
    model.switch(["c1:weights"])
    changed = model.tensors([x], ["c1"])[0].numpy()
    kernel = fake_quantize(graph["c1"].weights["kernel"], qgraph.weights["c1"])  # type: ignore[arg-type]
    node = graph["c1"].with_weights(kernel=kernel)
    expected = evaluate(graph.rebuild(node if n.name == "c1" else n for n in graph), [x], ["c1"])[0]
    np.testing.assert_allclose(changed, expected, atol=1e-6)


def test_tensors_on_a_shared_grid_have_one_quantizer() -> None:
    model, qgraph, _ = toy()
    nodes = {q.node for q in model.quantizers if q.kind == "activations"}
    assert {"pool", "cat"}.isdisjoint(nodes) and {"in", "c1", "dw", "add", "mean", "fc", "sm"} <= nodes
    assert [q.node for q in model.quantizers if q.kind == "weights"] == ["c1", "dw", "fc"]
    assert [q.name for q in model.quantizers] == list(model.names)
    model.switch(["add:activations"])  # the concatenation and the pool behind it are on its grid
    pooled = model.tensors([toy_data(3)], ["pool"])[0].numpy()
    np.testing.assert_allclose(pooled, fake_quantize(pooled, qgraph.activations["pool"]), atol=1e-6)  # type: ignore[arg-type]


def test_switching_retraces_nothing() -> None:
    plan = make_plan(toy_graph(), config())
    traces = 0

    class Counting(SwitchedModel):
        def tensors(self, *args: Any) -> Any:
            nonlocal traces
            traces += 1
            return super().tensors(*args)

    model = Counting(toy_qgraph(), plan.target)
    model.compile(metrics=["accuracy"], loss="mse")
    x = toy_data(8)
    results = {float(model.predict(x, verbose=0).sum(dtype=np.float64))}
    before = traces
    for name in model.names:
        model.switch([name])
        results.add(float(np.abs(model.predict(x, verbose=0)).max()))
    assert traces == before and len(results) > len(model.names) / 2


def test_evaluate_and_call_follow_the_switches() -> None:
    model, _, _ = toy("w4a4")
    x, y = toy_data(16), np.zeros((16, 5), np.float32)
    model.compile(loss="mse")
    losses = []
    for on in ((), model.names):
        model.switch(on)
        losses.append(model.evaluate(x, y, verbose=0))
        assert losses[-1] == pytest.approx(float(np.mean(np.square(model(x)))), rel=1e-4)
    assert losses[0] != losses[1]


def test_stream_does_not_depend_on_the_batches() -> None:
    model, qgraph, _ = toy()
    model.switch(())
    x = toy_data(30)

    def largest(batches: list[list[np.ndarray]]) -> np.ndarray:
        found = model.stream(batches, ["dw", "fc"], lambda t: [tf.reduce_max(v) for v in t])
        return np.max([list(f) for f in found], axis=0)

    expected = [np.max(v) for v in evaluate(qgraph.graph, [x], ["dw", "fc"])]
    np.testing.assert_allclose(largest([[x]]), expected, rtol=1e-6)
    np.testing.assert_allclose(largest([[x[:7]], [x[7:]]]), expected, rtol=1e-6)


def test_rounding_is_that_of_numpy() -> None:
    _, qgraph, _ = toy("w4a8")
    q = qgraph.weights["c1"]
    assert q is not None
    w = np.random.default_rng(0).normal(size=(3, 3, 3, 8)).astype(np.float32)
    np.testing.assert_array_equal(rounded(tf.constant(w), q), fake_quantize(w, q))


def test_unknown_names_and_plain_models_are_refused() -> None:
    model, _, _ = toy()
    with pytest.raises(ConfigError, match=r"c1:weight'.*did you mean 'c1:weights'"):
        model.switch(["c1:weight"])
    with pytest.raises(ModelError, match="not a quantized model"):
        SwitchedModel.of(zoo.build("activations"))
