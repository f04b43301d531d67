"""Probabilities of small integers: a family of curves on a grid of widths and centres, as frequencies of 2^14.

The encoder and the decoder may be different machines, so every number here follows from additions, multiplications and
divisions of float64, which IEEE 754 defines to the last bit, one numpy operation each, and is rounded to integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from kquant.targets.storage.packing.rans import TOTAL

Array = np.ndarray

WIDTHS = 48  # standard deviations 0.15 * 2^(k/4)
OCTAVE = 4  # widths in an octave
CENTRES = 15  # two fifths of a width apart, around 0
_HALF = CENTRES // 2
_NARROWEST = 0.15
_PER_UNIT, _REACH = 1024, 12  # entries of a table for each standard deviation, standard deviations to each side
_ONE = 1 << 30
ENDS = (0, 5, 20)  # of 1024: share of the mass that the ends of the range get beside their own


def _exp(y: Array) -> Array:
    """e^-y for y >= 0 as (1 - y / 2^16)^(2^16), by squaring."""
    result = np.maximum(1.0 - y / 65536.0, 0.0)
    for _ in range(16):
        result = result * result
    return result


def _by_density(density: Callable[[Array], Array]) -> Array:
    """The cumulated distribution at the edges of the table, of a density on its midpoints."""
    z = (np.arange(2 * _REACH * _PER_UNIT) + 0.5) / _PER_UNIT - _REACH
    total = np.cumsum(density(z))
    return np.concatenate([[0.0], total / total[-1]])


@cache
def _families() -> tuple[Array, ...]:
    """Cumulated distributions of deviation 1, times 2^30: from Gaussian to Laplace."""
    gauss = _by_density(lambda z: _exp(z * z / 2.0))
    logistic = _by_density(
        lambda z: _exp(np.abs(z) * 1.8137993642342178) / (1.0 + _exp(np.abs(z) * 1.8137993642342178)) ** 2
    )
    laplace = _by_density(lambda z: _exp(np.abs(z) * 1.4142135623730951))
    curves = (gauss, (gauss + logistic) / 2.0, (logistic + laplace) / 2.0)
    return tuple((c * _ONE).astype(np.int64) for c in curves)


FAMILIES = 3


@cache
def deviations() -> Array:
    """The widths, float64 (WIDTHS,)."""
    quarter = 1.189207115002721  # 2^(1/4)
    return np.cumprod(np.concatenate([[_NARROWEST], np.full(WIDTHS - 1, quarter)]))


def width_of(deviation: Array) -> Array:
    """Index of the nearest width; for the encoder only, which may round as it likes."""
    steps = np.log2(np.maximum(deviation, 1e-9) / _NARROWEST) * OCTAVE
    return np.clip(np.rint(steps), 0, WIDTHS - 1).astype(np.int64)


def centre_of(mean: Array, unit: int, width: Array) -> Array:
    """Index of the centre nearest to mean / unit, from integer means."""
    quarters = mean.astype(np.float64) / (deviations()[width] * (unit * 0.4))
    return (np.clip(np.floor(quarters + 0.5), -_HALF, _HALF) + _HALF).astype(np.int64)


@dataclass(frozen=True)
class Profile:
    """What the distributions of one kind of values have in common.

    Attributes:
        low, high: the values are in this range, at most 256 of them.
        family: of the curve.
        ends: index in ENDS.
        tilt: quarter octaves by which each value is more frequent than the curve says; () for none.
    """

    low: int
    high: int
    family: int = 0
    ends: int = 0
    tilt: tuple[int, ...] = field(default=())

    def frequencies(self, widths: Array, centres: Array) -> Array:
        """int64 (contexts, 256), rows of sum 2^14, at least 1 for every value of the range."""
        size = self.high - self.low + 1
        curve = _families()[self.family]
        inner = np.arange(self.low, self.high, dtype=np.float64) + 0.5  # edges between the values
        z = inner / deviations()[widths][:, None] - ((centres - _HALF) * 0.4)[:, None]
        place = np.clip(z * _PER_UNIT + float(_REACH * _PER_UNIT), 0.0, float(2 * _REACH * _PER_UNIT))
        below = np.zeros((len(widths), size + 1), np.int64)
        below[:, 1:-1] = curve[place.astype(np.int64)]
        below[:, -1] = _ONE
        mass = np.diff(below, axis=1)
        share = ENDS[self.ends]
        if share:
            mass = mass * (1024 - share) // 1024
            mass[:, [0, -1]] += _ONE * share // 2048
        if self.tilt:
            quarter = np.array([1024, 1218, 1448, 1722], np.int64)
            steps = np.asarray(self.tilt, np.int64) + 64
            mass = (mass >> 14) * quarter[steps % 4] * (1 << (steps // 4)) >> 16
        up_to = np.cumsum(mass, axis=1)
        up_to[:, -1] = np.maximum(up_to[:, -1], 1)
        freq = np.zeros((len(widths), 256), np.int64)
        freq[:, :size] = np.diff(up_to * (TOTAL - size) // up_to[:, -1:], axis=1, prepend=0) + 1
        return freq


class Tables:
    """The tables of all contexts that were asked for, made when they are first needed.

    Attributes:
        freq, start: int64 (rows, 256): frequency of each value above the lowest, and where it starts.
        slots: uint8 (rows, 2^14): which value it is, for decoding.
    """

    def __init__(self, profiles: Sequence[Profile], *, slots: bool) -> None:
        self._profiles = profiles
        self._row = np.full(len(profiles) * WIDTHS * CENTRES, -1, np.int64)
        self._made = 0
        self.freq = np.zeros((0, 256), np.int64)
        self.start = np.zeros((0, 256), np.int64)
        self.slots = np.zeros((0, TOTAL if slots else 0), np.uint8)

    def rows(self, contexts: Array) -> Array:
        """The row of each context: (profile * WIDTHS + width) * CENTRES + centre."""
        used = np.zeros(len(self._row), bool)
        used[contexts] = True
        new = np.flatnonzero(used & (self._row < 0))
        if len(new):
            self._make(new)
        return self._row[contexts]

    def _make(self, new: Array) -> None:
        first, end = self._made, self._made + len(new)
        self._row[new] = np.arange(first, end)
        self._made = end
        if end > len(self.freq):  # with room for more, so that what is there is copied a few times only
            self.freq, self.start, self.slots = (
                _longer(t, first, 4 * end) for t in (self.freq, self.start, self.slots)
            )
        profile, rest = np.divmod(new, WIDTHS * CENTRES)
        for p in np.unique(profile).tolist():
            mine = np.flatnonzero(profile == p)
            self.freq[first + mine] = self._profiles[p].frequencies(*np.divmod(rest[mine], CENTRES))
        freq = self.freq[first:end]
        self.start[first:end] = np.cumsum(freq, axis=1) - freq
        if self.slots.shape[1]:
            symbols = np.tile(np.arange(256, dtype=np.uint8), len(freq))
            self.slots[first:end] = np.repeat(symbols, freq.reshape(-1)).reshape(len(freq), TOTAL)


def _longer(table: Array, used: int, rows: int) -> Array:
    made = np.empty((rows, table.shape[1]), table.dtype)
    made[:used] = table[:used]
    return made
