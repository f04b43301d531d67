"""Logarithmic levels: 0 and +-2^i (Zhou et al. 2017, arXiv 1702.03044), i = 0 .. 2^(bits - 1) - 2."""

from __future__ import annotations

import numpy as np

from kquant.config.specs import QuantSpec
from kquant.grids.formats.rows import scaled_table
from kquant.grids.grid import Array, Grid


def power_of_two(w: Array, spec: QuantSpec, axis: int | None, importance: Array | None) -> Grid:
    """The scale of least squared error for every channel; see `formats.weight_grid`."""
    return scaled_table(w, axis, importance, levels(spec.bits))


def levels(bits: int) -> Array:
    """2^bits - 1 levels, up to 64 with 4 bits."""
    powers = 2 ** np.arange(2 ** (bits - 1) - 1, dtype=np.int32)
    return np.concatenate([-powers[::-1], [0], powers]).astype(np.int32)
