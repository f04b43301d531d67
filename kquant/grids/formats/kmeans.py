"""Clustered weights: 2^bits integers of the int8 grid, chosen for every channel (Han et al. 2016, arXiv 1510.00149)."""

from __future__ import annotations

import numpy as np

from kquant.config.specs import QuantSpec
from kquant.grids.formats.rows import from_rows, to_rows
from kquant.grids.grid import Array, Grid

_STEPS = 30
_LARGEST = 127


def kmeans(w: Array, spec: QuantSpec, axis: int | None, importance: Array | None) -> Grid:
    """Centroids of least squared error on the integers of an int8 tensor; see `formats.weight_grid`.

    Lloyd's algorithm in steps of the scale max |w| / 127, from an equal share of the importance for each centroid. A
    centroid that loses its weights stays where it is. Two centroids may round to one integer.
    """
    rows = to_rows(w, axis)
    v = to_rows(np.ones_like(w) if importance is None else importance, axis)
    scale = np.abs(rows).max(axis=1) / _LARGEST
    steps = rows / np.where(scale > 0, scale, 1.0)[:, None]
    order = np.argsort(steps, axis=1)
    steps, v = (np.take_along_axis(a, order, 1) for a in (steps, v))
    # sums of the sorted weights up to each place: those of a cluster are a difference of two
    mass, total = (np.pad(np.cumsum(a, axis=1), ((0, 0), (1, 0))) for a in (v, v * steps))
    levels = 2**spec.bits
    shares = (np.arange(levels) + 0.5) / levels
    starts = np.stack([np.searchsorted(m, shares * m[-1]) for m in mass]) - 1
    centroids = np.take_along_axis(steps, np.clip(starts, 0, steps.shape[1] - 1), 1)
    for _ in range(_STEPS):
        edges = (centroids[:, 1:] + centroids[:, :-1]) / 2
        ends = np.stack([np.searchsorted(row, edge) for row, edge in zip(steps, edges, strict=True)])
        ends = np.pad(ends, ((0, 0), (1, 1)), constant_values=((0, 0), (0, steps.shape[1])))
        inside, sums = (np.diff(np.take_along_axis(a, ends, 1), axis=1) for a in (mass, total))
        centroids = np.where(inside > 0, sums / np.where(inside > 0, inside, 1.0), centroids)
    return from_rows(scale, np.sort(np.clip(np.rint(centroids), -_LARGEST, _LARGEST).astype(np.int32), axis=1), axis)
