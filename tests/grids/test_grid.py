"""The affine grid against closed forms and exact rational arithmetic."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kquant.config.specs import QuantSpec
from kquant.grids.grid import (
    BIAS_MAX,
    Grid,
    dequantize,
    fake_quantize,
    fit_bias,
    grid_from_range,
    quantize,
    quantize_bias,
)

KINDS = {
    "asymmetric": QuantSpec(),
    "symmetric": QuantSpec(symmetric=True),
    "narrow": QuantSpec(symmetric=True, narrow_range=True),
    "unsigned": QuantSpec(symmetric=True, signed=False),
    "power_of_two": QuantSpec(symmetric=True, power_of_two=True),
    "power_of_two_unsigned": QuantSpec(symmetric=True, signed=False, power_of_two=True),
}
FLOAT32_MAX = float(np.finfo(np.float32).max)
EDGES = st.floats(-FLOAT32_MAX, FLOAT32_MAX, width=32)
USUAL = st.floats(-1e6, 1e6, width=32)


def spec_of(kind: str, bits: int) -> QuantSpec:
    return KINDS[kind].override({"bits": bits, "symmetric": KINDS[kind].symmetric})


def bounds(q: Grid) -> tuple[float, float]:
    return tuple(float(dequantize(v, q)) for v in (q.qmin, q.qmax))


@given(low=EDGES, high=EDGES, bits=st.integers(2, 16), kind=st.sampled_from(sorted(KINDS)))
def test_parameters_are_always_valid(low, high, bits, kind):
    q = grid_from_range(min(low, high), max(low, high), spec_of(kind, bits))
    assert q.scale.dtype == np.float32 and q.zero_point.dtype == np.int32
    assert np.isfinite(q.scale) and q.scale >= np.finfo(np.float32).tiny
    assert q.qmin <= q.zero_point <= q.qmax and q.qmax - q.qmin in (2**bits - 1, 2**bits - 2)
    assert quantize(0.0, q) == q.zero_point and fake_quantize(0.0, q) == 0.0


@given(low=USUAL, high=USUAL, bits=st.integers(2, 16), kind=st.sampled_from(sorted(KINDS)))
def test_the_range_is_covered(low, high, bits, kind):
    spec = spec_of(kind, bits)
    low, high = (min(low, high, 0.0), max(low, high, 0.0)) if spec.signed else (0.0, abs(high))
    q = grid_from_range(low, high, spec)
    # Rounding the zero point moves an asymmetric grid by half a step, a symmetric one never.
    slack = (0.5 if not spec.symmetric else 0) * float(q.scale) + 1e-5 * (high - low)
    bottom, top = bounds(q)
    assert bottom <= low + slack and high - slack <= top


@pytest.mark.parametrize(
    ("kind", "bits", "low", "high", "scale", "zero_point", "qmin", "qmax"),
    [
        ("asymmetric", 8, -1.0, 1.55, 0.01, -28, -128, 127),
        ("asymmetric", 4, 0.0, 15.0, 1.0, -8, -8, 7),
        ("asymmetric", 8, 2.0, 2.55, 0.01, -128, -128, 127),
        ("asymmetric", 8, -2.55, -1.0, 0.01, 127, -128, 127),
        ("symmetric", 8, -1.0, 0.5, 1 / 127, 0, -128, 127),
        ("narrow", 4, -0.5, 14.0, 2.0, 0, -7, 7),
        ("narrow", 2, -3.0, 2.0, 3.0, 0, -1, 1),
        ("unsigned", 8, 0.0, 2.55, 0.01, -128, -128, 127),
        ("power_of_two", 8, -1.0, 1.0, 2.0**-6, 0, -128, 127),
        ("power_of_two", 8, -127 / 128, 0.0, 2.0**-7, 0, -128, 127),
        ("power_of_two", 8, -1.0, 200.0, 2.0, 0, -128, 127),
    ],
)
def test_closed_forms(kind, bits, low, high, scale, zero_point, qmin, qmax):
    q = grid_from_range(low, high, spec_of(kind, bits))
    assert q.scale == np.float32(scale)
    assert (int(q.zero_point), q.qmin, q.qmax) == (zero_point, qmin, qmax)


@given(low=USUAL, high=USUAL, bits=st.integers(2, 12))
def test_the_zero_point_is_the_one_that_covers_best(low, high, bits):
    low, high = min(low, high, 0.0), max(low, high, 0.0)
    q = grid_from_range(low, high, QuantSpec(bits=bits))
    zero_points = np.arange(q.qmin, q.qmax + 1)
    missed = np.abs(float(q.scale) * (q.qmin - zero_points) - low)
    assert missed[q.zero_point - q.qmin] <= missed.min() + 1e-6 * float(q.scale)


@given(low=USUAL, high=USUAL, bits=st.integers(2, 16))
def test_power_of_two_rounds_up_by_less_than_two(low, high, bits):
    free = grid_from_range(min(low, high), max(low, high), spec_of("symmetric", bits)).scale
    tied = grid_from_range(min(low, high), max(low, high), spec_of("power_of_two", bits)).scale
    assert math.frexp(float(tied))[0] == 0.5 and free <= tied < 2 * free


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_degenerate_ranges(kind):
    assert grid_from_range(0.0, 0.0, KINDS[kind]).scale == 1.0
    constant = grid_from_range(3.0, 3.0, KINDS[kind])
    assert abs(fake_quantize(3.0, constant) - 3.0) <= constant.scale / 2
    tiny = grid_from_range(-1e-45, 1e-45, KINDS[kind])
    assert np.isfinite(fake_quantize(np.float32(1.0), tiny))


def test_an_all_zero_channel_takes_the_largest_scale():
    q = grid_from_range([-1.0, 0.0, 0.0], [2.0, 0.0, 0.5], QuantSpec(symmetric=True), axis=0)
    np.testing.assert_array_equal(q.scale, np.float32([2 / 127, 2 / 127, 0.5 / 127]))
    assert (grid_from_range(np.zeros(3), np.zeros(3), QuantSpec(), axis=0).scale == 1).all()


@pytest.mark.parametrize(("low", "high"), [(np.nan, 1.0), (0.0, np.inf)])
def test_ranges_must_be_finite(low, high):
    with pytest.raises(ValueError, match="finite"):
        grid_from_range(low, high, QuantSpec())


@given(q=st.integers(-128, 127), low=USUAL, high=USUAL)
def test_integers_survive_the_round_trip(q, low, high):
    grid = grid_from_range(min(low, high), max(low, high), QuantSpec())
    assert quantize(dequantize(q, grid), grid) == q


def test_rounding_is_half_to_even_and_clamped():
    grid = Grid(np.float32(2.0), np.int32(1), -8, 7)
    x = [-1e30, -16.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 6.1, 1e30, np.float32(3.4e38)]
    np.testing.assert_array_equal(quantize(x, grid), [-8, -7, -1, -1, 1, 1, 3, 3, 4, 7, 7])
    assert quantize(x, grid).dtype == np.int32 and fake_quantize(x, grid).dtype == np.float32


def test_quotients_beyond_float32_are_clamped():
    grid = grid_from_range(0.0, 1e-30, QuantSpec())
    assert quantize(np.float32(FLOAT32_MAX), grid) == 127


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_per_channel_is_per_tensor_on_every_channel(axis):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, 5)).astype(np.float32)
    others = tuple(i for i in range(3) if i != axis % 3)
    low, high = x.min(axis=others), x.max(axis=others)
    whole = fake_quantize(x, grid_from_range(low, high, QuantSpec(bits=4), axis))
    for i in range(x.shape[axis]):
        part = fake_quantize(x.take(i, axis), grid_from_range(low[i], high[i], QuantSpec(bits=4)))
        np.testing.assert_array_equal(whole.take(i, axis), part)


@given(low=USUAL, high=USUAL, bits=st.integers(2, 16), kind=st.sampled_from(sorted(KINDS)))
def test_fake_quantize_is_what_the_integers_stand_for(low, high, bits, kind):
    x = np.random.default_rng(bits).uniform(min(low, high) - 1, max(low, high) + 1, 200)
    q = grid_from_range(min(low, high), max(low, high), spec_of(kind, bits))
    np.testing.assert_array_equal(fake_quantize(x, q), dequantize(quantize(x, q), q))


def test_error_is_at_most_half_a_step():
    x = np.linspace(-1, 3, 10_001, dtype=np.float32)
    q = grid_from_range(-1.0, 3.0, QuantSpec(bits=5))
    # An edge may lie half a step outside of the grid, too: the zero point is an integer.
    assert np.abs(fake_quantize(x, q) - x).max() <= 0.5 * q.scale * (1 + 1e-5)


def test_bias_in_float32_arithmetic():
    rng = np.random.default_rng(1)
    bias, scales = rng.normal(size=200).astype(np.float32), rng.uniform(1e-4, 1e-2, 200).astype(np.float32)
    found = quantize_bias(bias, 0.0235, scales)
    product = np.float32(0.0235) * scales
    assert product.dtype == np.float32 and found.dtype == np.int64
    np.testing.assert_array_equal(found, [np.rint(b / s) for b, s in zip(bias, product, strict=True)])
    np.testing.assert_array_equal(quantize_bias([1e30, -1e30, 0.0], 1e-30, 1e-10), [BIAS_MAX, -BIAS_MAX, 0])


@pytest.mark.parametrize("axis", [None, 0])
def test_a_large_bias_of_a_dead_channel_fits(axis):
    scale = np.float32([1e-2, 1e-12]) if axis == 0 else np.float32(1e-12)
    weights = Grid(scale, np.zeros_like(scale, np.int32), -127, 127, axis)
    bias, s_in = np.float32([0.3, 0.5]), 0.02
    fitted = fit_bias(weights, bias, s_in)
    ints = quantize_bias(bias, s_in, fitted.scale)
    assert np.abs(ints).max() <= 2**30 + 128
    np.testing.assert_allclose(ints * (s_in * fitted.scale.astype(float)), bias, rtol=1e-6)
    factors = np.log2(fitted.scale.astype(float) / scale)
    np.testing.assert_allclose(factors, np.rint(factors), atol=1e-6)  # a power of two stays one
    assert np.max(factors) > 0 and (axis is None or factors[0] == 0)


def test_a_bias_that_fits_changes_nothing():
    weights = Grid(np.float32([1e-2, 0.3]), np.int32([0, 0]), -127, 127, 0)
    np.testing.assert_array_equal(fit_bias(weights, np.float32([5.0, 0.0]), 0.02).scale, weights.scale)
