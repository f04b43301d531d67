"""Tables in files with float activations: integers with a scale for every row, looked up by EMBEDDING_LOOKUP."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.targets.litert.flatbuffer import summary

ROWS, DEPTH, TOKENS = 64, 16, 5
IDS = np.random.default_rng(0).integers(0, ROWS, (7, TOKENS)).astype(np.int32)


def model() -> keras.Model:
    """Two tables and a layer; rows of the first differ a hundredfold in size."""
    keras.utils.set_random_seed(0)
    ids = keras.Input((TOKENS,), dtype="int32")
    words = layers.Embedding(ROWS, DEPTH, name="words")
    x = words(ids) + layers.Embedding(TOKENS, DEPTH, name="places")(keras.ops.arange(TOKENS))
    made = keras.Model(ids, layers.Dense(8, name="head")(x))
    words.embeddings.assign(np.asarray(words.embeddings) * np.geomspace(1, 100, ROWS)[:, None])
    return made


@pytest.mark.parametrize("mode", ["dynamic_range", "weight_only"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rows_are_stored_in_few_bits(bits: int, mode: str) -> None:
    """The file is the simulation: both read the same integers; the float kernel of "head" may quantize its input."""
    qmodel = kquant.quantize_model(model(), config={"preset": f"w{bits}", "adaround": False}, progress=False)
    content = kquant.export_tflite(qmodel, mode=mode).content
    made = summary(content)
    assert made.op_counts["EMBEDDING_LOOKUP"] == 1 and "GATHER" not in made.op_counts
    assert f"INT{bits}" in made.constant_bytes and made.constant_bytes[f"INT{bits}"] >= ROWS * DEPTH * bits // 8
    found, want = kquant.TFLiteModel(content).predict(IDS)[0], qmodel.predict(IDS, verbose=0)
    tolerance = 0.02 if mode == "dynamic_range" else 1e-5
    assert np.abs(found - want).max() <= tolerance * np.abs(want).max()


def test_every_row_has_its_own_scale() -> None:
    """What a row loses is small beside its own values, though others are a hundred times as large."""
    qmodel = kquant.quantize_model(model(), config="w8", progress=False)
    layer = qmodel.quantized_layers["words"]
    table = np.asarray(layer.float_weights()["table"])
    stored = np.asarray(layer.fake_quantized(layer.float_weights()["table"]))
    largest = np.abs(table).max(axis=1)
    assert np.all(np.abs(stored - table).max(axis=1) <= 0.03 * largest)
    whole = kquant.quantize_model(model(), config="w8-per_tensor", progress=False).quantized_layers["words"]
    assert np.asarray(whole.weight_scale()).shape == () and np.asarray(layer.weight_scale()).shape == (ROWS,)


def test_a_batch_of_any_size_is_looked_up() -> None:
    qmodel = kquant.quantize_model(model(), config="w4", progress=False)
    file = kquant.TFLiteModel(kquant.export_tflite(qmodel, mode="weight_only").content)
    whole = file.predict(IDS)[0]
    np.testing.assert_array_equal(whole[:3], file.predict(IDS[:3])[0])
    np.testing.assert_array_equal(whole[2:3], file.predict(IDS[2:3])[0])


def test_tables_on_the_grid_of_their_output_stay_what_they_were() -> None:
    qmodel = kquant.quantize_model(model(), IDS, progress=False)
    content = kquant.export_tflite(qmodel).content
    assert "GATHER" in summary(content).op_counts and kquant.verify_tflite(qmodel, content, IDS).ok
