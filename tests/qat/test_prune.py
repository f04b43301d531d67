"""Gradual pruning: the schedule, zeros that stay, and the file that has them."""

import keras
import numpy as np
import pytest
from keras import layers

import kquant
from kquant.errors import ConfigError, ModelError
from kquant.keras.model import extract

X = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 4, 64)
LABELS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def prepared(keep_zeros: bool = True, **training: object) -> kquant.QuantizedModel:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, activation="relu", name="conv")(inputs)
    x = layers.DepthwiseConv2D(3, activation="relu", name="depthwise")(x)
    x = layers.Dense(4, name="head")(layers.GlobalAveragePooling2D()(x))
    config = {"preset": "w4a8", "keep_zeros": keep_zeros, "adaround": False}
    settings = kquant.Training(**training)
    return kquant.prepare_qat(keras.Model(inputs, x), X, config, training=settings, progress=False)


class Watch(keras.callbacks.Callback):
    """The zeros of each kernel after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros: list[np.ndarray] = []

    def on_train_batch_end(self, batch, logs=None):
        layer = self.model.quantized_layers["conv"]
        self.zeros.append(np.asarray(layer.trained_weights()["kernel"]) == 0)


def fit(model: keras.Model, *callbacks: keras.callbacks.Callback, epochs: int = 3) -> None:
    model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.01), LABELS)
    model.fit(X, Y, batch_size=16, epochs=epochs, callbacks=list(callbacks), verbose=0)


@pytest.mark.parametrize("relative", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_zeros_follow_the_schedule_and_stay(relative: bool, tmp_path) -> None:
    model, watch = prepared(relative_weights=relative), Watch()
    prune = kquant.PruneGradually(0.75, end_step=9, begin_step=1, every=2, keep="depthwise")
    fit(model, prune, watch)
    size = watch.zeros[0].size
    shares = [np.count_nonzero(z) / size for z in watch.zeros]
    assert shares[0] == 0 and shares[1] == 0  # t = 0 at step 1
    for step, share in enumerate(shares):
        if step >= 1 and (step - 1) % 2 == 0:
            assert share == pytest.approx(prune.share(step), abs=0.51 / size)
    for before, after in zip(watch.zeros, watch.zeros[1:], strict=False):
        assert (after | ~before).all()
    assert shares[-1] == pytest.approx(0.75, abs=0.51 / size)
    integers = extract(model).integers
    for name in ("conv", "head"):
        assert np.mean(integers[name] == 0) >= 0.74
    assert np.mean(integers["depthwise"] == 0) < 0.5
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    fit(loaded)
    assert np.mean(extract(loaded).integers["conv"] == 0) >= 0.74


def test_the_smallest_weights_go_and_named_layers_stay() -> None:
    model = prepared(relative_weights=True)
    before = np.abs(np.asarray(model.quantized_layers["conv"].trained_weights()["kernel"]))
    prune = kquant.PruneGradually(0.5, end_step=1, keep="head")
    prune.set_model(model)
    prune._prune(0.5)
    gone = np.asarray(model.quantized_layers["conv"].trained_weights()["kernel"]) == 0
    assert before[gone].max() <= before[~gone].min() and gone.mean() == 0.5
    assert not (np.asarray(model.quantized_layers["head"].trained_weights()["kernel"]) == 0).any()


def test_the_schedule_is_cubic() -> None:
    prune = kquant.PruneGradually(0.8, end_step=110, begin_step=10)
    assert prune.share(10) == 0 and prune.share(110) == pytest.approx(0.8) == prune.share(500)
    assert prune.share(60) == pytest.approx(0.8 * (1 - 0.125))


@pytest.mark.slow
def test_a_distilled_student_is_pruned() -> None:
    student = prepared()
    teacher = keras.Sequential([keras.Input((8, 8, 3)), layers.GlobalAveragePooling2D(), layers.Dense(4)])
    fit(kquant.Distiller(student, teacher), kquant.PruneGradually(0.5, end_step=4), epochs=2)
    assert np.mean(extract(student).integers["conv"] == 0) >= 0.49


def test_what_is_impossible_is_refused() -> None:
    with pytest.raises(ModelError, match="keep_zeros=True"):
        fit(prepared(keep_zeros=False), kquant.PruneGradually(0.5, end_step=2))
    with pytest.raises(ModelError, match="no quantizers"):
        fit(keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(4)]),
            kquant.PruneGradually(0.5, end_step=2))  # fmt: skip
    for values in (
        {"sparsity": 1.0, "end_step": 5},
        {"sparsity": 0.5, "end_step": 5, "begin_step": 5},
        {"sparsity": 0.5, "end_step": 5, "every": 0},
        {"sparsity": 0.5, "end_step": 5, "keep": "("},
    ):
        with pytest.raises(ConfigError):
            kquant.PruneGradually(**values)
