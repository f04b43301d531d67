"""Arrays of numbers of any size: biases, scales, factors. Leading bits are coded, the others kept as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kquant.errors import PackError
from kquant.targets.storage.packing.distributions import CENTRES, WIDTHS, Profile, width_of

Array = np.ndarray

PROFILE = Profile(-128, 127, family=1)
_CONSTANT = 255
_LARGEST_SHIFT = 48


@dataclass(frozen=True, eq=False)
class Numbers:
    """How an array is coded: value = least + 2^shift * leading + the lower bits.

    Attributes:
        size: of the array.
        least: its smallest value.
        shift: number of lower bits.
        mean: of the leading parts.
        width: index of their width; _CONSTANT where all are 0.
    """

    size: int
    least: int
    shift: int
    mean: int
    width: int

    @property
    def coded(self) -> int:
        """How many leading parts are coded."""
        return 0 if self.width == _CONSTANT else self.size

    @property
    def contexts(self) -> Array:
        """Of the leading parts, as `weights.Model.contexts`."""
        return np.full(self.coded, self.width * CENTRES + CENTRES // 2)

    def join(self, symbols: Array, low: Array | int) -> Array:
        """The array, int64, of its symbols and lower bits."""
        if not self.coded:
            return np.full(self.size, self.least, np.int64)
        leading = (symbols.astype(np.int64) - 128 + self.mean) & 255
        return self.least + (leading << self.shift) + low


def fit(values: Array) -> tuple[Numbers, Array, Array]:
    """How to code an int64 array; its symbols, and its lower bits."""
    least = int(values.min()) if values.size else 0
    above = values.reshape(-1) - least
    largest = int(above.max()) if values.size else 0
    shift = max(0, largest.bit_length() - 8)
    leading = above >> shift
    if not largest:
        return Numbers(values.size, least, 0, 0, _CONSTANT), leading[:0], leading[:0]
    mean = int(np.rint(leading.mean()))
    width = int(width_of(np.array(max(float(leading.std()), 0.3))))
    symbols = (leading - mean + 128) & 255
    return Numbers(values.size, least, shift, mean, width), symbols, above & ((1 << shift) - 1)


def checked(size: int, least: int, shift: int, mean: int, width: int) -> Numbers:
    """What a header says.

    Raises:
        PackError: it cannot be.
    """
    if shift > _LARGEST_SHIFT or (width >= WIDTHS and width != _CONSTANT) or abs(least) >> 40:
        raise PackError("the packed file is damaged: it describes numbers that cannot be")
    return Numbers(size, least, shift, mean, width)


def to_bits(numbers: Array, width: int) -> Array:
    """Bits of numbers, most significant first, uint8 (len(numbers) * width,)."""
    wide = np.unpackbits(numbers.astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)
    return wide[:, 64 - width :].reshape(-1)


def from_bits(bits: Array, width: int) -> Array:
    """The way back, int64."""
    wide = np.pad(bits.reshape(-1, width), ((0, 0), (64 - width, 0)))
    return np.packbits(wide, axis=1).view(">u8").astype(np.int64).reshape(-1)
