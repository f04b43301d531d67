"""Random models through quantize -> export -> interpreter, with parity (a failure names the seed)."""

import numpy as np
import pytest

import kquant
from tests.support.random_models import random_data, random_model

CONFIGS = ("w8a8", "w8a8", "w4a8", "w8a8-per_tensor", "w8a16", "w4a4")


def check(seed: int) -> None:
    """Quantize the model of a seed and hold its file to the parity contract."""
    model, config = random_model(seed), CONFIGS[seed % len(CONFIGS)]
    data = random_data(seed, model)
    before = [w.numpy().copy() for w in model.weights]
    qmodel = kquant.quantize_model(model, data, config, progress=False)
    content = kquant.export_tflite(qmodel).content
    report = kquant.verify_tflite(qmodel, content, random_data(seed + 1, model), tensor_samples=4)
    where = f"seed {seed}, {config}, layers {[layer.name for layer in model.layers]}\n{report}"
    assert not report.structure, where
    assert report.float_error < 1e-4, where
    assert report.reference_max_lsb == 0, where
    assert report.op_by_op_max_lsb <= 1, where
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(before, model.weights, strict=True)), where


@pytest.mark.parametrize("seed", range(30))
def test_parity_of_random_models(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(30, 70, 20))
def test_parity_of_40_more_random_models(start):
    for seed in range(start, start + 20):
        check(seed)
