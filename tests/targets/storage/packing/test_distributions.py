"""The curves, against those of scipy, and the tables made of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from kquant.targets.storage.packing.distributions import CENTRES, FAMILIES, WIDTHS, Profile, Tables, deviations
from kquant.targets.storage.packing.rans import TOTAL

GAUSS, LOGISTIC = stats.norm(), stats.logistic(scale=np.sqrt(3) / np.pi)
LAPLACE = stats.laplace(scale=1 / np.sqrt(2))
CURVES = (
    GAUSS.cdf,
    lambda z: (GAUSS.cdf(z) + LOGISTIC.cdf(z)) / 2,
    lambda z: (LOGISTIC.cdf(z) + LAPLACE.cdf(z)) / 2,
)


@pytest.mark.parametrize("family", range(FAMILIES))
def test_frequencies_are_those_of_the_curve(family: int) -> None:
    width, centre = 24, CENTRES // 2 + 3  # 9.6 wide, 1.2 widths above zero
    freq = Profile(-128, 127, family).frequencies(np.array([width]), np.array([centre]))[0]
    sigma = deviations()[width]
    edges = (np.arange(-128, 127) + 0.5) / sigma - 1.2
    share = np.diff(np.concatenate([[0.0], CURVES[family](edges), [1.0]]))
    np.testing.assert_allclose(freq / TOTAL, share, atol=0.002)


@pytest.mark.parametrize("profile", [Profile(-128, 127), Profile(0, 2, 2, 1), Profile(5, 5), Profile(-7, 7, 1, 2)])
def test_every_value_of_the_range_can_be_coded_in_every_context(profile: Profile) -> None:
    widths, centres = (a.reshape(-1) for a in np.meshgrid(np.arange(WIDTHS), np.arange(CENTRES)))
    freq = profile.frequencies(widths, centres)
    size = profile.high - profile.low + 1
    assert np.all(freq.sum(axis=1) == TOTAL) and np.all(freq[:, :size] >= 1) and not freq[:, size:].any()


def test_a_tilt_makes_values_more_frequent_by_quarter_octaves() -> None:
    where = np.array([12]), np.array([CENTRES // 2])
    plain = Profile(-1, 1).frequencies(*where)[0, :3]
    tilted = Profile(-1, 1, tilt=(-4, 4, -4)).frequencies(*where)[0, :3]
    expected = plain * [0.5, 2, 0.5]
    np.testing.assert_allclose(tilted / TOTAL, expected / expected.sum(), atol=0.002)


def test_widths_are_a_quarter_octave_apart() -> None:
    np.testing.assert_allclose(deviations(), 0.15 * 2 ** (np.arange(WIDTHS) / 4), rtol=1e-12)


def test_tables_are_made_once_and_keep_their_rows() -> None:
    tables = Tables([Profile(-128, 127), Profile(0, 3)], slots=True)
    first = np.array([40, 7, 40, WIDTHS * CENTRES + 9])
    rows = tables.rows(first)
    before = tables.freq[rows].copy()
    tables.rows(np.arange(200))
    np.testing.assert_array_equal(tables.rows(first), rows)
    np.testing.assert_array_equal(tables.freq[rows], before)
    row = rows[1]
    np.testing.assert_array_equal(np.bincount(tables.slots[row], minlength=256), tables.freq[row])
