"""Lookup tables of LiteRT's int16 kernels, shared by the simulation and the integer reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kquant.targets.litert.arithmetic import round_half_away


def lut_513(
    curve: Callable[[np.ndarray], np.ndarray], low: float, high: float, dtype: type[np.floating] = np.float64
) -> np.ndarray:
    """513 int16 samples of a function on [low, high], each corrected by half the error at its interval's middle.

    Args:
        curve: the function.
        low, high: its ends.
        dtype: the precision in which the samples are taken.
    """
    step = (high - low) / 512
    left = (low + step * np.arange(512)).astype(dtype)
    ends = round_half_away(curve(left) * 32768.0)
    middle = round_half_away(curve(left + step / 2) * 32768.0)
    between = round_half_away((curve(left + step) * 32768.0 + ends) / 2)
    corrected = ends - round_half_away((between - middle) / 2)
    last = round_half_away(curve(np.array([high], dtype)) * 32768.0)
    return np.clip(np.concatenate([corrected, last]), -32768, 32767).astype(np.int64)


EXP = lut_513(np.exp, -10.0, 0.0)  # exp(v) for v in [-10, 0]
RECIPROCAL = lut_513(lambda v: 1 / (1 + v), 0.0, 1.0)  # 1 / (1 + v) for v in [0, 1]


def _sigmoid_table() -> np.ndarray:
    """sigmoid(i / 24) with 16 fractional bits, each entry raised by half the chord's error at its interval's middle."""

    def exact(i: np.ndarray) -> np.ndarray:
        return 65536 / (1 + np.exp(-i / 24.0))

    i = np.arange(256)
    chord = (exact(i) + exact(i + 1)) / 2
    table = np.rint(exact(i) + (exact(i + 0.5) - chord) / 2).astype(np.int64)
    table[-1] = 65535
    return table


SIGMOID = _sigmoid_table()
