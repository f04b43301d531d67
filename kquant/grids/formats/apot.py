"""Sums of two powers of two (APoT: Li et al. 2020, arXiv 1909.13144), as its weights have them.

One term is 0 or one of three powers, the other 0 or one power with 4 bits, or one of three with 5:

    4 bits    {0, 2^-1, 2^-2, 2^-4} + {0, 2^-3}
    5 bits    {0, 2^-1, 2^-3, 2^-5} + {0, 2^-2, 2^-4, 2^-6}
"""

from __future__ import annotations

import numpy as np

from kquant.config.specs import QuantSpec
from kquant.grids.formats.rows import scaled_table
from kquant.grids.grid import Array, Grid

# bits -> the terms, in units of the smallest power
_TERMS = {4: ((0, 8, 4, 1), (0, 2)), 5: ((0, 32, 8, 2), (0, 16, 4, 1))}


def apot(w: Array, spec: QuantSpec, axis: int | None, importance: Array | None) -> Grid:
    """The scale of least squared error for every channel; see `formats.weight_grid`."""
    return scaled_table(w, axis, importance, levels(spec.bits))


def levels(bits: int) -> Array:
    """2^bits - 1 levels of either sign."""
    first, second = _TERMS[bits]
    return np.unique([sign * (a + b) for a in first for b in second for sign in (-1, 1)]).astype(np.int32)
