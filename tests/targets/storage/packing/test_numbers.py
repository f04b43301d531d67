"""Arrays of numbers: leading parts and lower bits make up every value again."""

from __future__ import annotations

import numpy as np
import pytest

from kquant.errors import PackError
from kquant.targets.storage.packing import numbers


@pytest.mark.parametrize(
    "values",
    [np.array([5]), np.full(9, -3), np.arange(-100, 100), np.array([-(2**31), 2**31 - 1, 0]),
     np.random.default_rng(0).integers(0, 2**32, 50), np.random.default_rng(1).integers(-4, 5, 300)],
    ids=["one", "equal", "few", "extremes", "floats", "factors"],
)  # fmt: skip
def test_the_values_come_back(values: np.ndarray) -> None:
    made, symbols, low = numbers.fit(values.astype(np.int64))
    assert symbols.size == made.coded and np.all((0 <= symbols) & (symbols < 256))
    bits = numbers.to_bits(low, made.shift)
    kept = numbers.from_bits(bits, made.shift) if made.shift and made.coded else 0
    np.testing.assert_array_equal(made.join(symbols.astype(np.uint8), kept), values)
    numbers.checked(made.size, made.least, made.shift, made.mean, made.width)


def test_equal_values_take_no_symbols() -> None:
    made, symbols, _ = numbers.fit(np.full(1000, 77))
    assert made.coded == 0 and not len(symbols) and not len(made.contexts)


def test_bits_are_written_from_the_highest() -> None:
    bits = numbers.to_bits(np.array([5, 2]), 3)
    assert bits.tolist() == [1, 0, 1, 0, 1, 0]
    assert numbers.from_bits(bits, 3).tolist() == [5, 2]


@pytest.mark.parametrize("change", [{"shift": 60}, {"width": 200}, {"least": 1 << 50}])
def test_headers_that_cannot_be_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(PackError, match="cannot be"):
        numbers.checked(**{"size": 4, "least": 0, "shift": 0, "mean": 0, "width": 3, **change})
