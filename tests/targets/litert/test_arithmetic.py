"""Fixed-point primitives against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kquant.targets.litert import arithmetic as fixed

int32 = st.integers(-(2**31), 2**31 - 1)
factors = st.floats(2.0**-30, 2.0**8, allow_subnormal=False)


def value(by: fixed.Multiplier) -> Fraction:
    return Fraction(int(by.mantissa)) * Fraction(2) ** (int(by.exponent) - 31)


def half_away(x: Fraction) -> int:
    return int(math.copysign(1, x)) * math.floor(abs(x) + Fraction(1, 2))


def half_up(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


@given(factors)
def test_quantized_multiplier_is_the_nearest_of_31_bits(real: float) -> None:
    by = fixed.quantize_multiplier(real)
    assert 2**30 <= int(by.mantissa) < 2**31
    assert abs(value(by) - Fraction(real)) <= Fraction(real) * Fraction(1, 2**31)


def test_quantized_multiplier_carries_and_vanishes() -> None:
    by = fixed.quantize_multiplier(np.array([1 - 2.0**-40, 0.0, 2.0**-40, 1.0]))
    np.testing.assert_array_equal(by.mantissa, [2**30, 0, 0, 2**30])
    np.testing.assert_array_equal(by.exponent, [1, 0, 0, 1])


@given(int32, st.integers(0, 31))
def test_rounding_divide_by_pot(x: int, exponent: int) -> None:
    assert int(fixed.rounding_divide_by_pot(np.array(x), exponent)) == half_away(Fraction(x, 2**exponent))


@given(int32, factors)
def test_single_rounding_is_the_nearest_integer(x: int, real: float) -> None:
    by = fixed.quantize_multiplier(real)
    assert int(fixed.multiply_single_rounding(np.array(x), by)) == half_away(x * value(by))


@given(int32, st.floats(2.0**-30, 0.99))
def test_double_rounding_rounds_at_the_mantissa_and_at_the_shift(x: int, real: float) -> None:
    by = fixed.quantize_multiplier(real)
    shift = max(-int(by.exponent), 0)
    once = half_up(x * value(by) * 2**shift)
    assert int(fixed.multiply_double_rounding(np.array(x), by)) == half_away(Fraction(once, 2**shift))
    assert int(fixed.multiply_double_rounding_up(np.array(x), by)) == half_up(Fraction(once, 2**shift))


def test_double_rounding_differs_from_single_where_the_first_rounding_makes_a_half() -> None:
    by = fixed.quantize_multiplier(0.25 - 2.0**-25)  # 6 M is just below 1.5
    assert int(fixed.multiply_single_rounding(np.array(6), by)) == 1
    assert int(fixed.multiply_double_rounding(np.array(6), by)) == 2


@given(st.integers(-(2**22), 2**22), st.integers(0, 7))
def test_left_shifts_are_exact_until_they_wrap(x: int, exponent: int) -> None:
    by = fixed.quantize_multiplier(2.0**exponent)
    assert int(fixed.multiply_double_rounding(np.array(x), by)) == x * 2**exponent
    assert int(fixed.multiply_double_rounding(np.array(2**30), fixed.quantize_multiplier(1.0))) == -(2**30)


@given(st.integers(-(2**46), 2**46), st.floats(2.0**-16, 1.0))
def test_reduced_multiplier_has_fifteen_bits(x: int, real: float) -> None:
    by = fixed.quantize_multiplier(real)
    mantissa = min(half_up(Fraction(int(by.mantissa), 2**16)), 2**15 - 1)
    assert int(fixed.multiply_reduced(np.array(x), by)) == half_up(
        x * mantissa * Fraction(2) ** (int(by.exponent) - 15)
    )


@given(st.floats(2.0**-8, 4.0), st.integers(1, 100_000))
def test_folded_divisor_is_the_mean(real: float, count: int) -> None:
    by = fixed.fold_divisor(fixed.quantize_multiplier(real), count)
    exact = value(fixed.quantize_multiplier(real)) / count
    assert 0 <= exact - value(by) < exact * Fraction(1, 2**29)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_round_half_away(values: list[float]) -> None:
    found = fixed.round_half_away(np.array(values, np.float32))
    assert found.dtype == np.float32
    assert [int(v) for v in found] == [half_away(Fraction(v)) for v in values]


@given(st.integers(-(10**6), 10**6), st.integers(1, 1000))
def test_divide_half_away(x: int, count: int) -> None:
    assert int(fixed.divide_half_away(np.array(x), count)) == half_away(Fraction(x, count))


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (fixed.Activation.NONE, (-128, 127)),
        (fixed.Activation.RELU, (-10, 127)),
        (fixed.Activation.RELU6, (-10, 50)),
        (fixed.Activation.RELU_N1_TO_1, (-20, 0)),
    ],
)
def test_activation_range(activation: int, expected: tuple[int, int]) -> None:
    assert fixed.activation_range(activation, np.float32(0.1), -10, np.dtype(np.int8)) == expected


def test_activation_range_stays_within_the_type() -> None:
    assert fixed.activation_range(fixed.Activation.RELU6, np.float32(0.01), 0, np.dtype(np.int8)) == (0, 127)
    with pytest.raises(ValueError, match="4"):
        fixed.activation_range(4, np.float32(0.1), 0, np.dtype(np.int8))


@given(st.sampled_from([2, 4]), st.data())
def test_unpack_inverts_packing_low_bits_first(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1), min_size=1, max_size=17))
    packed = [0] * (-(-len(values) * bits // 8))
    for i, v in enumerate(values):
        packed[i * bits // 8] |= (v & ((1 << bits) - 1)) << (i * bits % 8)
    assert fixed.unpack(np.array(packed, np.uint8), bits, len(values)).tolist() == values
