"""Folding keeps the function and leaves no affine where mathematics allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from kquant.graph.ir import Graph
from kquant.graph.ops import evaluate
from kquant.graph.tracing.trace import trace_model
from kquant.graph.transforms.fold_batch_norm import fold_batch_norm
from kquant.graph.transforms.simplify import simplify
from tests.support.tracing import assert_equal, build, ops

L = keras.layers
IMAGE, LINE = (8, 8, 4), (9, 4)


def norm() -> Any:
    return L.BatchNormalization()


def folded(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Graph:
    """The folded graph of a model with random batch norm statistics, having checked its function."""
    model = build(function, *shapes)
    graph = fold_batch_norm(simplify(trace_model(model)))
    assert_equal(graph, model, 3e-5)
    return graph


def chain(*layers: Any) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        for layer in layers:
            x = layer(x)
        return x

    return function


def affines(graph: Graph) -> int:
    return ops(graph).count("affine")


LINEAR_LAYERS = [
    lambda: L.Conv2D(6, 3),
    lambda: L.Conv2D(6, 3, use_bias=False, padding="same", strides=2),
    lambda: L.Conv2D(6, 3, groups=2),
    lambda: L.DepthwiseConv2D(3, depth_multiplier=2),
    lambda: L.SeparableConv2D(5, 3),
    lambda: L.Conv2DTranspose(5, 3, strides=2),
    lambda: L.Dense(5),
    lambda: norm(),
]


@pytest.mark.parametrize("make", LINEAR_LAYERS)
def test_behind_a_linear_operation(make: Callable[[], Any]) -> None:
    graph = folded(chain(L.ReLU(), make(), norm(), L.ReLU()), IMAGE)
    assert affines(graph) == (1 if isinstance(make(), L.BatchNormalization) else 0)


def test_statistics_move_to_the_linear_operation() -> None:
    model = build(chain(L.Conv2D(6, 3, name="c"), L.BatchNormalization(name="bn")), IMAGE)
    graph = fold_batch_norm(trace_model(model))
    layer = model.get_layer("bn")
    assert list(graph.nodes)[1:] == ["c"] and graph.outputs == ("c",)
    np.testing.assert_allclose(graph["c"].stats["mean"], layer.beta, rtol=1e-6)
    np.testing.assert_allclose(graph["c"].stats["std"], np.abs(layer.gamma), rtol=1e-6)


def test_statistics_follow_a_second_affine() -> None:
    model = build(chain(L.Dense(6, name="c"), L.BatchNormalization(name="bn"), lambda y: 1.0 - 3.0 * y), (4,))
    graph = fold_batch_norm(trace_model(model))
    layer = model.get_layer("bn")
    np.testing.assert_allclose(graph["c"].stats["mean"], 1 - 3 * np.array(layer.beta), rtol=1e-5)
    np.testing.assert_allclose(graph["c"].stats["std"], 3 * np.abs(layer.gamma), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (lambda: L.Conv2D(6, 3), 0),
        (lambda: L.Conv2D(6, 3, groups=2), 0),
        (lambda: L.Conv2D(6, 3, padding="same"), 1),
        (lambda: L.Conv2D(6, 1, padding="same", strides=2), 0),
        (lambda: L.Conv2D(6, 2, padding="same", strides=2), 0),
        (lambda: L.DepthwiseConv2D(3, depth_multiplier=2), 0),
        (lambda: L.DepthwiseConv2D(3, padding="same"), 1),
        (lambda: L.Conv2DTranspose(5, 3), 1),
        (lambda: L.Dense(5), 0),
        (lambda: L.Activation("tanh"), 1),
    ],
)
def test_in_front_of_a_linear_operation(make: Callable[[], Any], left: int) -> None:
    assert affines(folded(chain(L.ReLU(), norm(), make()), IMAGE)) == left


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("cls", [L.Conv2D, L.Conv2DTranspose])
def test_without_offset_padding_does_not_matter(cls: Any, padding: str) -> None:
    scale = np.array([0.5, -2.0, 3.0, 1.0], np.float32)
    assert affines(folded(chain(L.ReLU(), lambda x: x * scale, cls(5, 3, padding=padding)), IMAGE)) == 0


def test_for_all_readers_or_none() -> None:
    def two(second: Any) -> Callable[[Any], Any]:
        def function(x: Any) -> Any:
            y = norm()(L.ReLU()(x))
            return L.Conv2D(3, 3)(y), second(y)

        return function

    assert affines(folded(two(L.Conv2D(2, 1)), IMAGE)) == 0
    assert affines(folded(two(L.Activation("tanh")), IMAGE)) == 1


def test_not_where_the_unscaled_value_is_needed() -> None:
    def function(x: Any) -> Any:
        y = L.Conv2D(4, 3)(x)
        return L.ReLU()(norm()(y)), L.Activation("tanh")(y)

    assert affines(folded(function, IMAGE)) == 1
    conv = L.Conv2D(4, 3)
    assert affines(folded(lambda x: (norm()(conv(x)), conv(x)), IMAGE)) == 0  # two calls are two operations


@pytest.mark.parametrize(
    "middle",
    [
        lambda: L.AveragePooling2D(2, padding="same"),
        lambda: L.GlobalAveragePooling2D(),
        lambda: L.UpSampling2D(2, interpolation="bilinear"),
        lambda: L.Reshape((16, 4, -1)),
        lambda: L.Permute((2, 1, 3)),
        lambda: L.Cropping2D(1),
        lambda: L.Dropout(0.5),
    ],
)
def test_through_commuting_operations(middle: Callable[[], Any]) -> None:
    assert affines(folded(chain(L.Conv2D(6, 1), middle(), norm(), L.ReLU()), IMAGE)) == 0
    assert affines(folded(chain(L.ReLU(), norm(), middle(), L.Dense(3)), IMAGE)) == 0


def test_through_flatten_in_front_and_reshape_behind() -> None:
    assert affines(folded(chain(L.ReLU(), norm(), L.Flatten(), L.Dense(3)), IMAGE)) == 0
    assert affines(folded(chain(L.Dense(4 * 4 * 3), L.Reshape((4, 4, 3)), norm(), L.ReLU()), (5,))) == 0


def test_maximum_commutes_with_positive_scales_only() -> None:
    for sign, left in ((1.0, 0), (-1.0, 1)):
        function = chain(L.Conv2D(4, 3), L.MaxPooling2D(2), lambda x, s=sign: x * (s * 0.5) + 1.0, L.ReLU())
        assert affines(folded(function, IMAGE)) == left


def test_into_the_branches_of_a_concatenation() -> None:
    for axis in (-1, 1):
        graph = folded(
            lambda x, a=axis: L.ReLU()(norm()(L.Concatenate(axis=a)([L.Conv2D(4, 3)(x), L.Conv2D(4, 3)(x)]))), IMAGE
        )
        assert affines(graph) == 0
    graph = folded(lambda x: L.ReLU()(norm()(L.Concatenate()([L.Conv2D(4, 1)(x), x]))), IMAGE)
    assert affines(graph) == 1


def test_into_both_sides_of_an_addition() -> None:
    for merge in (L.Add(), L.Subtract()):
        graph = folded(lambda x, m=merge: L.ReLU()(norm()(m([L.Conv2D(4, 1)(x), L.Conv2D(4, 1)(x)]))), IMAGE)
        assert affines(graph) == 0
    assert affines(folded(lambda x: L.ReLU()(norm()(x + L.Conv2D(4, 1)(x))), IMAGE)) == 1
    rows = np.random.default_rng(0).normal(size=(8, 1, 1)).astype("float32")
    assert affines(folded(lambda x: norm()(L.Conv2D(4, 1)(x) + rows), IMAGE)) == 0


def test_channels_that_appear_by_broadcasting_are_left() -> None:
    vector = np.random.default_rng(0).normal(size=(1, 8, 4)).astype("float32")
    assert affines(folded(lambda x: L.ReLU()(norm()(L.Conv2D(1, 1)(x) + vector)), IMAGE)) == 1


def test_one_dimensional_convolutions() -> None:
    graph = folded(chain(L.Conv1D(4, 3), norm(), L.ReLU(), L.Conv1D(4, 3), norm(), L.ReLU()), LINE)
    assert ops(graph) == ["reshape", "conv2d", "clip", "conv2d", "clip", "reshape"]


def test_pixel_scaling_disappears_in_a_valid_convolution() -> None:
    assert ops(folded(chain(L.Rescaling(1 / 127.5, -1.0), L.Conv2D(3, 3)), IMAGE)) == ["conv2d"]


def test_normalization_between_activation_and_padding_stays() -> None:
    assert affines(folded(chain(L.ReLU(), norm(), L.ZeroPadding2D(1), L.Conv2D(3, 3)), IMAGE)) == 1


def test_dead_channel() -> None:
    model = build(chain(L.Conv2D(4, 3), L.BatchNormalization(name="bn"), L.ReLU()), IMAGE)
    layer = model.get_layer("bn")
    layer.gamma.assign(np.array([0.0, 1.0, -1.0, 0.0]))
    layer.moving_variance.assign(np.array([0.0, 1.0, 1e-12, 1.0]))
    graph = fold_batch_norm(trace_model(model))
    assert ops(graph) == ["conv2d", "clip"]
    assert_equal(graph, model)


def test_stays_the_same_graph_when_nothing_folds() -> None:
    graph = trace_model(build(chain(norm(), L.ReLU()), IMAGE))
    x = np.ones((1, *IMAGE), "float32")
    assert list(fold_batch_norm(graph).nodes) == list(graph.nodes)
    np.testing.assert_array_equal(evaluate(fold_batch_norm(graph), [x])[0], evaluate(graph, [x])[0])
