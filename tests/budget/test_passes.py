"""Distances by forward passes, and what is derived from them."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from kquant.budget.groups import groups_of, uniform
from kquant.budget.passes import Passes, at_solution, distance, sensitivities
from kquant.budget.rounded import rounded_layers
from kquant.config.quant_config import QuantConfig
from kquant.diagnosis.metrics import kl_divergence
from kquant.graph.transforms import prepare_graph
from kquant.quantize.data import CalibrationData
from kquant.quantize.plan import make_plan


@pytest.fixture(scope="module")
def passes() -> Passes:
    """The layer "fragile" works with small differences of large weights."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6, 6, 4))
    y = keras.layers.Conv2D(8, 3, activation="relu", name="first")(x)
    y = keras.layers.Conv2D(8, 1, activation="relu", name="fragile")(y)
    y = keras.layers.Dense(5, name="head")(keras.layers.Flatten()(y))
    model = keras.Model(inputs, keras.layers.Softmax()(y))
    graph = prepare_graph(model)
    data = np.random.default_rng(0).normal(size=(64, 6, 6, 4)).astype(np.float32)
    calibration = CalibrationData(data, [(graph.input_names[0], graph[graph.inputs[0]].shape, "float32")])
    plan = make_plan(graph, QuantConfig.load("w8a8"))
    groups = groups_of(plan)
    rounded = rounded_layers(plan, groups, calibration, progress=False)
    return Passes(plan.graph, groups, rounded, [(data,)])


def test_float_is_no_distance_and_fewer_bits_are_more(passes: Passes) -> None:
    found = [passes.distance(uniform(passes.groups, b)) for b in (8, 4, 2)]
    assert passes.distance([None] * 3) == 0
    assert 0 < found[0] < found[1] < found[2]
    assert found[0] < 0.02 * found[1]


def test_a_pass_is_made_once(passes: Passes) -> None:
    bits = uniform(passes.groups, 4)
    passes.distance(bits)
    count, value = passes.count, passes.distance(bits)
    passes.distance([None] * 3)
    assert passes.distance(bits) == value and passes.count <= count + 1


def test_a_pass_is_that_of_the_rounded_weights(passes: Passes) -> None:
    """The state that passes leave behind does not matter."""
    bits = uniform(passes.groups, 4)
    value = passes.distance(bits)
    passes.distance(uniform(passes.groups, 2))
    passes._known.clear()
    assert passes.distance(bits) == pytest.approx(value, rel=1e-5)


def test_sensitivities_are_measured_at_one_number_of_bits_and_near_elsewhere(passes: Passes) -> None:
    found = sensitivities(passes)
    for k, (group, values) in enumerate(zip(passes.groups, found, strict=True)):
        alone = [passes.distance([b if j == k else None for j in range(3)]) for b in group.bits]
        assert values[group.bits.index(4)] == pytest.approx(alone[group.bits.index(4)], rel=1e-6)
        assert np.all(np.diff(values) < 0)
        assert values[-1] == pytest.approx(alone[-1], rel=0.7)


def test_around_a_solution_the_sum_is_near_the_distance(passes: Passes) -> None:
    bits = uniform(passes.groups, 4)
    alone = sensitivities(passes)
    around = at_solution(passes, bits, alone)
    summed = sum(float(t[g.bits.index(b)]) for t, g, b in zip(around, passes.groups, bits, strict=True))
    assert summed == pytest.approx(passes.distance(bits), rel=0.6)


def test_distances_by_the_kind_of_output() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 5)).astype(np.float32)
    other = logits + 0.1
    assert distance([logits], [other]) == pytest.approx(0, abs=1e-6)  # a constant is no change of classes
    assert distance([logits], [2 * logits]) == pytest.approx(kl_divergence(logits, 2 * logits))
    values = rng.normal(size=(20, 1)).astype(np.float32)
    assert distance([values], [values + 0.5]) == pytest.approx(0.25 / values.var(), rel=1e-4)
    assert distance([np.array([1, 2, 3])], [np.array([1, 2, 4])]) == pytest.approx(1 / 3)
    probabilities = np.array([[0.999, 0.001]], np.float32)
    on_grid = np.array([[1.0, 0.0]], np.float32)
    assert distance([probabilities], [on_grid], [1 / 256]) < 1e-4 < distance([probabilities], [on_grid])
