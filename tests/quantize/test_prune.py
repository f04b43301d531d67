"""Pruning: shares, patterns, least squares of what stays, and zeros that stay on the way to the file."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.config.pruning import Prune
from kquant.errors import ConfigError
from kquant.graph.ops import evaluate, weight_view
from kquant.keras.model import extract
from kquant.quantize.prune import least_squares, prune, removed
from tests.support.toy import toy_data, toy_graph

RNG = np.random.default_rng(0)
NAMES = ["c1", "dw", "fc"]


def batches(x: np.ndarray) -> list[tuple[np.ndarray]]:
    return [(x[k : k + 32],) for k in range(0, len(x), 32)]


def error(a, b) -> float:
    x = toy_data(256, seed=5)
    return float(np.mean(np.square(evaluate(a, [x], ["fc"])[0] - evaluate(b, [x], ["fc"])[0])))


def test_least_squares_with_holes_are_those_of_a_solver() -> None:
    rows = RNG.normal(size=(2, 60, 12)) * np.geomspace(1, 10, 12)
    metric, target = rows.transpose(0, 2, 1) @ rows, RNG.normal(size=(2, 12, 5))
    alive = RNG.random((2, 12, 5)) < 0.5
    found = least_squares(metric, target, alive, np.zeros_like(target), 200)
    for g in range(2):
        for c in range(5):
            s = alive[g, :, c]
            want = np.linalg.solve(metric[g][np.ix_(s, s)], (metric[g] @ target[g, :, c])[s])
            np.testing.assert_allclose(found[g, s, c], want, rtol=1e-4, atol=1e-4)
    assert not found[~alive].any()


def test_the_smallest_scores_go_first() -> None:
    score = RNG.random((1, 8, 10))
    alive = removed(score, np.ones(score.shape, bool), 0.25)
    assert alive.sum() == 20 and score[alive].min() > score[~alive].max()
    again = removed(np.ones_like(score), alive, 0.125)
    assert again.sum() == 10 and not (again & ~alive).any()
    quads = removed(score, np.ones(score.shape, bool), 0.5, "2:4").reshape(2, 4, 10)
    np.testing.assert_array_equal(quads.sum(1), 2)


def test_second_order_pruning_hurts_less_than_magnitudes() -> None:
    graph, data = toy_graph(), batches(toy_data(128))
    magnitude, _ = prune(graph, NAMES, None, Prune(sparsity=0.5, method="magnitude"))
    obs, report = prune(graph, NAMES, data, Prune(sparsity=0.5), progress=False)
    assert error(graph, obs) < 0.5 * error(graph, magnitude)
    assert [r.node for r in report] == ["c1", "fc"]  # the depthwise layer is left alone
    for row in report:
        assert row.zeros == pytest.approx(0.5, abs=0.02) and 0 < row.error < 1
        assert np.mean(weight_view(obs[row.node]) == 0) == row.zeros


def test_a_share_by_sensitivity_is_one_of_all() -> None:
    graph, data = toy_graph(), batches(toy_data(128))
    pruned, report = prune(graph, NAMES, data, Prune(sparsity=0.6, by="sensitivity"), progress=False)
    sizes = [weight_view(pruned[r.node]).size for r in report]
    assert np.average([r.zeros for r in report], weights=sizes) == pytest.approx(0.6, abs=0.03)
    assert report[0].zeros != pytest.approx(report[1].zeros, abs=0.02)


def test_what_needs_data_says_so_and_nothing_to_prune_is_an_error() -> None:
    with pytest.raises(ConfigError, match="pass calibration_data"):
        prune(toy_graph(), NAMES, None, Prune())
    with pytest.raises(ConfigError, match="no layer to prune"):
        prune(toy_graph(), ["dw"], None, Prune(method="magnitude"))


@pytest.mark.parametrize(
    "changes, message",
    [({"sparsity": 1.0}, "below 1"), ({"method": "obd"}, "method 'obd'"), ({"by": "layer"}, "by 'layer'"),
     ({"pattern": "1:4"}, "pattern '1:4'"), ({"pattern": "2:4", "sparsity": 0.7}, "sparsity=0.5"),
     ({"keep": "("}, "regular expression"), ({"sparsity": True}, "above 0")],
)  # fmt: skip
def test_nonsense_is_refused(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Prune(**changes)
    with pytest.raises(ConfigError):
        kquant.QuantConfig.load({"preset": "w8a8", "prune": {**changes, "share": 0.5}})


X = np.random.default_rng(1).normal(size=(64, 8, 8, 4)).astype(np.float32)


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 4), name="image")
    x = layers.Conv2D(16, 3, padding="same", use_bias=False, name="conv")(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(16, 3, strides=2, activation="relu", name="second")(x)
    return keras.Model(inputs, layers.Dense(5, name="dense")(layers.Flatten()(x)))


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w3a8-kmeans"])
def test_zeros_stay_in_every_later_step_and_in_the_file(preset) -> None:
    config = kquant.QuantConfig.load({"preset": preset, "prune": {"sparsity": 0.6, "keep": "dense"}})
    assert kquant.QuantConfig.from_dict(config.to_dict()) == config
    qmodel = kquant.quantize_model(network(), X, config, progress=False)
    qgraph = extract(qmodel)
    for name in ("conv", "second"):
        assert np.mean(qgraph.integers[name] == 0) >= 0.59
    assert np.mean(qgraph.integers["dense"] == 0) < 0.4
    assert qmodel.quantization.taken["prune"] and "60.0 % zeros" in str(qmodel.report)
    assert kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, X[:8]).ok


def test_the_2_of_4_pattern_is_in_the_integers() -> None:
    config = {"preset": "w8a8", "prune": {"sparsity": 0.5, "pattern": "2:4"}}
    integers = extract(kquant.quantize_model(network(), X, config, progress=False)).integers
    for name in ("conv", "second", "dense"):
        w = integers[name]
        quads = (w != 0).reshape(-1, w.shape[-1]).reshape(-1, 4, w.shape[-1])
        assert (quads.sum(1) <= 2).all()


@pytest.mark.slow
def test_training_keeps_pruned_zeros() -> None:
    config = {"preset": "w8a8", "prune": {"sparsity": 0.6}}
    qat = kquant.prepare_qat(network(), X, config, progress=False)
    zeros = {n: w == 0 for n, w in ((k, weight_view(v)) for k, v in extract(qat).graph.nodes.items() if k in NETWORK)}
    qat.compile(keras.optimizers.Adam(0.01), "mse")
    qat.fit(X, np.random.default_rng(2).normal(size=(64, 5)), epochs=2, verbose=0)
    after = extract(qat)
    for name, gone in zeros.items():
        assert gone.mean() > 0.59 and not after.integers[name][gone].any()


NETWORK = ("conv", "second", "dense")
