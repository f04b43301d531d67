"""Clamps: fused activation and operators together give exactly the wanted bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kquant.grids.grid import Grid
from kquant.targets.litert.clamps import (
    ACTIVATIONS,
    Clamp,
    container_range,
    float_clamp,
    integer_bounds,
    integer_clamp,
)  # fmt: skip

ALL = tuple(ACTIVATIONS)


def q8(scale: float, zero_point: int, qmin: int = -128, qmax: int = 127) -> Grid:
    return Grid(np.float32(scale), np.int32(zero_point), qmin, qmax)


def kernel(x: np.ndarray, q: Grid, fused: str) -> np.ndarray:
    """A kernel's saturation and fused activation (CalculateActivationRange in kernel_util.cc)."""
    low, high = container_range(q.container)
    for bound, pick in zip(ACTIVATIONS[fused], (max, min), strict=True):
        if bound is not None:
            steps = float(np.float32(bound) / np.float32(q.scale))
            limit = int(q.zero_point) + int(np.trunc(steps + np.copysign(0.5, steps)))
            low, high = (pick(low, limit), high) if pick is max else (low, pick(high, limit))
    return np.clip(x, low, high)


@settings(max_examples=300, deadline=None)
@given(
    bits=st.integers(2, 8),
    zero=st.integers(0, 255),
    scale=st.floats(1e-4, 10.0),
    clip=st.sampled_from([(None, None), (0.0, None), (0.0, 6.0), (-1.0, 1.0), (0.0, 1.0), (None, 2.0), (-0.3, None)]),
    fusable=st.sampled_from([("NONE",), ("NONE", "RELU", "RELU6"), ALL]),
)
def test_result_is_bounded_exactly(
    bits: int, zero: int, scale: float, clip: tuple[float | None, float | None], fusable: tuple[str, ...]
) -> None:
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    q = q8(scale, qmin + zero % 2**bits, qmin, qmax)
    clamp = integer_clamp(q, clip, fusable)
    assert clamp.fused in fusable
    x = np.arange(-1000, 1000)
    y = kernel(x, q, clamp.fused)
    y = y if clamp.lower is None else np.maximum(y, clamp.lower)
    y = y if clamp.upper is None else np.minimum(y, clamp.upper)
    np.testing.assert_array_equal(y, np.clip(x, *integer_bounds(q, clip)))


@pytest.mark.parametrize(
    ("q", "clip", "clamp"),
    [
        (q8(0.1, 5), (None, None), Clamp("NONE")),
        (q8(0.1, -128), (0.0, None), Clamp("RELU")),
        (q8(0.1, -3), (0.0, None), Clamp("RELU")),
        (q8(0.1, -128), (0.0, 6.0), Clamp("RELU6")),  # 6 / 0.1 = 60 steps above the zero point
        (q8(6 / 255, -128), (0.0, 6.0), Clamp("RELU")),  # the container ends at 6
        (q8(0.3, -8, -8, 7), (0.0, None), Clamp("RELU", upper=7)),  # 4 bits
        (q8(0.4, -8, -8, 7), (0.0, None), Clamp("RELU6")),  # 4 bits that end at 6
        (q8(0.4, 0, -8, 7), (None, None), Clamp("NONE", -8, 7)),
        (q8(0.2, 0, -7, 7), (-1.0, 1.0), Clamp("RELU_N1_TO_1")),
        (q8(0.1, 0, -127, 127), (None, None), Clamp("NONE", -127)),
        (q8(0.1, 0, -32767, 32767), (None, None), Clamp("NONE")),
        (q8(0.001, 0, -2048, 2047), (0.0, None), Clamp("RELU", upper=2047)),  # 12 bits in int16
        (q8(0.1, 0), (0.0, 0.5), Clamp("RELU", upper=5)),
    ],
)
def test_cheapest_clamp(q: Grid, clip: tuple[float | None, float | None], clamp: Clamp) -> None:
    assert integer_clamp(q, clip, ALL) == clamp


def test_what_the_inputs_already_guarantee_costs_nothing() -> None:
    q = q8(0.4, 0, -8, 7)
    assert integer_clamp(q, (None, None), ("NONE",), given=(-8, 7)) == Clamp()
    assert integer_clamp(q, (None, None), ("NONE",), given=(-8, 127)) == Clamp(upper=7)


@pytest.mark.parametrize(
    ("clip", "clamp"),
    [
        ((None, None), Clamp()),
        ((0.0, None), Clamp("RELU")),
        ((0.0, 6.0), Clamp("RELU6")),
        ((-1.0, 1.0), Clamp("RELU_N1_TO_1")),
        ((0.0, 2.0), Clamp("RELU", None, 2.0)),
        ((-2.0, 2.0), Clamp("NONE", -2.0, 2.0)),
    ],
)
def test_float_clamp(clip: tuple[float | None, float | None], clamp: Clamp) -> None:
    assert float_clamp(clip, ALL) == clamp
    assert float_clamp((0.0, 6.0), ("NONE",)) == Clamp("NONE", 0.0, 6.0)
