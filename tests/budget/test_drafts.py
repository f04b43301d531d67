"""Predicted bytes are those of the file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest

import kquant
from kquant.budget.drafts import Drafts, cost_tables
from kquant.budget.groups import Group, config_of, groups_of, uniform
from kquant.graph.transforms import prepare_graph
from kquant.quantize.data import CalibrationData
from kquant.targets.litert.reader import read
from kquant.targets.litert.timing import signature


def network() -> tuple[keras.Model, np.ndarray]:
    """Every kind of convolution, a residual sum and a layer of two operations; biases are zero."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 4))
    y = z = keras.layers.Conv2D(8, 3, padding="same", activation="relu", name="conv")(x)
    y = keras.layers.DepthwiseConv2D(3, padding="same", activation="relu", name="depthwise")(y)
    y = keras.layers.Add(name="add")([keras.layers.Conv2D(8, 1, name="pointwise")(y), z])
    y = keras.layers.SeparableConv2D(8, 3, activation="relu", name="separable")(y)
    y = keras.layers.GlobalAveragePooling2D()(y)
    y = keras.layers.Dense(8, activation="relu", name="hidden")(y)
    model = keras.Model(inputs, keras.layers.Softmax()(keras.layers.Dense(5, name="head")(y)))
    return model, np.random.default_rng(0).normal(size=(24, 8, 8, 4)).astype(np.float32)


def drafts(target: str = "litert", preset: str = "w8a8", prefer: str | None = "bytes") -> tuple[Drafts, Any, Any]:
    model, data = network()
    graph = prepare_graph(model)
    names = zip(graph.inputs, graph.input_names, strict=True)
    specs = [(name, graph[node].shape, graph[node].dtype) for node, name in names]
    base = replace(kquant.QuantConfig.load(preset), target=target, prefer=prefer, widen=False)
    found = Drafts(graph, base, CalibrationData(data, specs), ("max_bytes",))
    return found, groups_of(found.plan(base)[0]), (model, data)


def random_bits(groups: tuple[Group, ...], rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(rng.choice(g.bits)) for g in groups)


def compare(seed: int, count: int, **options: Any) -> None:
    d, groups, (model, data) = drafts(**options)
    rng = np.random.default_rng(seed)
    for _ in range(count):
        config = config_of(d.base, groups, random_bits(groups, rng))
        predicted = d.content(config)
        real = kquant.export_tflite(kquant.quantize_model(model, data, config, progress=False)).content
        assert len(predicted) == len(real), config.rules
        assert [signature(op) for op in read(predicted).operators] == [signature(op) for op in read(real).operators]


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"target": "tflm"}),
        *(pytest.param(o, marks=pytest.mark.slow) for o in ({"preset": "w8a16"}, {"preset": "w4a4"}, {"prefer": None})),
        pytest.param({"target": "ethos_u"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_draft_has_the_bytes_and_operators_of_the_file(options: dict[str, Any]) -> None:
    compare(seed=1, count=1, **options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_predicted_bytes_equal_the_files_over_200_random_configs(seed: int) -> None:
    compare(seed, 25)


def test_groups_are_the_users_layers_and_have_what_kernels_take() -> None:
    _, groups, _ = drafts()
    found = {g.layer: g for g in groups}
    assert list(found) == ["conv", "depthwise", "pointwise", "separable", "hidden", "head"]
    assert len(found["separable"].nodes) == 2
    assert found["conv"].bits == found["depthwise"].bits == (4, 8)
    assert found["pointwise"].bits == found["head"].bits == found["separable"].bits == (2, 4, 8)
    assert found["conv"].size == 3 * 3 * 4 * 8 and found["conv"].macs == 8 * 8 * 3 * 3 * 4 * 8
    assert {g.bits for g in drafts(target="ethos_u")[1]} == {(2, 3, 4, 5, 6, 8)}
    micro = {g.layer: g.bits for g in drafts(target="tflm")[1]}
    assert micro["pointwise"] == (4, 8) and micro["head"] == (8,)


def test_tables_of_costs_are_near_the_drafts() -> None:
    """What is left is alignment, and what the structure of the file takes."""
    d, groups, _ = drafts()
    tables, rest = cost_tables(d, groups)
    rng = np.random.default_rng(0)
    for bits in [uniform(groups, 8), uniform(groups, 2), *(random_bits(groups, rng) for _ in range(5))]:
        real = len(d.content(config_of(d.base, groups, bits)))
        summed = rest["max_bytes"] + sum(
            float(t[g.bits.index(b)]) for t, g, b in zip(tables["max_bytes"], groups, bits, strict=True)
        )
        assert abs(summed - real) <= 32 * len(groups) + 64


def test_rules_are_added_only_where_they_change_something() -> None:
    d, groups, _ = drafts()
    assert config_of(d.base, groups, uniform(groups, 8)) == d.base
    config = config_of(d.base, groups, (4, *uniform(groups, 8)[1:]))
    assert [(r.name, r.weights) for r in config.rules] == [("^conv$", {"bits": 4})]


def test_an_arena_grows_where_kernels_unpack_weights() -> None:
    """What the tables add up to is no less than what a draft takes, so a budget that they keep is kept."""
    pytest.importorskip("tflite_micro", reason="TensorFlow Lite Micro is not installed: pip install .[tflm]")
    d, groups, _ = drafts(target="tflm")
    d = replace(d, resources=("max_arena",))
    tables, rest = cost_tables(d, groups)
    assert all(np.all(t >= 0) and t[-1] == 0 for t in tables["max_arena"])
    real = d.costs(d.content(config_of(d.base, groups, uniform(groups, 4))))["max_arena"]
    assert rest["max_arena"] + sum(float(t[0]) for t in tables["max_arena"]) >= real > rest["max_arena"] - 64
