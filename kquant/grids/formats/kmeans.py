"""Clustered weights: 2^bits integers of the int8 grid for a tensor (Han et al. 2016, arXiv 1510.00149)."""

from __future__ import annotations

import numpy as np

from kquant.config.specs import QuantSpec
from kquant.grids.formats.rows import importance_rows, to_rows
from kquant.grids.formats.shared_levels import shared_levels
from kquant.grids.grid import Array, Grid


def kmeans(w: Array, spec: QuantSpec, axis: int | None, importance: Array | None) -> Grid:
    """Centroids of least squared error, shared by all channels, which have a scale each; see `formats.weight_grid`.

    Lloyd's algorithm from an equal share of the importance for each centroid; after each step every channel's scale is
    fitted. A centroid that loses its weights stays where it is. Two centroids may round to one integer. Where weights
    are exactly zero, as pruning leaves them, one of the centroids is.
    """
    rows, v = to_rows(w, axis), importance_rows(w, axis, importance)
    size = np.sqrt(np.square(rows).mean(axis=1, keepdims=True))
    z = (rows / np.where(size > 0, size, 1.0)).ravel()
    order = np.argsort(z)
    mass = np.cumsum((v * np.square(size)).ravel()[order])
    levels = 2**spec.bits
    shares = (np.arange(levels) + 0.5) / levels
    start = z[order][np.clip(np.searchsorted(mass, shares * mass[-1]), 0, z.size - 1)]
    return shared_levels(w, axis, importance, np.sort(start), kmeans_design(start), zero=bool(np.any(rows == 0)))


def kmeans_design(table: Array) -> Array:
    """Every level is free."""
    return np.eye(len(table))
