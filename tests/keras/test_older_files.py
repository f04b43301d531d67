"""Quantized models that version 0.1.0 saved load, and export what they exported then (byte for byte)."""

from pathlib import Path

import keras
import numpy as np
import pytest

import kquant

FILES = Path(__file__).parent / "files"


@pytest.mark.parametrize("name", ["quantized", "trained_fold", "trained_keep"])
def test_a_model_of_version_0_1_0_loads_and_exports_the_same_file(name):
    model = keras.saving.load_model(FILES / f"{name}_0.1.0.keras")
    content = kquant.export_tflite(model).content
    assert content == (FILES / f"{name}_0.1.0.tflite").read_bytes()
    assert "conv" in model.report and (model.quantization.training is None) == (name == "quantized")
    x = np.random.default_rng(1).normal(size=(8, 6, 6, 3)).astype(np.float32)
    assert kquant.verify_tflite(model, content, x).ok
