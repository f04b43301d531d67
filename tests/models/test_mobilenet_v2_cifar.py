"""The depthwise network of the experiments, and its recipe."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from models import mobilenet_v2_cifar


def test_the_depthwise_network_is_small():
    model = mobilenet_v2_cifar.build()
    convolutions = [layer for layer in model.layers if hasattr(layer, "kernel_size")]
    multiplications = sum(np.prod(c.kernel.shape) * np.prod(c.output.shape[1:3]) for c in convolutions)
    strides = [c.strides[0] for c in convolutions if isinstance(c, layers.DepthwiseConv2D)]
    multiplications = float(multiplications)
    assert multiplications < 8e6 and model.count_params() < 350_000
    assert len(strides) == 9 and strides.count(2) == 3
    assert model.output.shape == (None, 10)


@pytest.mark.slow
def test_the_recipe_of_the_depthwise_network_learns(monkeypatch):
    """Four classes of plain colours."""
    labels = np.arange(256) % 4
    colours = np.eye(4, 3, dtype=np.float32)[labels][:, None, None]
    noise = np.random.default_rng(0).normal(size=(256, 32, 32, 3)).astype(np.float32)
    images = colours + 0.1 * noise
    monkeypatch.setattr(mobilenet_v2_cifar, "cifar10", lambda *_: (images, labels))
    model = mobilenet_v2_cifar.train(epochs=6, verbose=0, learning_rate=0.05)
    # on the batch's statistics: moving averages through 24 layers do not settle in 12 steps
    scores = model(images, training=True)
    assert np.mean(np.argmax(scores, -1) == labels) > 0.9
    assert not model.compiled  # so the file is without the state of the optimizer


@pytest.mark.slow
def test_the_depthwise_network_that_comes_along_is_trained():
    model = keras.saving.load_model(mobilenet_v2_cifar.PATH, compile=False)
    built = mobilenet_v2_cifar.build()
    assert [layer.name for layer in model.layers[1:]] == [layer.name for layer in built.layers[1:]]
    assert [v.shape for v in model.variables] == [v.shape for v in built.variables]
    assert mobilenet_v2_cifar.accuracy(model) == pytest.approx(86.70, abs=0.1)
