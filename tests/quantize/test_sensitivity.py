"""Steps from sensitivity: what they cost, what a layer's Fisher information is, and the bounds of a step."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.errors import ConfigError
from kquant.graph.ir import Graph
from kquant.graph.ops import compute, evaluate, weight_view, without_clip
from kquant.graph.transforms import prepare_graph
from kquant.grids.grid import Grid, dequantize
from kquant.keras.model import extract
from kquant.quantize.gram import Moments
from kquant.quantize.sensitivity import allowed_errors, with_steps

X = np.random.default_rng(1).normal(size=(256, 8, 8, 3)).astype(np.float32)


def network(softmax: bool = True) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(16, 3, padding="same", activation="relu", name="conv")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="relu6", name="depthwise")(x)
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(24, 1, activation="relu", name="pointwise")(x))
    x = layers.Dense(6, name="dense", kernel_initializer=keras.initializers.RandomNormal(stddev=3))(x)
    return keras.Model(inputs, layers.Softmax()(x) if softmax else x)


NAMES = ["conv", "depthwise", "pointwise", "dense"]


def batches(x: np.ndarray) -> list[tuple[np.ndarray]]:
    return [(x[k : k + 32],) for k in range(0, len(x), 32)]


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    p, q = p.astype(np.float64), q.astype(np.float64)
    return float((p * np.log((p + 1e-30) / (q + 1e-30))).sum(-1).mean())


def noisy(graph: Graph, steps: dict[str, np.ndarray], seed: int) -> Graph:
    """Weights with the uniform errors of steps per channel, and biases that take up the shifts of the means."""
    rng = np.random.default_rng(seed)
    found = graph
    for name, step in steps.items():
        node = graph[name]
        noise = (rng.uniform(-0.5, 0.5, weight_view(node).shape) * step).reshape(node.weights["kernel"].shape)
        changed = without_clip(node).with_weights(kernel=(node.weights["kernel"] + noise).astype(np.float32))
        x = evaluate(graph, [X], [node.inputs[0]])
        shift = np.asarray(compute(changed, x)) - np.asarray(compute(without_clip(node), x))
        bias = node.weights["bias"] - shift.mean(axis=tuple(range(shift.ndim - 1)))
        moved = node.with_weights(kernel=changed.weights["kernel"], bias=bias.astype(np.float32))
        found = found.rebuild(moved if n.name == name else n for n in found)
    return found


def test_uniform_errors_of_the_steps_cost_about_the_divergence_that_is_allowed() -> None:
    graph = prepare_graph(network())
    allowed = allowed_errors(graph, NAMES, batches(X), 1e-3, progress=False)
    steps = {}
    for name in NAMES:
        x = np.asarray(evaluate(graph, [X], [graph[name].inputs[0]])[0])
        axes = tuple(range(x.ndim - 1))
        steps[name] = np.sqrt(allowed[name] / (x.var(axis=axes) if name == "depthwise" else x.var(axis=axes).mean()))
    wanted = np.asarray(evaluate(graph, [X])[0])
    costs = [divergence(wanted, np.asarray(evaluate(noisy(graph, steps, seed), [X])[0])) for seed in range(8)]
    assert 0.5e-3 < np.mean(costs) < 2e-3


@pytest.mark.slow
def test_what_decides_an_output_of_integers_is_what_counts() -> None:
    """As long as the seed draws the same, a mask of classes allows what the scores behind it do."""
    scores = network(softmax=False)
    masked = keras.Model(scores.inputs, keras.ops.argmax(scores.outputs[0], -1))
    wanted, found = (
        allowed_errors(prepare_graph(model), NAMES, batches(X), 0.1, progress=False) for model in (scores, masked)
    )
    for name in NAMES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5)
    qmodel = kquant.quantize_model(masked, X, "w8a8-d0.3", progress=False)
    assert qmodel.quantization.taken["adaround"]


def test_what_is_allowed_is_proportional_to_the_divergence_and_falls_with_influence() -> None:
    graph = prepare_graph(network())
    one, four = (allowed_errors(graph, NAMES, batches(X), d, progress=False) for d in (0.1, 0.4))
    for name in NAMES:
        np.testing.assert_allclose(four[name], 4 * one[name], rtol=1e-6)
        assert one[name].shape == (graph[name].shape[-1],) and (one[name] > 0).all()
    assert np.ptp(one["dense"]) == 0  # the mean of the layer
    assert np.ptp(one["conv"]) > 0


def test_outputs_that_are_no_probabilities_are_told_by_their_spread() -> None:
    graph = prepare_graph(network(softmax=False))
    scaled = graph.rebuild(n.with_weights(kernel=10 * n.weights["kernel"]) if n.name == "dense" else n for n in graph)
    first, second = (allowed_errors(g, NAMES[:3], batches(X), 0.1, progress=False) for g in (graph, scaled))
    for name in NAMES[:3]:
        np.testing.assert_allclose(first[name], second[name], rtol=0.01)


def test_a_step_is_within_the_largest_weight_and_what_reaches_it() -> None:
    grid = Grid(np.ones(4, np.float32), np.zeros(4, np.int32), -127, 127, 0)
    m = Moments(9, np.zeros((1, 1, 2)), np.zeros((1, 1, 4)), np.diag([1.0, 3.0])[None], np.zeros((1, 2, 4)),
                np.ones((1, 1, 4)))  # fmt: skip
    largest = np.array([[1.0, 1.0, 1.0, 0.0]])
    found = with_steps(grid, np.array([0.02, 100.0, 1e-9, 1.0]), m, largest).scale
    np.testing.assert_allclose(found[:3], [0.1, 1.0, 1 / 127], rtol=1e-6)
    assert found[3] > 0
    alone = with_steps(Grid(np.float32(1), np.int32(0), -127, 127), np.array([0.02, 0.02, 0.02, 0.02]), m, largest)
    np.testing.assert_allclose(alone.scale, 0.1, rtol=1e-6)


@pytest.mark.slow
def test_more_divergence_takes_fewer_bits_and_the_file_computes_what_is_simulated() -> None:
    entropies = []
    for d in (0.0001, 0.01):
        config = kquant.QuantConfig.preset(f"w8a8-d{d}")
        assert config.divergence == d and kquant.QuantConfig.from_dict(config.to_dict()) == config
        qmodel = kquant.quantize_model(network(), X, config, progress=False)
        qgraph = extract(qmodel)
        entropies.append(sum(q.entropy(qgraph.integers[n]) for n, q in qgraph.weights.items()))
        for name, q in qgraph.weights.items():
            assert np.abs(qgraph.integers[name]).max() <= 127
            assert dequantize(qgraph.integers[name], q).any(axis=tuple(range(qgraph.integers[name].ndim - 1))).any()
        parity = kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, X[:16])
        assert parity.ok and parity.reference_max_lsb == 0
        assert qmodel.quantization.taken["divergence"]
    assert entropies[1] < 0.8 * entropies[0]


def test_without_data_or_adaround_it_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="pass calibration_data"):
        kquant.quantize_model(network(), None, "w8a8-d0.1", progress=False)
    with pytest.raises(ConfigError, match="leave adaround switched on"):
        kquant.quantize_model(network(), X, {"preset": "w8a8-d0.1", "adaround": False}, progress=False)
    for value in (0, -1.0, "much", float("nan")):
        with pytest.raises(ConfigError, match="divergence must be"):
            kquant.QuantConfig(divergence=value)
