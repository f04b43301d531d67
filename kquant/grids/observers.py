"""Streaming statistics of tensors: the memory does not grow with the data.

The observers are exact extremes and sums, or samples chosen by the values alone, so neither the order of
the batches nor how the data is cut into batches changes a result.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kquant.errors import CalibrationError

Array = np.ndarray[Any, Any]

# Cell numbers up to 2^22 are exact in float32, with a bit to spare for the sign.
_MAX_CELL = 2**22
_MIN_EXPONENT = -100
_BLOCK = 2**16  # temporaries stay in the cache: twice as fast

_ROWS_BYTES = 2 << 20
_LEAST_ROWS = 256


class MinMax:
    """Smallest and largest value, of a tensor or of each channel.

    Args:
        name: the tensor's name, for messages.
        axis: the axis of the channels; None for one range of the whole tensor.
    """

    def __init__(self, name: str = "", axis: int | None = None) -> None:
        self.name = name
        self.axis = axis
        self._low: Array | None = None
        self._high: Array | None = None

    @property
    def low(self) -> Array:
        """Smallest value, () or (channels,)."""
        return _seen(self._low, self.name)

    @property
    def high(self) -> Array:
        """Largest value, () or (channels,)."""
        return _seen(self._high, self.name)

    def update(self, x: Any) -> None:
        """Take in one batch.

        Raises:
            CalibrationError: x holds NaN or infinite values.
        """
        x = np.asarray(x, np.float32)
        if not x.size:
            return
        others = None if self.axis is None else tuple(i for i in range(x.ndim) if i != self.axis % x.ndim)
        self._include(*_finite(x.min(axis=others), x.max(axis=others), self.name))

    def merge(self, other: MinMax) -> None:
        """Take in what another observer of the same tensor has seen."""
        if other._low is not None and other._high is not None:
            self._include(other._low, other._high)

    def _include(self, low: Array, high: Array) -> None:
        self._low = low if self._low is None else np.minimum(self._low, low)
        self._high = high if self._high is None else np.maximum(self._high, high)


class _Ranged:
    """An observer that keeps the extremes beside something else."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._range = MinMax(name)

    @property
    def low(self) -> Array:
        """Smallest value, ()."""
        return self._range.low

    @property
    def high(self) -> Array:
        """Largest value, ()."""
        return self._range.high


class Histogram(_Ranged):
    """Distribution of a tensor's values, in one pass and without a range known in advance.

    Cell number i holds the values in [i * width, (i + 1) * width). The width is the smallest power
    of two for which the cells between the smallest and the largest value are at most `bins`; when
    the range grows, it doubles and neighbouring cells merge. As floor(floor(x / w) / 2) is
    floor(x / 2w), this is exactly the histogram that the final width would have given from the start.
    (Only a negative value smaller than 2^-126 widths may count as 0.)

    Args:
        name: the tensor's name, for messages.
        bins: the largest number of cells; at least half of it is in use.

    Attributes:
        zeros: how many values were exactly 0 (every grid represents them without error).
    """

    def __init__(self, name: str = "", bins: int = 4096) -> None:
        super().__init__(name)
        self.bins = bins
        self.zeros = 0
        self._exponent = _MIN_EXPONENT
        self._first = 0
        self._counts = np.zeros(0, np.int64)

    @property
    def width(self) -> float:
        """Width of a cell, a power of two."""
        return math.ldexp(1.0, self._exponent)

    @property
    def counts(self) -> Array:
        """Number of values in each cell, (cells,) int64; the first cell holds `low`, the last one `high`."""
        return self._counts

    @property
    def centers(self) -> Array:
        """The value that stands for each cell, (cells,) float64: its centre, within [low, high]."""
        cells = self._first + np.arange(len(self._counts))
        return np.clip((cells + 0.5) * self.width, float(self.low), float(self.high))

    def update(self, x: Any, extremes: Any = ()) -> None:
        """Take in one batch.

        Args:
            x: the values.
            extremes: the smallest and the largest value of what x was drawn from, if x is a part of it.

        Raises:
            CalibrationError: there are NaN or infinite values.
        """
        x = np.asarray(x, np.float32).ravel()
        if not x.size:
            return
        self._range.update(x)
        self._range.update(extremes)
        self._grow(_MIN_EXPONENT)
        for start in range(0, x.size, _BLOCK):
            cells = _cells(x[start : start + _BLOCK], self._exponent, self._first)
            self._counts += np.bincount(cells, minlength=len(self._counts))
        self.zeros += x.size - int(np.count_nonzero(x))

    def merge(self, other: Histogram) -> None:
        """Take in what another histogram of the same tensor (and number of bins) has seen."""
        if other.bins != self.bins:
            raise ValueError(f"histograms of {self.bins} and {other.bins} bins cannot be merged")
        if not len(other._counts):
            return
        self._range.merge(other._range)
        self._grow(other._exponent)
        self._add(other._first, other._exponent, other._counts)
        self.zeros += other.zeros

    def nonzero(self) -> tuple[Array, Array]:
        """(values, counts) of the cells in use, float64 and int64, not counting the exact zeros."""
        counts = self._counts.copy()
        if self.zeros:
            counts[-self._first] -= self.zeros
        return self.centers[counts > 0], counts[counts > 0]

    def percentile(self, percent: float) -> float:
        """The value below which `percent` percent of the data lies, to within one cell."""
        low, high = float(self.low), float(self.high)
        below = np.concatenate([[0], np.cumsum(self._counts)])
        edges = (self._first + np.arange(len(below))) * self.width
        return float(np.clip(np.interp(percent / 100 * below[-1], below, edges), low, high))

    def _grow(self, exponent: int) -> None:
        """Make cells for the whole range seen, of a width of at least 2^exponent."""
        low, high = float(self.low), float(self.high)
        edges = np.asarray([low, high], np.float32)
        size = max(abs(low) / _MAX_CELL, abs(high) / _MAX_CELL, (high - low) / self.bins)
        exponent = max(exponent, self._exponent, math.frexp(size)[1] - 2 if size else _MIN_EXPONENT)
        first, last = _cells(edges, exponent)
        while last - first >= self.bins or first < -_MAX_CELL or last > _MAX_CELL:
            exponent += 1
            first, last = _cells(edges, exponent)
        counts, old_first, old_exponent = self._counts, self._first, self._exponent
        self._first, self._exponent = first, exponent
        self._counts = np.zeros(last - first + 1, np.int64)
        self._add(old_first, old_exponent, counts)

    def _add(self, first: int, exponent: int, counts: Array) -> None:
        cells = (first + np.arange(len(counts))) >> min(self._exponent - exponent, 62)
        np.add.at(self._counts, cells - self._first, counts)


class Rows(_Ranged):
    """A sample of a tensor's rows (vectors along its last axis, e.g. the logits of one image), and its extremes.

    The rows with the smallest hashes of their values are kept: a sample that is as good as a random one,
    but the same for every order and cutting of the data.

    Args:
        name: the tensor's name, for messages.
        limit: the most rows to keep; None for as many as 2 MB hold, and at least 256.
    """

    def __init__(self, name: str = "", limit: int | None = None) -> None:
        super().__init__(name)
        self.limit = limit
        self._rows: Array | None = None
        self._keys = np.zeros(0, np.uint64)

    @property
    def rows(self) -> Array:
        """The rows that were kept, (rows, values) float32, in the order of their hashes."""
        return _seen(self._rows, self.name)

    def update(self, x: Any) -> None:
        """Take in one batch, (..., values).

        Raises:
            CalibrationError: x holds NaN or infinite values.
        """
        x = np.asarray(x, np.float32)
        if not x.size:
            return
        self._range.update(x)
        rows = x.reshape(-1, x.shape[-1])
        self._keep(rows, _hashes(rows))

    def merge(self, other: Rows) -> None:
        """Take in what another observer of the same tensor (and limit) has seen."""
        if other.limit != self.limit:
            raise ValueError(f"samples of {self.limit} and {other.limit} rows cannot be merged")
        self._range.merge(other._range)
        if other._rows is not None:
            self._keep(other._rows, other._keys)

    def _keep(self, rows: Array, keys: Array) -> None:
        limit = self.limit or max(_LEAST_ROWS, _ROWS_BYTES // rows[0].nbytes)
        if len(self._keys) == limit:
            fresh = keys < self._keys[-1]
            rows, keys = rows[fresh], keys[fresh]
        if self._rows is not None:
            rows, keys = np.concatenate([self._rows, rows]), np.concatenate([self._keys, keys])
        order = np.argsort(keys, kind="stable")[:limit]
        self._rows, self._keys = rows[order], keys[order]


def _hashes(rows: Array) -> Array:
    """A 64-bit hash of each row's bits: a random sum over its values, mixed (splitmix64), (rows,) uint64."""
    bits = np.ascontiguousarray(rows, np.float32).view(np.uint32).astype(np.uint64)
    with np.errstate(over="ignore"):
        factors = _mix((np.arange(rows.shape[1], dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
        return _mix(bits @ (factors | np.uint64(1)))


def _mix(x: Array) -> Array:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def _cells(x: Array, exponent: int, first: int = 0) -> Array:
    """The numbers, less `first`, of the cells of width 2^exponent that hold the float32 values x, int64."""
    scaled = x * np.float32(math.ldexp(1.0, -exponent))
    np.floor(scaled, out=scaled)
    scaled -= np.float32(first)
    return scaled.astype(np.int64)


def _seen(value: Array | None, name: str) -> Array:
    if value is None:
        raise CalibrationError(f"No data was seen at {name!r}; pass calibration data that is not empty.")
    return value


def _finite(low: Any, high: Any, name: str) -> tuple[Array, Array]:
    low, high = np.asarray(low), np.asarray(high)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise CalibrationError(
            f"The values at {name!r} hold NaN or infinite numbers; check the model's weights and the calibration data."
        )
    return low, high
