"""Differences between file and simulation: none where there are none, and a planted one is named."""

from __future__ import annotations

from functools import cache

import keras
import numpy as np
import pytest

import kquant
from kquant.diagnosis.target import compare_with_target, first_deviation
from kquant.errors import ExportError, ModelError
from kquant.keras.model import extract
from kquant.targets.litert.writer import write_tflite
from models import digits_cnn
from tests.support.faults import build, swapped_depthwise, with_node, with_scale
from tests.support.toy import toy_data

X = toy_data(12, seed=9)


@pytest.mark.parametrize("name", ["w8a8", "w4a8"])
def test_an_exported_file_is_the_simulation(name: str) -> None:
    model, qgraph = build(name)
    content, _ = write_tflite(qgraph, target=model.target)
    records = compare_with_target(model, content, X, samples=10, progress=False)
    assert [r.node for r in records] == [n.name for n in qgraph.graph]
    assert first_deviation(records) is None
    assert all((r.alone, r.propagated, r.equal) == (0, 0, 1) for r in records)
    assert records[1].op == "conv2d"


def test_weights_in_another_order_are_found_at_their_layer() -> None:
    model, qgraph = build()
    content, _ = write_tflite(swapped_depthwise(qgraph), target=model.target)
    records = compare_with_target(model, content, X, progress=False)
    assert first_deviation(records).node == "dw"  # type: ignore[union-attr]
    by_name = {r.node: r for r in records}
    assert by_name["c1"].equal > 0.99 and by_name["c1"].alone <= 1
    assert by_name["dw"].alone > 20 and by_name["dw"].propagated > 5 and by_name["dw"].equal < 0.5
    for node in ("add", "cat", "pool", "fc"):  # right in themselves, and fed what is wrong
        assert by_name[node].alone <= 1 and by_name[node].propagated > 0.5 and by_name[node].equal < 0.9


@pytest.mark.slow
def test_channels_swapped_in_a_trained_model() -> None:
    digits = digits_cnn.load_split()
    model = keras.saving.load_model(digits_cnn.PATH)
    qmodel = kquant.quantize_model(model, digits.calibration, progress=False)
    qgraph = extract(qmodel)
    wrong = with_node(qgraph, "block0_pw", lambda n: n.with_weights(kernel=n.weights["kernel"][..., ::-1]))
    for graph, expected in ((qgraph, None), (wrong, "block0_pw")):
        content, _ = write_tflite(graph, target=qmodel.target)
        found = first_deviation(compare_with_target(qmodel, content, digits.x_test, samples=8, progress=False))
        assert (found and found.node) == expected


def test_another_grid_in_the_file_counts_in_steps_of_the_simulation() -> None:
    model, qgraph = build()
    kwargs = {"activations": with_scale(dict(qgraph.activations), ["c1"], 1.5)}
    content, _ = write_tflite(type(qgraph)(qgraph.graph, weights=qgraph.weights, **kwargs), target=model.target)
    records = {r.node: r for r in compare_with_target(model, content, X, progress=False)}
    # rounding to a step 1.5 times as wide: at most 0.75 steps beside and half a step of our own; 0.375 on average, of
    # the values that are not zero, about half behind a ReLU
    assert records["c1"].alone <= 0.75 + 0.5 and 0.15 < records["c1"].propagated < 0.5


def test_memory_and_result_do_not_depend_on_batches() -> None:
    model, qgraph = build()
    content, _ = write_tflite(swapped_depthwise(qgraph), target=model.target)
    whole = compare_with_target(model, content, X, batch_size=12, progress=False)
    parts = compare_with_target(model, content, X, batch_size=5, progress=False)
    for a, b in zip(whole, parts, strict=True):
        assert (a.node, a.alone, a.equal) == (b.node, b.alone, b.equal)
        assert a.propagated == pytest.approx(b.propagated)


@cache
def other_file() -> bytes:
    inputs = keras.Input((8, 8, 3), name="elsewhere")
    other = keras.Model(inputs, keras.layers.Flatten(name="flat")(inputs))
    return kquant.export_tflite(kquant.quantize_model(other, X, progress=False)).content


def test_what_cannot_be_compared_is_refused() -> None:
    model, _ = build()
    with pytest.raises(ExportError, match="no tensor named as a layer"):
        compare_with_target(model, other_file(), X, progress=False)
    with pytest.raises(ExportError):
        compare_with_target(model, b"no file", X, progress=False)
    with pytest.raises(ModelError, match="not a quantized model"):
        compare_with_target(keras.Sequential([keras.Input((2,))]), other_file(), np.zeros((1, 2)), progress=False)
