"""Quantized models that version 0.1.0 saved load, and export what they exported then, tensor by tensor."""

from pathlib import Path

import keras
import numpy as np
import pytest

import kquant
from kquant.targets.litert.flatbuffer import read_tensors, summary

FILES = Path(__file__).parent / "files"


@pytest.mark.parametrize("name", ["quantized", "trained_fold", "trained_keep"])
def test_a_model_of_version_0_1_0_loads_and_exports_the_same_tensors(name):
    model = keras.saving.load_model(FILES / f"{name}_0.1.0.keras")
    content, before = kquant.export_tflite(model).content, (FILES / f"{name}_0.1.0.tflite").read_bytes()
    assert len(content) < len(before)  # equal scales and zero points are held once by now
    now, then = read_tensors(content), read_tensors(before)
    assert list(now) == list(then)
    for tensor, old in then.items():
        found = now[tensor]
        assert (found.dtype, tuple(found.shape), found.axis) == (old.dtype, tuple(old.shape), old.axis)
        assert np.array_equal(found.scale, old.scale) and np.array_equal(found.zero_point, old.zero_point)
        assert (found.data is None) == (old.data is None)
        assert old.data is None or np.array_equal(found.data, old.data)
    assert summary(content).op_counts == summary(before).op_counts
    assert "conv" in model.report and (model.quantization.training is None) == (name == "quantized")
    x = np.random.default_rng(1).normal(size=(8, 6, 6, 3)).astype(np.float32)
    assert kquant.verify_tflite(model, content, x).ok
