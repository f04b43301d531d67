"""Ternary weights: {-1, 0, 1} times a scale (Li et al. 2016, arXiv 1605.04711)."""

from __future__ import annotations

import numpy as np

from kquant.config.specs import QuantSpec
from kquant.grids.formats.rows import from_rows, importance_rows, to_rows
from kquant.grids.grid import Array, Grid


def ternary(w: Array, spec: QuantSpec, axis: int | None, importance: Array | None) -> Grid:
    """The scale a of least squared error for every channel; see `formats.weight_grid`.

    min sum v (w - a t)^2 over a and t in {-1, 0, 1}. The weights that are not zero are the k largest in magnitude, for
    some k; then a = sum v |w| / sum v over these, and the error is sum v w^2 - (sum v |w|)^2 / sum v. All k are tried.
    """
    rows, v = to_rows(np.abs(w), axis), importance_rows(w, axis, importance)
    order = np.argsort(-rows, axis=1)
    rows, v = (np.take_along_axis(a, order, 1) for a in (rows, v))
    sums, mass = np.cumsum(v * rows, axis=1), np.maximum(np.cumsum(v, axis=1), np.finfo(np.float64).tiny)
    best = np.argmax(np.square(sums) / mass, axis=1)[:, None]
    scale = np.take_along_axis(sums / mass, best, 1)
    return from_rows(scale[:, 0], np.array([-1, 0, 1], np.int32), axis)
