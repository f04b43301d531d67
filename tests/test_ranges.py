"""Range methods against brute force."""

import numpy as np
import pytest

from kquant.affine import fake_quantize, qparams_from_range
from kquant.config import METHODS, WEIGHTS, QuantSpec
from kquant.errors import CalibrationError, ConfigError, ModelError
from kquant.observers import Histogram, MinMax
from kquant.ranges import ACTIVATION_METHODS, WEIGHT_METHODS, activation_range, weight_range

GRIDS = {
    "asymmetric": QuantSpec(),
    "symmetric": QuantSpec(symmetric=True),
    "narrow": WEIGHTS,
    "power_of_two": QuantSpec(symmetric=True, power_of_two=True),
}
RNG = np.random.default_rng(0)
DATA = {
    "normal": RNG.normal(size=40_000),
    "shifted": RNG.normal(size=40_000) * 0.5 - 1,
    "relu": np.maximum(RNG.normal(size=40_000), 0),
    "heavy": RNG.standard_t(3, size=40_000),
    "outlier": np.append(RNG.normal(size=40_000), 60),
    "positive": RNG.uniform(2, 3, size=40_000),
    "negative": -RNG.uniform(2, 3, size=40_000),
    "constant": np.full(100, 5.0),
    "zeros": np.zeros(100),
}


def error(x, low, high, spec):
    x = np.asarray(x, np.float32)
    return float(np.mean(np.square(fake_quantize(x, qparams_from_range(low, high, spec)) - x, dtype=np.float64)))


def histogram(x, parts=1):
    result = Histogram("x")
    for part in np.array_split(x, parts):
        result.update(part)
    return result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", DATA)
def test_every_range_contains_zero_and_lies_within_the_data(method, grid, name):
    x, spec = DATA[name], GRIDS[grid].override({"bits": 4})
    bottom, top = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
    for low, high in (
        weight_range(method, x, spec),
        activation_range(method, histogram(x), spec),
    ):
        assert low.dtype == high.dtype == np.float32 and low.shape == high.shape == ()
        assert bottom <= low <= 0 <= high <= top


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", DATA)
def test_mse_is_never_worse_than_min_max(bits, grid, name):
    x, spec = DATA[name], GRIDS[grid].override({"bits": bits})
    full = error(x, x.min(), x.max(), spec)
    assert error(x, *weight_range("mse", x, spec), spec) <= full * (1 + 1e-6)
    # The histogram knows a value to within its cell only.
    assert error(x, *activation_range("mse", histogram(x), spec), spec) <= full * 1.001 + 1e-12


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("grid", ["narrow", "asymmetric", "power_of_two"])
def test_weight_mse_agrees_with_brute_force(bits, grid):
    spec = GRIDS[grid].override({"bits": bits})
    w = (RNG.laplace(size=(3000, 8)) * 10.0 ** np.arange(-5, 3)).astype(np.float32)
    bottom, top = w.min(axis=0), w.max(axis=0)

    def errors(low, high):
        return np.square(fake_quantize(w, qparams_from_range(low, high, spec, axis=1)) - w, dtype=np.float64).sum(
            axis=0
        )

    brute = np.min([errors(r * bottom, r * top) for r in np.linspace(0.001, 1, 1000)], axis=0)
    ratios = errors(*weight_range("mse", w, spec, axis=1)) / brute
    assert ratios.mean() <= 1.001 and ratios.max() <= 1.003


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("name", ["relu", "outlier", "heavy"])
def test_activation_mse_agrees_with_brute_force(bits, name):
    spec = QuantSpec(bits=bits, symmetric=name != "relu")
    x = DATA[name]
    observed = histogram(x)
    values, counts = observed.nonzero()

    def expected(low, high):
        wrong = fake_quantize(values, qparams_from_range(low, high, spec)) - values
        return float(np.dot(counts, np.square(wrong)))

    low, high = min(x.min(), 0), x.max()
    brute = min(expected(r * low, r * high) for r in np.linspace(0.001, 1, 1000))
    assert expected(*activation_range("mse", observed, spec)) <= 1.001 * brute


@pytest.mark.parametrize("bits", [3, 4])
def test_asymmetric_mse_moves_each_edge_on_its_own(bits):
    x, spec = DATA["shifted"], QuantSpec(bits=bits)
    found = error(x, *activation_range("mse", histogram(x), spec), spec)
    ratios = np.linspace(0.05, 1, 40)
    brute = min(error(x[::10], a * x.min(), b * x.max(), spec) for a in ratios for b in ratios)
    tied = min(error(x, r * x.min(), r * x.max(), spec) for r in np.linspace(0.05, 1, 200))
    assert found <= 1.03 * brute and found <= tied


def test_order_and_size_of_the_batches_change_nothing():
    for method in ACTIVATION_METHODS:
        results = {
            activation_range(method, histogram(x, parts), QuantSpec(bits=4))
            for x in (DATA["heavy"], DATA["heavy"][::-1])
            for parts in (1, 3, 100)
        }
        assert len(results) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_channels_are_independent(method, axis):
    w, spec = RNG.normal(size=(5, 6, 7)), WEIGHTS.override({"bits": 4})
    low, high = weight_range(method, w, spec, axis)
    for c in range(w.shape[axis]):
        alone = weight_range(method, w.take(c, axis), spec)
        np.testing.assert_allclose((low[c], high[c]), alone, rtol=1e-6)


def test_percentile_cuts_the_tails():
    spec = QuantSpec(method="percentile", percentile=99.0)
    low, high = np.percentile(DATA["normal"], [1, 99])
    np.testing.assert_allclose(weight_range("percentile", DATA["normal"], spec), (low, high), rtol=1e-5)
    observed = histogram(DATA["normal"])
    np.testing.assert_allclose(activation_range("percentile", observed, spec), (low, high), atol=2 * observed.width)


def test_16_bits_keep_the_min_max_range():
    spec = QuantSpec(bits=16, symmetric=True)
    x = DATA["normal"].astype(np.float32)
    assert activation_range("mse", histogram(x), spec) == (x.min(), x.max())


def test_zeros_do_not_count():
    x = DATA["relu"]
    spec = QuantSpec(bits=4)
    assert activation_range("mse", histogram(np.append(x, np.zeros(10**6))), spec) == activation_range(
        "mse", histogram(x), spec
    )


@pytest.mark.parametrize("bad", [np.array([1.0, np.nan]), np.array([1.0, np.inf]), np.zeros((3, 0))])
def test_bad_weights_name_the_layer(bad):
    with pytest.raises(ModelError, match="conv_1"):
        weight_range("min_max", bad, WEIGHTS, name="conv_1")


def test_methods_and_their_needs():
    assert set(WEIGHT_METHODS) == set(METHODS) == set(ACTIVATION_METHODS)
    with pytest.raises(ConfigError, match="octav"):
        weight_range("octav", np.ones(3), WEIGHTS)
    observer = MinMax("x")
    observer.update(np.array([1.0, 2.0]))
    assert activation_range("min_max", observer, QuantSpec()) == (0, 2)
    with pytest.raises(ConfigError, match="histogram"):
        activation_range("mse", observer, QuantSpec())
    with pytest.raises(CalibrationError, match="conv_1"):
        activation_range("mse", Histogram("conv_1"), QuantSpec())
