"""The handle: names and grids of quantizers, their states, and the tensors of the network as it is switched."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import kquant
from kquant.diagnosis.switches import Switches
from kquant.errors import ConfigError, ModelError
from kquant.graph.ir import Node
from kquant.graph.ops import evaluate
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import fake_quantize
from kquant.keras.model import insert
from tests.support import zoo
from tests.support.graphs import chain, quantized
from tests.support.same import assert_same
from tests.support.toy import asked, config, toy_data, toy_qgraph


@cache
def toy(name: str = "w8a8") -> tuple[Switches, QuantizedGraph]:
    return Switches.of(toy_qgraph(name)), toy_qgraph(name)


def test_one_quantizer_alone_rounds_one_tensor() -> None:
    switches, qgraph = toy("w4a8")
    x = toy_data(4, seed=5)
    switches.switch(["c1:activations"])
    assert switches.on == ("c1:activations",)
    graph = qgraph.graph
    c1, added, dw = (t.numpy() for t in switches.tensors([x], ["c1", "add", "dw"]))
    plain = evaluate(graph, [x], ["c1"])[0].numpy()
    np.testing.assert_allclose(c1, fake_quantize(plain, qgraph.activations["c1"]), atol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_array_equal(added, c1 + dw)
    switches.switch(["c1:weights"])
    assert switches.on == ("c1:weights",)
    changed = switches.tensors([x], ["c1"])[0].numpy()
    kernel = fake_quantize(graph["c1"].weights["kernel"], qgraph.weights["c1"])  # type: ignore[arg-type]
    other = graph["c1"].with_weights(kernel=kernel)
    expected = evaluate(graph.rebuild(other if n.name == "c1" else n for n in graph), [x], ["c1"])[0]
    np.testing.assert_allclose(changed, expected, atol=1e-6)


def test_tensors_on_a_shared_grid_have_one_quantizer() -> None:
    switches, qgraph = toy()
    nodes = {q.node for q in switches.quantizers if q.kind == "activations"}
    assert {"pool", "cat"}.isdisjoint(nodes) and {"in", "c1", "dw", "add", "mean", "fc", "sm"} <= nodes
    assert [q.node for q in switches.quantizers if q.kind == "weights"] == ["c1", "dw", "fc"]
    assert [q.name for q in switches.quantizers] == list(switches.names)
    graph = qgraph.graph
    for q in switches.quantizers:
        grid = (qgraph.weights if q.kind == "weights" else qgraph.activations)[q.node]
        assert grid is not None and q.bits == grid.bits and (q.layer, q.op) == (graph[q.node].origin, graph[q.node].op)
        np.testing.assert_array_equal(q.grid.scale, grid.scale)
    switches.switch(["add:activations"])  # the concatenation and the pool behind it are on its grid
    pooled = switches.tensors([toy_data(3)], ["pool"])[0].numpy()
    np.testing.assert_allclose(pooled, fake_quantize(pooled, qgraph.activations["pool"]), atol=1e-6)  # type: ignore[arg-type]


def test_a_constant_that_two_layers_read_has_one_switch() -> None:
    rng, shape = np.random.default_rng(0), (None, 4)
    value, x = rng.normal(size=4).astype(np.float32), rng.normal(size=(6, 4)).astype(np.float32)
    constant = Node(name="k", op="const", shape=(4,), weights={"value": value})
    first = Node(name="first", op="add", inputs=("x", "k"), shape=shape)
    second = Node(name="again", op="mul", inputs=("first", "k"), shape=shape)
    qgraph = quantized(chain((4,), first, second, consts=[constant]), [x])
    switches = Switches.of(qgraph)
    assert switches.names == tuple(f"{n}:activations" for n in qgraph.graph.nodes)
    switches.switch(["k:activations"])
    on_grid = fake_quantize(value, qgraph.activations["k"])  # type: ignore[arg-type]
    assert not np.array_equal(on_grid, value)
    np.testing.assert_allclose(switches.tensors([x], ["again"])[0], (x + on_grid) * on_grid, atol=1e-6)


def test_stream_does_not_depend_on_the_batches() -> None:
    switches, qgraph = toy()
    switches.switch(())
    x = toy_data(30)

    def largest(batches: list[list[np.ndarray]]) -> np.ndarray:
        found = switches.stream(batches, ["dw", "fc"], lambda t: [tf.reduce_max(v) for v in t])
        return np.max([list(f) for f in found], axis=0)

    expected = [np.max(v) for v in evaluate(qgraph.graph, [x], ["dw", "fc"])]
    np.testing.assert_allclose(largest([[x]]), expected, rtol=1e-6)
    np.testing.assert_allclose(largest([[x[:7]], [x[7:]]]), expected, rtol=1e-6)


@pytest.mark.compiled
def test_switching_retraces_nothing() -> None:
    switches = Switches.of(toy_qgraph())
    traces = 0

    def summarize(tensors: list[Any]) -> Any:
        nonlocal traces
        traces += 1
        return tf.reduce_sum(tf.abs(tensors[0]))

    def states() -> Any:
        for names in ((), *([name] for name in switches.names)):
            switches.switch(names)
            yield [toy_data(8)]

    results = {float(v) for v in switches.stream(states(), ["fc"], summarize)}
    assert traces == 1 and len(results) > len(switches.names) / 2


def test_the_switches_know_what_they_switch() -> None:
    switches, qgraph = toy("w4a8")
    assert_same(qgraph, switches.qgraph)
    assert switches.target is kquant.get_target(config("w4a8").target)
    assert Switches(switches.model).on == ()


def test_unknown_names_and_models_without_switches_are_refused() -> None:
    switches, qgraph = toy()
    with pytest.raises(ConfigError, match=r"c1:weight'.*did you mean 'c1:weights'"):
        switches.switch(["c1:weight"])
    with pytest.raises(ModelError, match="not a quantized model"):
        Switches.of(zoo.build("activations"))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"cannot be switched.*Switches\.of"):
        Switches(insert(qgraph, asked("litert")))
