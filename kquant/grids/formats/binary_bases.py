"""Sums of binary vectors: w ~ s (+-a_1 +- ... +- a_k) (LQ-Nets, arXiv 1807.10029; ABC-Net, arXiv 1711.11294)."""

from __future__ import annotations

import itertools

import numpy as np

from kquant.config.specs import QuantSpec
from kquant.grids.formats.rows import importance_rows, to_rows
from kquant.grids.formats.shared_levels import shared_levels
from kquant.grids.grid import Array, Grid


def binary_bases(w: Array, spec: QuantSpec, axis: int | None, importance: Array | None) -> Grid:
    """The a_i of least squared error, shared by all channels, which have a scale each; see `formats.weight_grid`.

    k = bits. Alternating least squares: each weight goes to the nearest of the 2^k sums, then the a_i are those of
    least squared error, then the scales (algorithm 1 of LQ-Nets). Starts with the a_i that binarize what is left of
    the weights, one after the other.
    """
    rows, v = to_rows(w, axis), importance_rows(w, axis, importance)
    size = np.sqrt(np.square(rows).mean(axis=1, keepdims=True))
    left, v = np.abs(rows / np.where(size > 0, size, 1.0)), v * np.square(size)
    found = []
    for _ in range(spec.bits):
        found.append(float((v * left).sum() / max(v.sum(), np.finfo(np.float64).tiny)))
        left = np.abs(left - found[-1])
    levels, design = _sums(np.array(found))
    return shared_levels(w, axis, importance, levels, design)


def bases_design(table: Array) -> Array:
    """The signs of the a_i in each level of a table of all their sums, in rising order.

    (l - l_0) / 2 are the sums of all subsets of the a_i: the smallest that those found so far do not explain is the
    next a_i.
    """
    left = list(((table - table[0]) // 2).tolist())
    sums, found = [0], []
    left.remove(0)
    while left:
        found.append(left[0])
        more = [s + found[-1] for s in sums]
        for value in more:
            left.remove(value)
        sums += more
    return _sums(np.array(found, np.float64))[1]


def _sums(bases: Array) -> tuple[Array, Array]:
    """All sums +-a_1 +- ... +- a_k in rising order, and their signs."""
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(bases))))
    order = np.argsort(signs @ bases, kind="stable")
    return (signs @ bases)[order], signs[order]
