"""Recurrent classifiers keep their accuracy in integers."""

from __future__ import annotations

import numpy as np
import pytest

import kquant
from models.digits_cnn import load_split
from models.digits_rows import KINDS, rows, train


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_as_accurate(kind: str) -> None:
    digits, model = load_split(), train(kind, verbose=0)
    qmodel = kquant.quantize_model(model, rows(digits.calibration), "w8a8", progress=False)
    runner = kquant.TFLiteModel(kquant.export_tflite(qmodel, allow_float=False).content)
    x = rows(digits.x_test)
    exact, quantized = (
        100 * np.mean(np.argmax(y, -1) == digits.y_test) for y in (model.predict(x, verbose=0), runner.predict(x)[0])
    )
    assert exact > 95
    assert quantized >= exact - 0.5
