"""The digits: their split, their model and its recipe."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from models import digits_cnn


def test_the_split_is_fixed_and_calibrates_on_training_images_only():
    a, b = digits_cnn.load_split(), digits_cnn.load_split()
    np.testing.assert_array_equal(a.x_test, b.x_test)
    assert len(a.x_train) + len(a.x_test) == 1797
    assert np.shares_memory(a.calibration, a.x_train)


def test_the_stored_model_is_the_recipes():
    stored, built = keras.saving.load_model(digits_cnn.PATH), digits_cnn.build()
    assert [w.path for w in stored.weights] == [w.path for w in built.weights]
    assert [w.shape for w in stored.weights] == [w.shape for w in built.weights]
    assert digits_cnn.PATH.stat().st_size < 200_000
    digits = digits_cnn.load_split()
    assert np.mean(stored.predict(digits.x_test, verbose=0).argmax(-1) == digits.y_test) >= 0.98


@pytest.mark.slow
def test_the_recipe_learns():
    digits = digits_cnn.load_split()
    model = digits_cnn.train(epochs=2, verbose=0)
    assert np.mean(model.predict(digits.x_test, verbose=0).argmax(-1) == digits.y_test) > 0.8
