"""Binary weights: -1 and 1 times a scale per channel (XNOR-Net, arXiv 1603.05279; IR-Net, arXiv 1909.10788)."""

from __future__ import annotations

import numpy as np

from kquant.config.specs import QuantSpec
from kquant.grids.formats.rows import from_rows, importance_rows, to_rows
from kquant.grids.grid import Array, Grid


def binary(w: Array, spec: QuantSpec, axis: int | None, importance: Array | None) -> Grid:
    """The scale of least squared error, sum v |w| / sum v for every channel; see `formats.weight_grid`."""
    rows, v = to_rows(w, axis), importance_rows(w, axis, importance)
    scale = (v * np.abs(rows)).sum(axis=1) / np.maximum(v.sum(axis=1), np.finfo(np.float64).tiny)
    return from_rows(scale, np.array([-1, 1], np.int32), axis)
