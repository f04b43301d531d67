"""Average poolings as means of windows."""

import keras
import pytest

from kquant.graph.transforms import prepare_graph
from kquant.graph.transforms.average_windows import average_windows
from tests.support.tracing import assert_equal, ops

L = keras.layers
POOLINGS = {
    "whole windows": (lambda: L.AveragePooling2D(2), ["window_mean"]),
    "same, whole windows": (lambda: L.AveragePooling2D(2, padding="same"), ["window_mean"]),
    "padding": (lambda: L.AveragePooling2D(3, 1, padding="same"), ["window_mean", "const", "mul"]),
    "padding behind": (lambda: L.AveragePooling2D((3, 2), (2, 3), padding="same"), ["window_mean", "const", "mul"]),
    "overlap": (lambda: L.AveragePooling2D((3, 2), (1, 2)), ["window_mean"]),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_the_function_stays(name: str) -> None:
    build, expected = POOLINGS[name]
    image = keras.Input((6, 8, 3))
    model = keras.Model(image, build()(image))
    graph = average_windows(prepare_graph(model))
    assert ops(graph) == expected
    assert_equal(graph, model)


def test_the_output_keeps_its_name() -> None:
    image = keras.Input((6, 8, 3))
    graph = prepare_graph(keras.Model(image, L.AveragePooling2D(3, padding="same")(image)))
    assert average_windows(graph).outputs == graph.outputs
