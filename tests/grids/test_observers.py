"""Streaming statistics against numpy on all the data at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kquant.errors import CalibrationError
from kquant.grids.observers import Histogram, MinMax, Rows

# Without numbers so near to 0 that float32 loses them beside the others.
NUMBERS = st.one_of(
    st.just(0.0), *(st.floats(*sorted((s * 2.0**-40, s * 2.0**k)), width=32) for s in (1, -1) for k in (1, 40))
)
VALUES = arrays(np.float32, st.integers(1, 60), elements=NUMBERS)


def observe(batches, bins=64):
    histogram = Histogram("x", bins)
    for batch in batches:
        histogram.update(batch)
    return histogram


def state(histogram):
    return (float(histogram.low), float(histogram.high), histogram.width, histogram.zeros, *histogram.counts.tolist())


@pytest.mark.parametrize("axis", [None, 0, 2, -1])
def test_min_max_is_that_of_all_data(axis):
    x = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    observer, other = MinMax("x", axis), MinMax("x", axis)
    pieces = np.array_split(x, 2, axis=1 if axis == 0 else 0)
    observer.update(pieces[0])
    other.update(pieces[1])
    observer.merge(other)
    others = None if axis is None else tuple(i for i in range(3) if i != axis % 3)
    np.testing.assert_array_equal(observer.low, x.min(axis=others))
    np.testing.assert_array_equal(observer.high, x.max(axis=others))


@given(batches=st.lists(VALUES, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_histogram_does_not_depend_on_order_or_cutting(batches, seed):
    rng = np.random.default_rng(seed)
    x = np.concatenate(batches)
    expected = state(observe([x]))
    assert state(observe(batches)) == expected
    assert state(observe(batches[::-1])) == expected
    assert state(observe(np.array_split(rng.permutation(x), 3))) == expected
    merged = observe(batches[:2])
    merged.merge(observe(batches[2:]))
    assert state(merged) == expected


@given(x=VALUES)
def test_histogram_counts_every_value_in_its_cell(x):
    histogram = observe([x])
    cells = np.floor(x.astype(np.float64) / histogram.width).astype(int)
    np.testing.assert_array_equal(histogram.counts, np.bincount(cells - cells.min(), minlength=len(histogram.counts)))
    assert histogram.counts[0] and histogram.counts[-1] and len(histogram.counts) <= 64
    assert histogram.zeros == np.sum(x == 0)
    values, counts = histogram.nonzero()
    assert counts.sum() == np.sum(x != 0) and (counts > 0).all()
    assert ((values >= x.min()) & (values <= x.max())).all()


def test_cells_are_as_narrow_as_the_bins_permit():
    histogram = observe([np.linspace(-1, 3, 1000)], bins=64)
    assert histogram.width == 2.0**-3  # 33 cells; half the width would need 65
    assert observe([np.full(10, 1000.0)]).centers == [1000.0]


def test_scale_by_a_power_of_two_changes_nothing_else():
    x = np.random.default_rng(3).normal(size=500).astype(np.float32)
    small, large = observe([x]), observe([x * 2**20])
    assert large.width == small.width * 2**20
    np.testing.assert_array_equal(small.counts, large.counts)


def test_percentiles_within_a_cell():
    x = np.random.default_rng(1).normal(size=100_000).astype(np.float32)
    histogram = observe(np.split(x, 10), bins=2048)
    for percent in (0, 0.01, 1, 50, 90, 99.99, 100):
        assert abs(histogram.percentile(percent) - np.percentile(x, percent)) <= 2 * histogram.width
    assert histogram.percentile(0) == x.min() and histogram.percentile(100) == x.max()


def test_memory_does_not_grow():
    histogram = Histogram("x", bins=64)
    for k in range(20):
        histogram.update(np.random.default_rng(k).normal(size=1000) * 3.0**k)
        assert len(histogram.counts) <= 64
    assert histogram.counts.sum() == 20_000


def sample(batches, limit=None):
    rows = Rows("x", limit)
    for batch in batches:
        rows.update(batch)
    return rows


@pytest.mark.parametrize("limit", [7, 100, 1000, None])
def test_rows_do_not_depend_on_order_or_cutting(limit):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 5)).astype(np.float32)
    x[200:] = x[:100]  # a row may come twice
    expected = sample([x], limit)
    assert len(expected.rows) == min(300, limit or 300)
    assert (expected.low, expected.high) == (x.min(), x.max())
    merged = sample(np.array_split(x[:120], 4), limit)
    merged.merge(sample([x[120:]], limit))
    batches = (x[::-1].reshape(3, 20, 5, 5), [x[:1], x[1:250], x[250:]], np.array_split(rng.permutation(x), 60))
    for found in (merged, *(sample(b, limit) for b in batches)):
        np.testing.assert_array_equal(found.rows, expected.rows)
        assert (found.low, found.high) == (expected.low, expected.high)


def test_rows_that_are_few_are_all_kept():
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    np.testing.assert_array_equal(sorted(sample(np.split(x, 8)).rows.tolist()), sorted(x.tolist()))


def test_the_kept_rows_are_a_fair_sample():
    # Whatever a row's values are, its chance is the same: the share of each kind is that of all data.
    rng = np.random.default_rng(0)
    x = (rng.integers(0, 4, (40_000, 1)) + 0.1 * rng.random((40_000, 3))).astype(np.float32)
    kept = sample(np.split(x, 10), limit=4000).rows
    share = np.bincount(np.floor(kept[:, 0]).astype(int), minlength=4) / len(kept)
    np.testing.assert_allclose(share, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 4000))
    np.testing.assert_allclose((kept % 1).mean(axis=0), 0.05, atol=4 * 0.029 / np.sqrt(4000))


def test_rows_take_bounded_memory():
    wide, narrow = Rows("x"), Rows("x")
    for k in range(4):
        wide.update(np.random.default_rng(k).normal(size=(100, 20_000)))
        narrow.update(np.random.default_rng(k).normal(size=(60_000, 4)))
    assert len(wide.rows) == 256  # the fewest, however wide
    assert narrow.rows.nbytes == 2 << 20


def test_samples_of_different_size_do_not_merge():
    with pytest.raises(ValueError, match="merged"):
        Rows(limit=8).merge(Rows())


@pytest.mark.parametrize("observer", [MinMax("conv_1"), MinMax("conv_1", axis=1), Histogram("conv_1"), Rows("conv_1")])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_names_the_tensor(observer, bad):
    with pytest.raises(CalibrationError, match="conv_1"):
        observer.update(np.array([[1.0, bad, 2.0]]))


@pytest.mark.parametrize("observer", [MinMax("conv_1"), Histogram("conv_1"), Rows("conv_1")])
def test_nothing_seen(observer):
    observer.update(np.zeros((0, 3)))
    observer.merge(type(observer)())
    with pytest.raises(CalibrationError, match="conv_1"):
        _ = observer.low


def test_histograms_of_different_size_do_not_merge():
    with pytest.raises(ValueError, match="merged"):
        Histogram(bins=8).merge(Histogram(bins=16))
