"""Every layer sees the inputs of the float and of the partly replaced network, whatever the cuts."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from kquant.errors import CalibrationError
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import evaluate, op_of
from kquant.graph.transforms import prepare_graph
from kquant.quantize import walk
from kquant.quantize.walk import Batches, layer_by_layer
from tests.support.odd import Odd
from tests.support.random_models import random_data, random_model
from tests.support.toy import calibration, toy_data, toy_graph


def linear(graph: Graph) -> list[str]:
    return [n.name for n in graph if op_of(n).matrix]


def perturbed(node: Node) -> Node:
    """Any change will do."""
    return node.with_weights(
        kernel=node.weights["kernel"] * np.float32(0.9), bias=node.weights["bias"] + np.float32(0.1)
    )


def inputs_of(graph: Graph, name: str, feeds: list[np.ndarray]) -> np.ndarray:
    return np.asarray(evaluate(graph, feeds, [graph[name].inputs[0]])[0])


def collect(batches: Batches) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(x.numpy(), x_hat.numpy()) for x, x_hat in batches()]
    return tuple(np.concatenate(side) for side in zip(*pairs, strict=True))


def check_walk(graph: Graph, feeds: list[np.ndarray], memory: int = 1 << 30, batch: int = 7) -> list[int]:
    """Compare every pair of inputs with runs of the whole networks; the samples that each layer saw."""
    data = [tuple(x[k : k + batch] for x in feeds) for k in range(0, len(feeds[0]), batch)]
    current, seen = graph, []

    def solve(node: Node, batches: Batches) -> Node:
        nonlocal current
        x, x_hat = collect(batches)
        used = [f[: len(x)] for f in feeds]
        np.testing.assert_allclose(x, inputs_of(graph, node.name, used), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(x_hat, inputs_of(current, node.name, used), rtol=1e-4, atol=1e-5)
        for first, second in zip(collect(batches), (x, x_hat), strict=True):
            np.testing.assert_array_equal(first, second)
        new = perturbed(graph[node.name])
        current = current.rebuild(new if n.name == node.name else n for n in current)
        seen.append(len(x))
        return new

    result = layer_by_layer(graph, linear(graph), data, solve, memory=memory, progress=False)
    assert list(result.nodes) == list(graph.nodes)
    for ours, theirs in zip(evaluate(result, feeds), evaluate(current, feeds), strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    return seen


def chain(depth: int = 6, width: int = 4) -> Graph:
    rng = np.random.default_rng(0)
    nodes = [Node(name="in", op="input", shape=(None, width))]
    for k in range(depth):
        weights = {"kernel": rng.normal(size=(width, width)).astype(np.float32), "bias": np.zeros(width, np.float32)}
        nodes.append(Node(name=f"d{k}", op="dense", inputs=(nodes[-1].name,), shape=(None, width), weights=weights))
    return Graph({n.name: n for n in nodes}, ("in",), (nodes[-1].name,), ("x",), ("y",))


def test_toy_graph() -> None:
    assert check_walk(toy_graph(), [toy_data(20)]) == [20, 20, 20]


@pytest.mark.parametrize("seed", range(4))
def test_random_models(seed: int) -> None:
    model = random_model(seed)
    check_walk(prepare_graph(model), random_data(seed, model, 10))


def test_every_choice_of_cuts_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, feeds = toy_graph(), [toy_data(20)]
    for work, size in ((0, 32 << 20), (20, 8 * 8 * 16 * 4 * 3), (10**6, 1 << 12)):
        monkeypatch.setattr(walk, "_ELEMENT_WORK", work)
        monkeypatch.setattr(walk, "_SLICE", size)
        assert check_walk(graph, feeds) == [20, 20, 20]


def test_little_memory_means_fewer_samples_at_first() -> None:
    graph, feeds = toy_graph(), [toy_data(40)]
    image = 8 * 8 * 3 * 4
    seen = check_walk(graph, feeds, memory=image * 12)
    assert seen[0] == 12 and seen[-1] == 40  # dense reads 16 numbers, the input has 192
    assert check_walk(graph, feeds, memory=1)[0] == 1


def test_samples_that_do_not_fit_at_a_later_cut_are_left_out() -> None:
    rng = np.random.default_rng(0)
    nodes = [Node(name="in", op="input", shape=(None, 2))]
    for k, (cin, cout) in enumerate([(2, 64), (64, 32), (32, 2), (2, 2)]):
        weights = {"kernel": rng.normal(size=(cin, cout)).astype(np.float32), "bias": np.zeros(cout, np.float32)}
        nodes.append(Node(name=f"d{k}", op="dense", inputs=(nodes[-1].name,), shape=(None, cout), weights=weights))
    graph = Graph({n.name: n for n in nodes}, ("in",), ("d3",), ("x",), ("y",))
    feeds = [rng.normal(size=(32, 2)).astype(np.float32)]
    seen = check_walk(graph, feeds, memory=32 * 32 * 4)
    assert seen[0] == 32 and seen[-1] == 32 and min(seen) >= 8


def test_the_same_tensor_where_nothing_was_replaced() -> None:
    same = {}

    def solve(node: Node, batches: Batches) -> Node:
        same[node.name] = all(x is x_hat for x, x_hat in batches())
        return node

    layer_by_layer(toy_graph(), ["dw", "c1", "fc"], calibration(toy_data()), solve, progress=False)
    assert same == {"c1": True, "dw": False, "fc": False}
    layer_by_layer(toy_graph(), ["fc"], calibration(toy_data()), solve, progress=False)
    assert same["fc"]


def test_work_is_linear_in_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of n equal layers is computed once or twice per network, not n / 2 times."""
    runs = []
    compute = walk.compute
    monkeypatch.setattr(walk, "compute", lambda node, *rest: runs.append(node.name) or compute(node, *rest))

    def solve(node: Node, batches: Batches) -> Node:
        list(batches())
        return perturbed(node)

    layer_by_layer(chain(16), [f"d{k}" for k in range(16)], [(np.ones((8, 4), np.float32),)], solve, progress=False)
    assert len(runs) <= 3 * 16


def test_several_inputs_ids_and_float_layers() -> None:
    ids, image = keras.Input((5,), dtype="int32"), keras.Input((6, 6, 2))
    x = keras.layers.Dense(4)(keras.layers.Embedding(10, 3)(ids))
    x = keras.layers.LayerNormalization()(x)
    x = Odd()(x)[:, 0]
    y = keras.layers.Conv2DTranspose(4, 3, 2, padding="same", activation="relu")(image)
    y = keras.layers.Conv2D(4, 3, groups=2)(y)
    z = keras.layers.Add()([x, keras.layers.GlobalAveragePooling2D()(y)])
    outputs = [keras.layers.Dense(3)(z), keras.layers.Dense(2)(keras.layers.Dense(4)(x))]
    rng = np.random.default_rng(0)
    feeds = [rng.integers(0, 10, (15, 5)).astype(np.int32), rng.normal(size=(15, 6, 6, 2)).astype(np.float32)]
    graph = prepare_graph(keras.Model([ids, image], outputs))
    assert any(n.op == "float" for n in graph)
    assert set(check_walk(graph, feeds)) == {15}


def test_nothing_to_visit() -> None:
    graph = toy_graph()
    assert list(layer_by_layer(graph, [], calibration(toy_data()), perturbed, progress=False)) == list(graph)


def test_unknown_names() -> None:
    with pytest.raises(KeyError, match="nope"):
        layer_by_layer(toy_graph(), ["nope"], calibration(toy_data()), perturbed, progress=False)


@pytest.mark.parametrize("data", [[], [(np.zeros((0, 8, 8, 3), np.float32),)]])
def test_empty_data(data: Any) -> None:
    with pytest.raises(CalibrationError, match="no samples"):
        layer_by_layer(toy_graph(), ["c1"], data, perturbed, progress=False)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(value: float) -> None:
    graph = toy_graph()
    bias = graph["dw"].weights["bias"].copy()
    bias[3] = value
    graph = graph.rebuild(n.with_weights(bias=bias) if n.name == "dw" else n for n in graph)
    graph = graph.rebuild(n.with_attrs(clip=(None, None)) if op_of(n).matrix else n for n in graph)

    def solve(node: Node, batches: Batches) -> Node:
        list(batches())
        return node

    with pytest.raises(CalibrationError, match="'(cat|add|dw|pool|mean)'.*NaN or infinite"):
        layer_by_layer(graph, linear(graph), calibration(toy_data()), solve, progress=False)


def test_regroup_and_window_keep_the_order() -> None:
    """Of a tensor with one entry for a sample, and of one with three (frames)."""
    parts = (1, 3)
    blocks = [(np.arange(k, k + n), np.arange(3 * k, 3 * (k + n))) for k, n in ((0, 3), (3, 1), (4, 9), (13, 2))]
    for rows in (1, 2, 4, 100):
        found, frames = zip(*walk._regroup(iter(blocks), rows, parts), strict=True)
        assert [len(b) for b in found[:-1]] == [rows] * (len(found) - 1)
        assert [len(f) for f in frames] == [3 * len(b) for b in found]
        np.testing.assert_array_equal(np.concatenate(found), np.arange(15))
        np.testing.assert_array_equal(np.concatenate(frames), np.arange(45))
    for start, stop in ((0, 15), (2, 4), (3, 14), (0, 100)):
        found, frames = zip(*walk._window(iter(blocks), start, stop, parts), strict=True)
        np.testing.assert_array_equal(np.concatenate(found), np.arange(15)[start:stop])
        np.testing.assert_array_equal(np.concatenate(frames), np.arange(45)[3 * start : 3 * stop])
