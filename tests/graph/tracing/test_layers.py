"""Layers without kernels compute what Keras computes."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from tests.support.tracing import build, ops, traced

L = keras.layers
IMAGE, LINE = (6, 8, 3), (7, 3)


@pytest.mark.parametrize(
    "layer",
    [
        L.Dropout(0.5),
        L.SpatialDropout2D(0.5),
        L.GaussianNoise(1.0),
        L.GaussianDropout(0.5),
        L.ActivityRegularization(0.1),
        L.Identity(),
    ],
)
def test_training_layers_vanish(layer: Any) -> None:
    assert ops(traced(build(lambda x: L.ReLU()(layer(x)), IMAGE))) == ["clip"]


@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_batch_normalization_is_an_affine_with_statistics(axis: int) -> None:
    model = build(L.BatchNormalization(axis=axis, name="bn"), IMAGE)
    graph = traced(model)
    around = [] if axis == -1 else ["transpose"]
    assert ops(graph) == [*around, "affine", *around]
    layer = model.get_layer("bn")
    np.testing.assert_allclose(graph["bn"].stats["mean"], layer.beta)
    np.testing.assert_allclose(graph["bn"].stats["std"], np.abs(layer.gamma))


def test_batch_normalization_statistics_are_those_of_its_output() -> None:
    """Fed data with exactly the moving statistics, the output has the mean and std that the node declares."""
    model = build(L.BatchNormalization(name="bn", epsilon=0.0), (4000, 3))
    layer = model.get_layer("bn")
    z = np.random.default_rng(0).normal(size=(4000, 3))
    z = (z - z.mean(0)) / z.std(0)
    y = np.asarray(model((z * np.sqrt(layer.moving_variance) + layer.moving_mean)[None].astype("float32")))[0]
    stats = traced(model)["bn"].stats
    np.testing.assert_allclose(y.mean(0), stats["mean"], atol=1e-4)
    np.testing.assert_allclose(y.std(0), stats["std"], rtol=1e-4)


@pytest.mark.parametrize("settings", [{"scale": False}, {"center": False}, {"scale": False, "center": False}])
def test_batch_normalization_without_gamma_or_beta(settings: dict[str, bool]) -> None:
    assert ops(traced(build(L.BatchNormalization(**settings), IMAGE))) == ["affine"]


def test_rescaling_and_normalization_are_affine() -> None:
    vector = [0.5, 1.0, 2.0]
    for layer in (
        L.Rescaling(1 / 127.5, offset=-1.0),
        L.Rescaling(vector, offset=vector),
        L.Normalization(mean=vector, variance=vector),
        L.Normalization(mean=vector, variance=vector, invert=True),
    ):
        assert ops(traced(build(layer, IMAGE))) == ["affine"]


def test_normalization_along_another_axis_uses_constants() -> None:
    layer = L.Normalization(axis=1, mean=np.arange(6.0), variance=np.arange(1.0, 7.0))
    assert ops(traced(build(layer, IMAGE))) == ["const", "mul", "const", "add"]


def test_rescaling_turns_integer_pixels_into_a_float_input() -> None:
    graph = traced(build(L.Rescaling(1 / 255.0), IMAGE, dtype="uint8"))
    assert graph[graph.inputs[0]].dtype == "float32" and ops(graph) == ["affine"]


MERGES = {
    L.Add: "add",
    L.Multiply: "mul",
    L.Maximum: "maximum",
    L.Minimum: "minimum",
}


@pytest.mark.parametrize("cls", MERGES)
def test_merges_of_many_inputs_are_chains(cls: Any) -> None:
    graph = traced(build(lambda *x: cls(name="m")(x), *[IMAGE] * 4))
    assert ops(graph) == [MERGES[cls]] * 3
    assert graph.outputs == ("m",)


def test_other_merges() -> None:
    assert ops(traced(build(lambda *x: L.Subtract()(x), IMAGE, IMAGE))) == ["sub"]
    assert ops(traced(build(lambda *x: L.Average()(x), *[IMAGE] * 3))) == ["add", "add", "affine"]
    assert ops(traced(build(lambda *x: L.Concatenate()(x), *[IMAGE] * 3))) == ["concat"]
    assert ops(traced(build(lambda *x: L.Concatenate(axis=1)(x), (2, 3), (4, 3)))) == ["concat"]


def test_merge_of_different_ranks_expands_behind_the_batch() -> None:
    assert ops(traced(build(lambda x, y: L.Add()([x, y]), IMAGE, (3,)))) == ["reshape", "add"]


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(
    "cls", [L.MaxPooling1D, L.AveragePooling1D, L.MaxPooling2D, L.AveragePooling2D], ids=lambda c: c.__name__
)
def test_pooling(cls: Any, padding: str) -> None:
    shape = LINE if cls.__name__.endswith("1D") else IMAGE
    for settings in ({}, {"strides": 1}):
        computed = ops(traced(build(cls(3, padding=padding, **settings), shape)))
        assert ("max_pool2d" if "Max" in cls.__name__ else "avg_pool2d") in computed


@pytest.mark.parametrize("keepdims", [False, True])
def test_global_pooling(keepdims: bool) -> None:
    for cls, shape, op in [
        (L.GlobalAveragePooling1D, LINE, "mean"),
        (L.GlobalAveragePooling2D, IMAGE, "mean"),
        (L.GlobalMaxPooling1D, LINE, "reduce_max"),
        (L.GlobalMaxPooling2D, IMAGE, "reduce_max"),
    ]:
        assert ops(traced(build(cls(keepdims=keepdims), shape))) == [op]


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (L.ZeroPadding1D((1, 2)), LINE, ["pad"]),
        (L.ZeroPadding2D(((1, 0), (2, 3))), IMAGE, ["pad"]),
        (L.ZeroPadding2D(0), IMAGE, []),
        (L.Cropping1D((1, 2)), LINE, ["slice"]),
        (L.Cropping2D(((1, 0), (2, 3))), IMAGE, ["slice"]),
        (L.UpSampling1D(3), LINE, ["reshape", "resize", "reshape"]),
        (L.UpSampling2D((2, 3)), IMAGE, ["resize"]),
        (L.UpSampling2D(2, interpolation="bilinear"), IMAGE, ["resize"]),
        (L.UpSampling2D(2, interpolation="bicubic"), IMAGE, ["float"]),
        (L.Resizing(9, 5), IMAGE, ["resize"]),
        (L.Resizing(9, 5, interpolation="nearest"), IMAGE, ["resize"]),
        (L.Resizing(3, 4, interpolation="nearest"), IMAGE, ["resize"]),
        (L.Resizing(9, 5, crop_to_aspect_ratio=True), IMAGE, ["float"]),
        (L.Reshape((4, -1)), IMAGE, ["reshape"]),
        (L.Flatten(), IMAGE, ["reshape"]),
        (L.Permute((3, 1, 2)), IMAGE, ["transpose"]),
        (L.RepeatVector(3), (5,), ["reshape", "concat"]),
        (L.ConvLSTM1D(4, 1), (4, *LINE), ["float"]),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, L.Layer) else "",
)
def test_shape_layers(layer: Any, shape: tuple[int, ...], expected: list[str]) -> None:
    assert ops(traced(build(layer, shape))) == expected
