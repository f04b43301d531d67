"""Linear operations with scaled channels compute what the scaling says."""

from __future__ import annotations

import numpy as np
import pytest

from kquant.graph.ops import compute, linear_of, weight_of
from kquant.graph.scaling import Scaling
from kquant.graph.transforms.magnitudes import input_ranges, magnitudes, output_ranges, scale_magnitudes
from kquant.graph.transforms.rescale import scale_input, scale_output, sees_offset
from tests.support.nodes import CLOSE, LINEAR, normal

NAMES = list(LINEAR)


def scaling(channels: int, offset: bool) -> Scaling:
    return Scaling(normal(channels).astype(np.float64), normal(channels).astype(np.float64) * offset, {})


def applied(s: Scaling, x: np.ndarray) -> np.ndarray:
    return (x * s.scale + s.offset).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_of_the_output(name: str) -> None:
    node, (x,) = LINEAR[name]
    s = scaling(node.shape[-1], offset=True)
    scaled = scale_output(node.with_(stats={"mean": normal(len(s.scale)), "std": np.ones(len(s.scale))}), s)
    np.testing.assert_allclose(compute(scaled, [x]), applied(s, np.asarray(compute(node, [x]))), **CLOSE)
    np.testing.assert_allclose(scaled.stats["std"], np.abs(s.scale))
    assert {w.dtype.name for w in scaled.weights.values()} == {"float32"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("offset", [False, True])
def test_of_the_input(name: str, offset: bool) -> None:
    node, (x,) = LINEAR[name]
    s = scaling(x.shape[-1], offset)
    exact = np.allclose(compute(scale_input(node, s), [x]), compute(node, [applied(s, x)]), **CLOSE)
    assert exact == sees_offset(node, x.shape, s) and (exact or offset)


@pytest.mark.parametrize("name", NAMES)
def test_magnitudes_are_the_largest_weights_between_channels(name: str) -> None:
    node, (x,) = LINEAR[name]
    block, weight = magnitudes(node), node.weights[weight_of(node).name]
    groups, inputs, outputs = block.shape
    assert groups * inputs == x.shape[-1] and groups * outputs == node.shape[-1]
    views = linear_of(node).matrices(node, np.abs(weight)).reshape(groups, -1, inputs, outputs)
    np.testing.assert_array_equal(block, views.max(1))
    assert block.dtype == np.float64 and output_ranges(block).max() == input_ranges(block).max() == np.abs(weight).max()


@pytest.mark.parametrize("name", NAMES)
def test_magnitudes_scale_as_the_weights_do(name: str) -> None:
    node, (x,) = LINEAR[name]
    rows, columns = (np.abs(normal(n)).astype(np.float64) + 0.1 for n in (x.shape[-1], node.shape[-1]))
    scaled = scale_output(scale_input(node, Scaling.factors(rows)), Scaling.factors(columns))
    np.testing.assert_allclose(magnitudes(scaled), scale_magnitudes(magnitudes(node), rows, columns), rtol=1e-6)
