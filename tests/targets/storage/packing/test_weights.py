"""The model of weights: it finds the widths and the likeness of taps that it was given, and codes near the entropy."""

from __future__ import annotations

import numpy as np
import pytest

from kquant.targets.storage.packing import levels, weights
from kquant.targets.storage.packing.distributions import CENTRES, deviations
from kquant.targets.storage.packing.rans import TOTAL

RNG = np.random.default_rng


def bits(model: weights.Model, values: np.ndarray) -> float:
    """Bits per weight that the model takes."""
    total = 0.0
    for stage in range(model.stages):
        width, centre = np.divmod(model.contexts(stage, values), CENTRES)
        freq = model.profile.frequencies(width, centre)
        found = values[model.at(stage)].reshape(-1) - model.profile.low
        total -= float(np.sum(np.log2(freq[np.arange(len(found)), found] / TOTAL)))
    return total / values.size


def gaussian(widths: np.ndarray, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.clip(np.rint(RNG(seed).normal(size=shape) * widths), -127, 127).astype(np.int64)


def test_factors_of_outputs_and_inputs_are_found() -> None:
    outputs, inputs = np.exp2(RNG(1).uniform(2, 4, (64, 1, 1))), np.exp2(RNG(2).uniform(-1, 1, (1, 1, 32)))
    values = gaussian(outputs * inputs, (64, 9, 32))
    model = weights.fit(values, -127, 127)
    assert model.coefficients is None and not model.taps.any()
    found = deviations()[model.outputs[:, None] + model.inputs]
    assert np.median(np.abs(np.log2(found / (outputs * inputs)[:, 0]))) < 0.15
    entropy = float(np.mean(np.log2(outputs * inputs))) + 0.5 * np.log2(2 * np.pi * np.e)
    assert bits(model, values) < entropy + 0.05


def test_taps_that_are_alike_are_predicted() -> None:
    """Neighbours correlate by 0.8: (1 - 0.8^2) of the variance is left, 0.74 bits less."""
    noise, values = RNG(3).normal(size=(32, 9, 32)), np.zeros((32, 9, 32))
    values[:, 0] = noise[:, 0]
    for t in range(1, 9):
        values[:, t] = 0.8 * values[:, t - 1 if t % 3 else t - 3] + 0.6 * noise[:, t]
    integers = np.rint(values * 20).astype(np.int64)
    model = weights.fit(integers, -127, 127)
    alone = weights.fit(RNG(4).permutation(integers.reshape(-1)).reshape(32, 9, 32), -127, 127)
    assert model.coefficients is not None and alone.coefficients is None
    assert bits(alone, integers) - bits(model, integers) > 0.5


def test_single_values_have_frequencies_of_their_own_where_that_pays() -> None:
    values = RNG(5).choice([-1, 0, 1, 2], (32, 9, 16), p=[0.45, 0.05, 0.45, 0.05])
    model = weights.fit(values, -1, 2)
    assert model.profile.tilt
    entropy = -(0.9 * np.log2(0.45) + 0.1 * np.log2(0.05))
    assert bits(model, values) < entropy + 0.05


@pytest.mark.parametrize("shape", [(64, 1, 1), (1, 40, 8), (3, 2, 11), (10, 49, 4)])
def test_any_shape_has_a_model(shape: tuple[int, int, int]) -> None:
    values = gaussian(np.array(9.0), shape)
    model = weights.fit(values, -40, 60)
    assert bits(model, values) < 8
    assert weights.fit(np.zeros(shape, np.int64), 0, 0).profile.high == 0


def test_levels_of_a_tensor_and_of_its_rows() -> None:
    shared = RNG(6).choice([-100, 3, 50], (8, 9, 4))
    found = levels.find(shared)
    assert found is not None and found.table.tolist() == [[-100, 3, 50]]
    sets = np.sort(RNG(7).integers(-128, 128, (16, 4)), axis=1)
    rows = np.take_along_axis(sets, RNG(8).integers(0, 4, (16, 90)), axis=1).reshape(16, 9, 10)
    own = levels.find(rows)
    assert own is not None and own.table.shape == (16, 4)
    for values, made in ((shared, found), (rows, own)):
        np.testing.assert_array_equal(made.values(made.ranks(values)), values)
    assert levels.find(gaussian(np.array(30.0), (8, 9, 40))) is None
