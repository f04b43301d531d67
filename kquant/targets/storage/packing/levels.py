"""Integers of few distinct values stand for them by rank: in the tensor, or in each of its rows (channels)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kquant.errors import PackError

Array = np.ndarray

_MOST = 64  # levels that are worth listing
_FEWER = 0.7  # share of the range that they may fill
_LEVEL_BITS = 6  # of a level in a list, about


@dataclass(frozen=True, eq=False)
class Levels:
    """Distinct integers in rising order.

    Attributes:
        table: int64 (rows, levels), or (1, levels) for all rows; a row with fewer repeats its last one.
    """

    table: Array

    def ranks(self, values: Array) -> Array:
        """Rank of each of the values (outputs, taps, inputs)."""
        rows, size = self.table.shape
        flat = values.reshape(rows, -1)
        place = np.zeros((rows, 257), np.int64)
        at = np.arange(rows)[:, None]
        place[at, self.table[:, ::-1] + 128] = np.arange(size)[::-1]  # of a repeated one, its first
        return place[at, flat + 128].reshape(values.shape)

    def values(self, ranks: Array) -> Array:
        """The way back."""
        rows = len(self.table)
        return np.take_along_axis(self.table, ranks.reshape(rows, -1), axis=1).reshape(ranks.shape)


def find(values: Array) -> Levels | None:
    """The levels of int64 values (outputs, taps, inputs) within int8, where there are few."""
    rows = len(values)
    flat = values.reshape(rows, -1)
    places = flat + (np.arange(rows) * 256 + 128)[:, None]
    present = np.bincount(places.reshape(-1), minlength=256 * rows).reshape(rows, 256) > 0
    together = np.flatnonzero(present.any(axis=0))
    counts = present.sum(axis=1)
    most, span = int(counts.max()), int(together[-1] - together[0]) + 1
    saved = flat.shape[1] * np.log2(len(together) / most) - _LEVEL_BITS * most  # in a row, by a list of its own
    if saved <= 0 or most > _MOST:
        return Levels(together[None] - 128) if len(together) <= min(_MOST, _FEWER * span) else None
    order = np.argsort(~present, axis=1, kind="stable")[:, :most]
    last = order[np.arange(rows), counts - 1]
    return Levels(np.where(np.arange(most) < counts[:, None], order, last[:, None]) - 128)


def checked(table: Array) -> Levels:
    """What a header says.

    Raises:
        PackError: these are no integers of int8 in rising order.
    """
    if not table.size or table.min() < -128 or table.max() > 127 or np.any(np.diff(table, axis=1) < 0):
        raise PackError("the packed file is damaged: it lists values that cannot be")
    return Levels(table)
