"""Sentences that no calibration set held: each has a defined result, or an error that says what is wrong."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops as K

import kquant

WORDS, LENGTH, SIZE = 30, 8, 16
RNG = np.random.default_rng(0)


def tokens(samples: int = 64) -> list[np.ndarray]:
    """Ids and a mask of zeros and ones; no sentence is empty."""
    lengths = RNG.integers(1, LENGTH + 1, samples)[:, None]
    mask = (np.arange(LENGTH)[None] < lengths).astype(np.float32)
    ids = np.where(mask > 0, RNG.integers(1, WORDS, (samples, LENGTH)), 0).astype(np.int32)
    return [ids, mask]


def encoder(length: int | None = LENGTH) -> keras.Model:
    """Embedding, attention with a mask, LayerNormalization, the mean over the places that the mask shows."""
    keras.utils.set_random_seed(0)
    ids, mask = keras.Input((length,), dtype="int32", name="ids"), keras.Input((length,), name="mask")
    x = L.Embedding(WORDS, SIZE, embeddings_initializer="normal", name="words")(ids)
    seen = K.cast(K.expand_dims(mask, 1), "bool")
    x = L.LayerNormalization(name="norm")(x + L.MultiHeadAttention(2, 8, name="attention")(x, x, attention_mask=seen))
    weights = K.expand_dims(mask, 2)
    return keras.Model([ids, mask], K.sum(x * weights, 1) / K.maximum(K.sum(weights, 1), 1e-6))


@pytest.fixture(scope="module")
def quantized() -> tuple[keras.Model, kquant.QuantizedModel, bytes]:
    model = encoder()
    qmodel = kquant.quantize_model(model, tokens(), "w8a8", progress=False)
    return model, qmodel, kquant.export_tflite(qmodel, allow_float=False).content


def error(want: np.ndarray, found: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(want - found)) / np.mean(np.square(want))))


@pytest.mark.parametrize("case", ["padding only", "mask of zeros", "one word", "one word everywhere"])
def test_odd_sentences_have_the_result_of_the_simulation(quantized, case: str) -> None:
    model, qmodel, content = quantized
    ids, mask = tokens(4)
    if case == "padding only":
        ids, mask = 0 * ids, 0 * mask
    elif case == "mask of zeros":
        mask = 0 * mask
    elif case == "one word":
        mask = np.eye(LENGTH, dtype=np.float32)[:1].repeat(4, 0)
    else:
        ids, mask = np.full_like(ids, 7), np.ones_like(mask)
    found = kquant.TFLiteModel(content).predict([ids, mask])[0]
    np.testing.assert_array_equal(found, qmodel.predict([ids, mask], verbose=0))
    want = model.predict([ids, mask], verbose=0)
    if mask.sum() == 0:  # nothing to average: Keras has zeros, and so has the file
        np.testing.assert_array_equal(want, np.zeros_like(want))
        np.testing.assert_array_equal(found, want)
    else:  # beyond what was calibrated, the file saturates
        reach = np.abs(found).max()
        assert error(np.clip(want, -reach, reach), found) < 0.1


@pytest.mark.parametrize("wrong", [-1, WORDS, 100000])
def test_ids_out_of_range_are_refused_by_name(quantized, wrong: int) -> None:
    _, _, content = quantized
    ids, mask = tokens(2)
    ids[1, 3] = wrong
    with pytest.raises(kquant.ExportError, match=rf"ids.*{wrong}"):
        kquant.TFLiteModel(content).predict([ids, mask])


def test_ids_out_of_range_in_the_calibration_data_are_refused() -> None:
    ids, mask = tokens(8)
    ids[1, 3] = WORDS
    with pytest.raises(kquant.KQuantError, match=r"'words'.*30"):
        kquant.quantize_model(encoder(), [ids, mask], "w8a8", progress=False)


def test_a_longer_sentence_than_calibrated_names_the_input_and_the_length(quantized) -> None:
    _, _, content = quantized
    ids, mask = (np.concatenate([x, x], 1) for x in tokens(2))
    with pytest.raises(kquant.ExportError, match=r"ids.*\(8,\), found \(16,\)"):
        kquant.TFLiteModel(content).predict([ids, mask])


def test_open_lengths_are_fixed_by_the_data_and_said_so() -> None:
    qmodel = kquant.quantize_model(encoder(None), tokens(), "w8a8", progress=False)
    ids, mask = (np.concatenate([x, x], 1) for x in tokens(2))
    with pytest.raises((kquant.KQuantError, ValueError), match="8"):
        qmodel.predict([ids, mask], verbose=0)


def test_rows_without_variance_are_normalized_to_beta() -> None:
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((4, SIZE))
    layer = L.LayerNormalization(name="norm")
    model = keras.Model(inputs, layer(x))
    layer.beta.assign(np.linspace(-1, 1, SIZE))
    data = RNG.normal(size=(64, 4, SIZE)).astype(np.float32)
    data[:8] = RNG.normal(size=(8, 4, 1))  # rows whose entries are all alike
    qmodel = kquant.quantize_model(model, data, "w8a8", progress=False)
    content = kquant.export_tflite(qmodel, allow_float=False).content
    flat = np.ones((2, 4, SIZE), np.float32) * np.array([0.0, 1.5], np.float32)[:, None, None]
    found = kquant.TFLiteModel(content).predict(flat)[0]
    np.testing.assert_array_equal(found, qmodel.predict(flat, verbose=0))
    assert np.abs(found - np.linspace(-1, 1, SIZE)).max() < 0.05
