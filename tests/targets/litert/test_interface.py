"""What a file says of its inputs and outputs, and how it takes and returns them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.targets.litert.interface import read_interface
from kquant.targets.litert.runtime import TFLiteModel
from tests.support.graphs import rng


def two_inputs(outputs: Any) -> tuple[keras.Model, dict[str, np.ndarray]]:
    """A model of a dict of inputs, and data. `outputs` nests its three tensors."""
    keras.utils.set_random_seed(1)
    b, a = keras.Input((4,), name="b"), keras.Input((4,), name="a")
    first = layers.Dense(3, name="first")(layers.Concatenate()([b, a]))
    second = layers.Dense(2, name="second")(layers.Add()([a, b]))
    nest = keras.tree.map_structure(lambda k: (first, second, b)[k], outputs)
    data = {name: rng(k).normal(size=(40, 4)).astype(np.float32) for k, name in enumerate("ab")}
    return keras.Model({"b": b, "a": a}, nest), data


def file_of(model: keras.Model, data: Any) -> tuple[TFLiteModel, kquant.QuantizedModel]:
    quantized = kquant.quantize_model(model, data, "w8a8", progress=False)
    return TFLiteModel(kquant.export_tflite(quantized).content), quantized


NESTED = {"z": 1, "deep": {"y": 0, "list": [1, 2]}}


@pytest.mark.parametrize(
    "outputs", [0, NESTED, *(pytest.param(o, marks=pytest.mark.slow) for o in ([0, 1], {"z": 0, "a": 1}, [0, 1, 0, 2]))]
)
def test_a_file_returns_the_structure_of_the_model(outputs: Any) -> None:
    model, data = two_inputs(outputs)
    file, quantized = file_of(model, data)
    expected = quantized.predict(data, verbose=0)
    keras.tree.assert_same_structure(expected, model.predict(data, verbose=0))
    found = file.predict(data)
    found = found[0] if outputs == 0 else found
    keras.tree.map_structure(np.testing.assert_array_equal, found, expected)


def test_inputs_are_taken_by_name_and_in_order() -> None:
    model, data = two_inputs([0, 1])
    file, _ = file_of(model, data)
    assert file.interface.inputs == ("a", "b")
    for given in ([data["a"], data["b"]], (data["a"], data["b"]), {"b": data["b"], "a": data["a"]}):
        keras.tree.map_structure(np.testing.assert_array_equal, file.predict(given), file.predict(data))
    assert not np.array_equal(file.predict([data["b"], data["a"]])[0], file.predict(data)[0])
    with pytest.raises(ValueError, match=r"\['a', 'b'\]"):
        file.predict({"a": data["a"]})


def test_inputs_may_be_nested() -> None:
    a, b, c = (keras.Input((4,), name=name) for name in "abc")
    y = layers.Dense(3)(layers.Concatenate()([a, b, c]))
    model = keras.Model({"x": b, "pair": [c, a]}, {"y": y})
    values = [rng(k).normal(size=(40, 4)).astype(np.float32) for k in range(3)]
    data = {"x": values[0], "pair": values[1:]}
    file, quantized = file_of(model, data)
    np.testing.assert_array_equal(file.predict(data)["y"], quantized.predict(data, verbose=0)["y"])
    by_name = dict(zip(file.interface.inputs, keras.tree.flatten(data), strict=True))
    np.testing.assert_array_equal(file.predict(by_name)["y"], file.predict(data)["y"])


def test_names_are_the_keys_or_paths_of_the_outputs() -> None:
    model, data = two_inputs(NESTED)
    file, _ = file_of(model, data)
    signature = file._interpreter.get_signature_list()["serving_default"]
    assert signature == {"inputs": ["a", "b"], "outputs": ["deep/list/0", "deep/list/1", "deep/y", "z"]}


def test_a_plain_model_adds_nothing_to_its_file() -> None:
    keras.utils.set_random_seed(0)
    x = keras.Input((4,), name="x")
    quantized = kquant.quantize_model(keras.Model(x, layers.Dense(2)(x)), np.ones((4, 4)), progress=False)
    content = kquant.export_tflite(quantized).content
    assert read_interface(content).output_structure is None and b"kquant.structure" not in content
