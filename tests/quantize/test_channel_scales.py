"""A residual stream with channels of very different reach: a scale for each, where the config allows it."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.errors import ConfigError

DATA = np.random.default_rng(0).normal(size=(64, 6, 8)).astype(np.float32)


def stream() -> keras.Model:
    """A sum that is read by dense layers; one of its channels is a thousand times as large as the smallest."""
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 8))
    reach = np.geomspace(1, 1000, 8)
    made = [layers.Dense(8, name=f"into_{k}") for k in range(2)]
    total = made[0](x) + made[1](x)
    readers = layers.Dense(4, name="out")
    model = keras.Model(x, readers(total))
    for layer in made:
        layer.kernel.assign(np.asarray(layer.kernel) * reach)
    readers.kernel.assign(np.asarray(readers.kernel) / reach[:, None])
    return model


def decibels(config: object) -> tuple[float, kquant.QuantizedModel]:
    model = stream()
    qmodel = kquant.quantize_model(model, DATA, config, progress=False)
    found = kquant.TFLiteModel(kquant.export_tflite(qmodel).content).predict(DATA)[0]
    expected = model.predict(DATA, verbose=0)
    return float(10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum())), qmodel


def test_scales_are_taken_where_they_help_and_said() -> None:
    with_scales, qmodel = decibels("w8a8")
    assert with_scales > 30 and qmodel.quantization.taken["channel scales"]


def test_a_setting_leaves_them_out() -> None:
    without, qmodel = decibels({"preset": "w8a8", "channel_scales": False, "widen": False})
    assert without < 25 and "channel scales" not in qmodel.quantization.taken
    with pytest.raises(ConfigError, match="channel_scales must be true or false"):
        kquant.QuantConfig(channel_scales="yes")
