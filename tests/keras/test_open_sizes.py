"""Models that leave sizes open: taken from the data, or from `input_shape`."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np
import pytest
from keras import layers

import kquant


def convolutional() -> keras.Model:
    keras.utils.set_random_seed(0)
    image = keras.Input((None, None, 3), name="image")
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(6, 3, strides=2, padding="same")(image)))
    return keras.Model(image, {"label": layers.Dense(4)(layers.GlobalAveragePooling2D()(x)), "map": x})


def images(size: int = 8, n: int = 12) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, size, size, 3)).astype(np.float32)


def test_sizes_come_from_the_data() -> None:
    model = convolutional()
    qmodel = kquant.quantize_model(model, images(), progress=False)
    assert qmodel.input_shape == (None, 8, 8, 3)
    content = kquant.export_tflite(qmodel).content
    assert kquant.verify_tflite(qmodel, content, images()).ok
    found, expected = qmodel.predict(images(), verbose=0), model.predict(images(), verbose=0)
    for name in expected:
        assert np.abs(found[name] - expected[name]).max() < 0.05 * np.abs(expected[name]).max()
    assert model.input_shape == (None, None, None, 3)


def test_a_generator_is_read_once() -> None:
    def batches() -> Iterator[np.ndarray]:
        yield from np.split(images(), 3)

    once = kquant.quantize_model(convolutional(), batches(), progress=False)
    again = kquant.quantize_model(convolutional(), images(), {"correct_bias": False}, progress=False)
    assert np.array_equal(once(images())["map"], again(images())["map"])


@pytest.mark.parametrize("shape", [(10, 8, 3), {"image": (10, 8, 3)}])
def test_without_data_they_are_given(shape: object) -> None:
    qmodel = kquant.quantize_model(convolutional(), progress=False, input_shape=shape)
    assert qmodel.input_shape == (None, 10, 8, 3)


def test_ids_of_any_length() -> None:
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = layers.Conv1D(6, 3, padding="causal", activation="relu")(layers.Embedding(20, 5)(ids))
    model = keras.Model(ids, layers.Dense(3)(layers.GlobalMaxPooling1D()(x)))
    data = np.random.default_rng(0).integers(0, 20, (16, 7)).astype(np.int32)
    qmodel = kquant.quantize_model(model, data, progress=False)
    assert qmodel.input_shape == (None, 7)
    assert kquant.verify_tflite(qmodel, kquant.export_tflite(qmodel).content, data).ok


def test_training_takes_them_too() -> None:
    qat = kquant.prepare_qat(convolutional(), images(), progress=False)
    assert qat.input_shape == (None, 8, 8, 3)


def test_what_is_missing_or_does_not_fit_is_said() -> None:
    with pytest.raises(kquant.ModelError, match="'image'.*input_shape="):
        kquant.quantize_model(convolutional(), progress=False)
    with pytest.raises(kquant.ModelError, match="does not fit"):
        kquant.quantize_model(convolutional(), progress=False, input_shape=(8, 8, 4))
    with pytest.raises(kquant.ModelError, match="names.*picture"):
        kquant.quantize_model(convolutional(), progress=False, input_shape={"picture": (8, 8, 3)})
    with pytest.raises(kquant.CalibrationError, match=r"Batch 1.*\(None, 8, 8, 3\)"):
        kquant.quantize_model(convolutional(), [images(8), images(10)], progress=False)
