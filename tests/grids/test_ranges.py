"""Range methods against brute force."""

import numpy as np
import pytest

from kquant.config.specs import METHODS, WEIGHTS, QuantSpec
from kquant.config.specs import WEIGHT_METHODS as WEIGHT_METHOD_NAMES
from kquant.errors import CalibrationError, ConfigError, ModelError
from kquant.graph.moments import Moments
from kquant.grids.grid import fake_quantize, grid_from_range
from kquant.grids.observers import Histogram, MinMax, Rows
from kquant.grids.ranges import ACTIVATION_METHODS, WEIGHT_METHODS, activation_range, weight_range

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
    return float(np.mean(np.square(fake_quantize(x, grid_from_range(low, high, spec)) - x, dtype=np.float64)))


def histogram(x, parts=1):
    result = Histogram("x")
    for part in np.array_split(x, parts):
        result.update(part)
    return result


@pytest.mark.parametrize("method", WEIGHT_METHODS)
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
        return np.square(fake_quantize(w, grid_from_range(low, high, spec, axis=1)) - w, dtype=np.float64).sum(axis=0)

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
        wrong = fake_quantize(values, grid_from_range(low, high, spec)) - values
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
    for method in ("min_max", "percentile", "mse"):
        results = {
            activation_range(method, histogram(x, parts), QuantSpec(bits=4))
            for x in (DATA["heavy"], DATA["heavy"][::-1])
            for parts in (1, 3, 100)
        }
        assert len(results) == 1


@pytest.mark.parametrize("method", WEIGHT_METHODS)
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
    assert set(WEIGHT_METHODS) == set(WEIGHT_METHOD_NAMES) and set(ACTIVATION_METHODS) <= set(METHODS)
    with pytest.raises(ConfigError, match="octav"):
        weight_range("octav", np.ones(3), WEIGHTS)
    observer = MinMax("x")
    observer.update(np.array([1.0, 2.0]))
    assert activation_range("min_max", observer, QuantSpec()) == (0, 2)
    with pytest.raises(ConfigError, match="histogram"):
        activation_range("mse", observer, QuantSpec())
    with pytest.raises(ConfigError, match="rows of logits"):
        activation_range("cross_entropy", observer, QuantSpec())
    for method, unseen in (("mse", Histogram("conv_1")), ("cross_entropy", Rows("conv_1"))):
        with pytest.raises(CalibrationError, match="conv_1"):
            activation_range(method, unseen, QuantSpec())


# --- cross-entropy ------------------------------------------------------------------------------------------------

CLASSIFIER = (2 * RNG.gumbel(size=(400, 20)) - 3).astype(np.float32)
MANY = (RNG.normal(size=(256, 100)) - 6).astype(np.float32)  # most are small or negative, a few matter
MANY[np.arange(256), RNG.integers(0, 100, 256)] = RNG.uniform(2, 5, 256)
LOGITS = {
    "classifier": CLASSIFIER,
    "many": MANY,
    "positive": np.abs(CLASSIFIER) + 1,
    "negative": -np.abs(CLASSIFIER) - 1,
    "constant": np.full((8, 4), 5, np.float32),
    "same rows": np.tile(np.float32([1, 2, 3]), (8, 1)),
    "one class": RNG.normal(size=(8, 1)).astype(np.float32),
    "zeros": np.zeros((8, 4), np.float32),
    "huge": CLASSIFIER * np.float32(1e6),
}


def rows_of(x, parts=1):
    result = Rows("x")
    for part in np.array_split(x, parts):
        result.update(part)
    return result


def log_softmax(x):
    x = np.asarray(x, np.float64) - np.max(x, axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def cross_entropy(x, low, high, spec):
    """H(softmax(x), softmax(x_q)) of section 3.1, written out."""
    quantized = fake_quantize(x, grid_from_range(low, high, spec))
    return float(-(np.exp(log_softmax(x)) * log_softmax(quantized)).sum(axis=1).mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", LOGITS)
def test_cross_entropy_is_never_worse_than_min_max(bits, grid, name):
    x, spec = LOGITS[name], GRIDS[grid].override({"bits": bits})
    bottom, top = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    low, high = activation_range("cross_entropy", rows_of(x), spec)
    assert low.dtype == high.dtype == np.float32 and low.shape == high.shape == ()
    assert bottom <= low <= 0 <= high <= top and (low < high or bottom == top)
    assert cross_entropy(x, low, high, spec) <= cross_entropy(x, bottom, top, spec) + 1e-6


@pytest.mark.parametrize("bits", [3, 4, 5])
@pytest.mark.parametrize("name", ["classifier", "many"])
def test_cross_entropy_agrees_with_brute_force(bits, name):
    x, spec = LOGITS[name], QuantSpec(bits=bits)
    ratios = np.linspace(0.04, 1, 25)
    brute = min(cross_entropy(x, a * x.min(), b * x.max(), spec) for a in ratios for b in ratios)
    least = float(-(np.exp(log_softmax(x)) * log_softmax(x)).sum(axis=1).mean())  # the entropy of the float model
    found = cross_entropy(x, *activation_range("cross_entropy", rows_of(x), spec), spec)
    assert found - least <= 1.25 * (brute - least)  # a landscape with many small steps


def test_cross_entropy_keeps_the_large_logits_that_mse_gives_up():
    """The reason for the method: MSE serves the many small logits, the order of the large ones is what counts."""
    spec = QuantSpec(bits=3)
    kept = {m: activation_range(m, o(MANY), spec) for m, o in (("cross_entropy", rows_of), ("mse", histogram))}
    loss = {m: cross_entropy(MANY, *edges, spec) for m, edges in kept.items()}
    assert loss["cross_entropy"] < 0.8 * loss["mse"]


def test_cross_entropy_leaves_logits_alone_that_no_range_improves():
    for name, bits in (("constant", 4), ("one class", 4), ("zeros", 4), ("classifier", 16)):
        x, spec = LOGITS[name], QuantSpec().override({"bits": bits})
        low, high = activation_range("cross_entropy", rows_of(x), spec)
        assert (low, high) == (min(x.min(), 0), max(x.max(), 0))


def test_cross_entropy_does_not_depend_on_order_or_cutting():
    spec = QuantSpec(bits=4)
    found = {activation_range("cross_entropy", rows_of(x, k), spec) for x in (MANY[:50], MANY[49::-1]) for k in (1, 7)}
    assert len(found) == 1


def test_batch_norm_is_the_reach_of_all_channels():
    """Equations 18-19 with alpha = 6, within the bounds of the activation."""
    mean, std = np.asarray([-1.0, 0.5, 2.0]), np.asarray([0.1, 0.3, 0.2])
    moments = Moments.normal(mean, std)
    low, high = activation_range("batch_norm", moments, QuantSpec())
    assert np.isclose(low, min(mean - 6 * std)) and np.isclose(high, max(mean + 6 * std))
    assert activation_range("batch_norm", moments.clip(0, 2.9), QuantSpec()) == (0, np.float32(2.9))
    with pytest.raises(ConfigError, match="needs moments"):
        activation_range("batch_norm", histogram(DATA["normal"]), QuantSpec())
