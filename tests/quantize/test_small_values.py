"""tanh of small numbers."""

import keras
import numpy as np
import pytest

import kquant
from tests.support.toy import config

L = keras.layers


@pytest.mark.parametrize("size, table", [(0.05, True), (2.0, False)])
def test_small_values_have_a_grid_of_their_own(size: float, table: bool) -> None:
    inputs = keras.Input((20,))
    model = keras.Model(inputs, L.Activation("tanh", name="curve")(inputs))
    x = np.random.default_rng(0).uniform(-size, size, (64, 20)).astype("float32")
    qmodel = kquant.quantize_model(model, x, config("w8a8"), progress=False)
    report = kquant.export_tflite(qmodel)
    assert ("GATHER" in report.op_counts) == table and ("TANH" in report.op_counts) != table
    expected, found = model.predict(x, verbose=0), qmodel.predict(x, verbose=0)
    # twice rounded, of 255 steps; the kernel's grid of 1 / 128 has 13 steps from -0.05 to 0.05
    assert np.abs(found - expected).max() <= 1.5 * np.abs(expected).max() / 127
    assert kquant.verify_tflite(qmodel, report.content, x).ok


def test_sixteen_bits_and_no_data_keep_the_kernel() -> None:
    inputs = keras.Input((20,))
    model = keras.Model(inputs, L.Activation("tanh")(inputs))
    x = np.random.default_rng(0).uniform(-0.05, 0.05, (64, 20)).astype("float32")
    qmodel = kquant.quantize_model(model, x, config("w8a16"), progress=False)
    assert kquant.export_tflite(qmodel).op_counts.get("TANH") == 1
