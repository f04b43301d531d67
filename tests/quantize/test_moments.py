"""Moments against Monte Carlo simulation and closed forms."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from experiments.zoo import MODELS, load_model
from kquant.graph.ir import Graph, Node
from kquant.graph.moments import Moments, clipped_normal
from kquant.graph.ops import evaluate
from kquant.graph.transforms import prepare_graph
from kquant.quantize.input_moments import estimate_inputs, nonnegative_least_squares
from kquant.quantize.moments import linear_mean, propagate
from tests.support.toy import toy_graph
from tests.support.tracing import build

L = keras.layers
FIELDS = ("mean", "std", "low", "high")


def random_moments(channels: int, seed: int = 0) -> Moments:
    rng = np.random.default_rng(seed)
    return Moments.normal(rng.normal(0, 1, channels), rng.uniform(0.2, 1.5, channels))


def sampled(graph: Graph, x: Moments, samples: int, seed: int = 1) -> dict[str, Moments]:
    """Moments of every tensor, from independent normal inputs."""
    rng = np.random.default_rng(seed)
    shape = (samples, *graph[graph.inputs[0]].shape[1:])
    feed = rng.normal(x.mean, x.std, shape).astype(np.float32)
    names = list(graph.nodes)
    return {k: Moments.sample(np.asarray(v)) for k, v in zip(names, evaluate(graph, [feed], names), strict=True)}


def check(function: Any, shape: tuple[int, ...], samples: int, mean: float, std: float | None, seed: int = 0) -> None:
    """A model's output moments agree with the simulation, in units of the largest standard deviation.

    std None leaves out deviation and reach, where operands depend on each other.
    """
    graph = prepare_graph(build(function, shape, seed=seed))
    x = random_moments(shape[-1], seed)
    known, unknown = propagate(graph, {graph.inputs[0]: x})
    assert not unknown and set(known) == set(graph.nodes)
    found, expected = known[graph.outputs[0]], sampled(graph, x, samples)[graph.outputs[0]]
    assert all(getattr(found, k).shape == graph[graph.outputs[0]].shape[-1:] for k in FIELDS)
    size = max(expected.std.max(), 1e-6)
    np.testing.assert_allclose(found.mean, expected.mean, atol=mean * size)
    if std is not None:
        np.testing.assert_allclose(found.std, expected.std, atol=std * size)
        slack = 0.02 * (found.high - found.low)
        assert np.all(found.low <= expected.low + slack) and np.all(found.high >= expected.high - slack)


EXACT_MEAN = {  # linear in independent inputs: the mean is exact, borders included, and so is the variance inside
    "dense": (lambda x: L.Dense(6)(x), (20,)),
    "conv": (lambda x: L.Conv2D(4, 3, padding="valid")(x), (9, 9, 3)),
    "same": (lambda x: L.Conv2D(4, 3, padding="same", strides=2)(x), (8, 7, 3)),
    "grouped": (lambda x: L.Conv2D(4, (1, 3), groups=2, padding="same", dilation_rate=2)(x), (9, 9, 4)),
    "depthwise": (lambda x: L.DepthwiseConv2D(3, depth_multiplier=2, padding="same")(x), (8, 8, 3)),
    "transpose": (lambda x: L.Conv2DTranspose(4, 3, strides=2, padding="same")(x), (6, 6, 3)),
    "transpose_valid": (lambda x: L.Conv2DTranspose(4, 4, strides=3, padding="valid")(x), (5, 5, 3)),
    "conv1d": (lambda x: L.Conv1D(4, 3, padding="same")(x), (8, 3)),
}


@pytest.mark.parametrize("name", EXACT_MEAN)
def test_linear_means_are_exact(name):
    function, shape = EXACT_MEAN[name]
    check(function, shape, 4000, mean=0.03, std=None)


@pytest.mark.parametrize("name", ["dense", "conv"])
def test_linear_deviations_of_independent_inputs_are_exact(name):
    function, shape = EXACT_MEAN[name]
    check(function, shape, 8000, mean=0.03, std=0.03)


@pytest.mark.parametrize("name", EXACT_MEAN)
def test_linear_mean_is_exact_for_inputs_alike_in_all_places(name):
    """Images whose pixels equal the channel mean, so that the average over places is known exactly."""
    function, shape = EXACT_MEAN[name]
    graph = prepare_graph(build(function, shape))
    mean = np.random.default_rng(3).normal(size=shape[-1]).astype(np.float32)
    node = next(n for n in graph if "kernel" in n.weights)
    y = np.asarray(evaluate(graph, [np.broadcast_to(mean, (1, *shape)).copy()], [node.name])[0], np.float64)
    expected = y.reshape(-1, y.shape[-1]).mean(0) - node.weights["bias"]
    found = linear_mean(node, node.weights["kernel"], mean, graph[node.inputs[0]].shape)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def residual(x: Any) -> Any:
    y = L.Dense(40, activation="relu")(x)
    return L.ReLU(6.0)(L.Add()([L.Dense(12)(y), L.Dense(12)(x)]))


MODELS_OF_ONE = {
    "mlp": (lambda x: L.Dense(5)(L.Dense(60, activation="relu")(L.Dense(60, activation="relu")(x))), (30,), None),
    "residual": (residual, (20,), 0.15),
    "swish": (lambda x: L.Activation("swish")(x), (6,), 0.02),
    "gelu": (lambda x: L.Activation("gelu")(x), (6,), 0.02),
    "sigmoid": (lambda x: L.Activation("sigmoid")(x), (6,), 0.02),
    "tanh": (lambda x: L.Activation("tanh")(x), (6,), 0.02),
    "elu": (lambda x: L.Activation("elu")(x), (6,), 0.02),
    "leaky": (lambda x: L.LeakyReLU(0.2)(x), (6,), 0.02),
    "hard_swish": (lambda x: L.Activation("hard_swish")(x), (6,), 0.02),
    "prelu": (lambda x: L.PReLU()(x), (6,), 0.02),
    "square": (lambda x: L.Multiply()([x, x]), (6,), 0.04),
    "product": (lambda x: x[:, :3] * x[:, 3:], (6,), 0.03),
    "minus": (lambda x: x - 2.0, (6,), 0.02),
    "maximum": (lambda x: keras.ops.maximum(x, 0.3), (6,), 0.02),
    "minimum": (lambda x: keras.ops.minimum(x[:, :3], x[:, 3:]), (6,), 0.02),
    "concat": (lambda x: keras.ops.concatenate([x, -x], -1), (4, 6), 0.02),
    "concat_places": (lambda x: keras.ops.concatenate([x, 2 * x], 1), (4, 6), 0.02),
    "flatten": (lambda x: L.Flatten()(x), (4, 3), 0.05),
    "regroup": (lambda x: L.Reshape((8, 3))(x), (4, 6), 0.02),
    "mix": (lambda x: L.Permute((2, 1))(x), (4, 6), None),
    "slice": (lambda x: x[:, 1:, ::2], (4, 6), 0.02),
    "zeros": (lambda x: L.ZeroPadding2D(2)(x), (4, 4, 3), 0.02),
    "channels": (lambda x: keras.ops.pad(x, ((0, 0), (0, 0), (1, 2))), (4, 3), 0.02),
    "reflect": (lambda x: keras.ops.pad(x, ((0, 0), (1, 1), (0, 0)), mode="reflect"), (4, 3), 0.02),
    "nearest": (lambda x: L.UpSampling2D(2)(x), (3, 3, 2), 0.02),
}


@pytest.mark.parametrize("name", MODELS_OF_ONE)
def test_other_operations_agree_with_simulation(name):
    function, shape, std = MODELS_OF_ONE[name]
    if name == "mix":  # every channel gets what all have together: right on average only
        graph = prepare_graph(build(function, shape))
        x = random_moments(shape[-1])
        found = propagate(graph, {graph.inputs[0]: x})[0][graph.outputs[0]]
        np.testing.assert_allclose(found.mean, np.full(4, x.mean.mean()))
    else:
        check(function, shape, 40_000 // int(np.prod(shape[:-1])), mean=0.08 if std is None else std, std=std)


@pytest.mark.parametrize("layer", [L.MaxPooling2D(2), L.GlobalMaxPooling2D(), L.AveragePooling2D(2)])
def test_pooling_lies_between_no_and_full_correlation(layer):
    graph = prepare_graph(build(lambda x: layer(x), (4, 4, 3)))
    x = random_moments(3)
    found = propagate(graph, {graph.inputs[0]: x})[0][graph.outputs[0]]
    independent = sampled(graph, x, 4000)[graph.outputs[0]]
    between = np.minimum(x.mean, independent.mean) - 0.02, np.maximum(x.mean, independent.mean) + 0.02
    assert np.all(between[0] <= found.mean) and np.all(found.mean <= between[1])
    assert np.all(found.std >= independent.std - 0.02)


def test_softmax_has_probabilities():
    graph = prepare_graph(build(lambda x: L.Softmax()(x), (5,)))
    found = propagate(graph, {graph.inputs[0]: random_moments(5)})[0][graph.outputs[0]]
    assert found.mean.sum() == pytest.approx(1) and np.all(found.low == 0) and np.all(found.high == 1)


def test_statistics_win_and_restart_what_is_unknown():
    model = build(lambda x: L.ReLU()(L.BatchNormalization()(L.Conv2D(4, 3)(x))), (8, 8, 2))
    graph = prepare_graph(model)
    known, unknown = propagate(graph)
    (name,) = graph.inputs
    assert set(unknown) == {name} and name in unknown[name]
    node = graph[graph.outputs[0]]
    mean, std = clipped_normal(node.stats["mean"].astype(float), node.stats["std"].astype(float), 0, np.inf)
    np.testing.assert_allclose(known[node.name].mean, mean)
    np.testing.assert_allclose(known[node.name].std, std)
    reach = np.maximum(node.stats["mean"].astype(float) + 6 * node.stats["std"], 0)
    np.testing.assert_allclose(known[node.name].high, reach)
    assert np.all(known[node.name].low == np.maximum(0, node.stats["mean"].astype(float) - 6 * node.stats["std"]))


def test_what_is_unknown_says_why():
    known, unknown = propagate(toy_graph())
    assert not known and set(unknown) == set(toy_graph().nodes)
    assert all("'in'" in why for why in unknown.values())
    graph = prepare_graph(build(lambda x: L.Lambda(keras.ops.cumsum, output_shape=(4,))(x), (4,)))
    _, unknown = propagate(graph, {graph.inputs[0]: random_moments(4)})
    assert any("no rule" in why for why in unknown.values())


def test_embeddings_and_constants_are_known():
    table = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    nodes = [
        Node(name="ids", op="input", shape=(None, 3), dtype="int32"),
        Node(name="e", op="embedding", inputs=("ids",), shape=(None, 3, 4), weights={"table": table}),
        Node(name="c", op="const", shape=(), weights={"value": np.float32(2)}),
        Node(name="y", op="mul", inputs=("e", "c"), shape=(None, 3, 4)),
    ]
    known, unknown = propagate(Graph({n.name: n for n in nodes}, ("ids",), ("y",)))
    assert set(unknown) == {"ids"}
    np.testing.assert_allclose(known["y"].mean, 2 * table.mean(0), rtol=1e-5)
    np.testing.assert_allclose(known["y"].std, 2 * table.std(0), rtol=1e-5)


def photograph_like(samples: int, size: int, mean: float, std: float, seed: int = 0) -> np.ndarray:
    """Images with the covariance 0.9^distance along rows and columns, three quarters of it in all colours alike."""
    rng = np.random.default_rng(seed)
    at = np.arange(size)
    root = np.linalg.cholesky(0.9 ** np.abs(at[:, None] - at))
    white = rng.normal(size=(samples, size, size, 4))
    field = np.einsum("ij,njkc,lk->nilc", root, white, root)
    return (mean + std * (np.sqrt(0.75) * field[..., :1] + 0.5 * field[..., 1:])).astype(np.float32)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.1, 0.5), (120.0, 60.0)])
def test_inputs_are_estimated_from_the_first_batch_normalization(mean, std):
    x = photograph_like(200, 12, mean, std)
    image = keras.Input((12, 12, 3))
    conv, norm = L.Conv2D(16, 3, use_bias=False), L.BatchNormalization(epsilon=1e-6)
    model = keras.Model(image, L.ReLU()(norm(conv(image))))
    y = np.asarray(conv(x))
    norm.moving_mean.assign(y.mean((0, 1, 2)))
    norm.moving_variance.assign(y.var((0, 1, 2)))
    norm.gamma.assign(np.linspace(0.5, 2, 16))
    norm.beta.assign(np.linspace(-1, 1, 16))
    graph = prepare_graph(model)
    found = estimate_inputs(graph)[graph.inputs[0]]
    np.testing.assert_allclose(found.mean, mean, atol=0.1 * std)
    np.testing.assert_allclose(found.std, std, rtol=0.15)
    np.testing.assert_allclose(found.high - found.mean, 2.5 * found.std)


def test_inputs_that_are_no_images_are_left_out():
    for function, shape in [
        (lambda x: L.BatchNormalization()(L.Dense(4)(x)), (3,)),
        (lambda x: L.BatchNormalization()(L.Conv2D(4, 3)(x)), (8, 8, 1)),
        (lambda x: L.Conv2D(4, 3)(x), (8, 8, 3)),
    ]:
        assert estimate_inputs(prepare_graph(build(function, shape))) == {}


def test_nonnegative_least_squares_has_the_optimality_conditions():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.normal(size=(12, 4)), rng.normal(size=12)
        x = nonnegative_least_squares(a, b)
        slope = a.T @ (a @ x - b)
        assert np.all(x >= 0) and np.all(slope >= -1e-9) and np.all(np.abs(slope[x > 0]) < 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v1", "resnet20", "resnet56", "resnet8"])
def test_real_inputs_lie_in_the_estimated_range(name):
    graph = prepare_graph(load_model(name))
    found = estimate_inputs(graph)[graph.inputs[0]]
    data = MODELS[name].calibration(50)
    x = data if isinstance(data, np.ndarray) else np.concatenate(list(data))
    assert abs(x.mean() - found.mean[0]) < 0.35 * x.std() and 0.9 < found.std[0] / x.std() < 1.35
    assert found.low[0] <= x.min() and x.max() <= found.high[0]
    assert (found.high[0] - found.low[0]) / (x.max() - x.min()) < 1.5
