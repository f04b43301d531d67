"""Fourier transforms are products with sines and cosines, and compute what those of Keras do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import kquant
from tests.support.tracing import build, ops, traced

k, L = keras.ops, keras.layers
SOUND = (200,)

TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "of rows": lambda x: k.fft((x, k.zeros_like(x))),
    "of both axes": lambda x: k.fft2((x, x * 0.5)),
    "of real numbers": lambda x: k.rfft(x),
    "padded": lambda x: k.rfft(x, fft_length=16),
    "cut off": lambda x: k.rfft(x, fft_length=8),
}


def flat(function: Callable[[Any], Any]) -> Any:
    return L.Lambda(lambda x: k.concatenate(function(x), axis=-1))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    computed = ops(traced(build(flat(TRANSFORMS[name]), (6, 10))))
    assert "batch_matmul" in computed and "float" not in computed


@pytest.mark.parametrize("window", ["hann", "hamming", None, np.linspace(0, 1, 24)])
@pytest.mark.parametrize("center", [True, False])
def test_short_transforms(window: Any, center: bool) -> None:
    computed = ops(traced(build(flat(lambda x: k.stft(x, 24, 10, 32, window, center)), SOUND), tolerance=1e-4))
    assert "conv2d" in computed and "float" not in computed


def test_a_spectrum_in_integers() -> None:
    def spectrum(x: Any) -> Any:
        real, imaginary = k.stft(x, 24, 10, 32)
        return k.log(real * real + imaginary * imaginary + 0.1)

    model = build(L.Lambda(spectrum), SOUND)
    time = np.arange(200) / 200
    data = np.stack([np.sin(2 * np.pi * f * time) * np.exp(-time) for f in range(5, 37)]).astype(np.float32)
    qmodel = kquant.quantize_model(model, data, progress=False)
    content = kquant.export_tflite(qmodel, allow_float=False).content
    assert kquant.verify_tflite(qmodel, content, data).ok
