"""Callbacks: frozen grids stay to the bit while weights go on; the log holds the grids."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kquant
from kquant.keras.model import extract
from kquant.qat.callbacks import FreezeQuantizers, LogQuantizers, quantizers_of
from kquant.qat.distill import Distiller
from kquant.qat.prepare import prepare_qat

X = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, 32)
LABELS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Record(keras.callbacks.Callback):
    """Grids and weights after every step; the last of the callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.grids: list[np.ndarray] = []
        self.kernels: list[np.ndarray] = []

    def on_train_batch_end(self, batch, logs=None):
        quantizers = quantizers_of(self.model).values()
        learned = [np.ravel(v.numpy()) for q in quantizers for v in q.learned.values()]
        self.grids.append(np.concatenate(learned))
        student = getattr(self.model, "student", self.model)
        self.kernels.append(student.get_layer("hidden").variables_by_name["kernel"].numpy())


def network() -> keras.Model:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,), name="x")
    x = layers.Dense(5, activation="relu", name="hidden")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="scores")(x), name="network")


def prepared() -> kquant.QuantizedModel:
    return prepare_qat(network(), X, "w4a8", progress=False)


def trained(model: keras.Model, *callbacks: keras.callbacks.Callback, optimizer: object = None, epochs: int = 2):
    """Four steps an epoch."""
    record = Record()
    optimizer = optimizer or keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer, LABELS, jit_compile=False)
    model.fit(X, Y, batch_size=8, epochs=epochs, verbose=0, callbacks=[*callbacks, record])
    return record


def moves(values: list[np.ndarray]) -> list[bool]:
    """Whether each step but the first changed anything."""
    return [bool((a != b).any()) for a, b in zip(values[:-1], values[1:], strict=True)]


@pytest.mark.parametrize(
    ("at", "optimizer"),
    [
        ({"at_step": 4}, keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True)),
        pytest.param({"at_epoch": 1}, keras.optimizers.AdamW(0.01, weight_decay=0.1), marks=pytest.mark.slow),
        pytest.param(
            {"at_step": 2}, keras.optimizers.Adam(0.01, gradient_accumulation_steps=2), marks=pytest.mark.slow
        ),
    ],
)
def test_frozen_grids_stay_while_weights_go_on(at, optimizer):
    """Momentum, weight decay and accumulated gradients leave them alone, too."""
    record = trained(prepared(), FreezeQuantizers(**at), optimizer=optimizer)
    moved = moves(record.grids)
    assert any(moved[:3]) and not any(moved[3:])
    assert any(moves(record.kernels)[4:])


@pytest.mark.slow
def test_a_step_within_an_epoch_and_the_steps_before_it_are_as_without():
    free, frozen = trained(prepared(), epochs=1), trained(prepared(), FreezeQuantizers(at_step=2), epochs=1)
    assert moves(free.grids) == [True, True, True] and moves(frozen.grids) == [True, False, False]
    for k in (0, 1):
        np.testing.assert_array_equal(free.grids[k], frozen.grids[k])


@pytest.mark.slow
def test_a_run_that_goes_on_after_the_step_starts_frozen(tmp_path):
    model = prepared()
    trained(model, FreezeQuantizers(at_step=3), epochs=1)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert all(v.trainable for q in quantizers_of(loaded).values() for v in q.learned.values())
    for m in (model, loaded):
        record = Record()
        m.fit(X, Y, batch_size=8, shuffle=False, verbose=0, callbacks=[FreezeQuantizers(at_step=3), record])
        assert not any(moves(record.grids))
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_student_of_a_distiller_is_frozen():
    record = trained(Distiller(prepared(), network()), FreezeQuantizers(at_epoch=1))
    assert any(moves(record.grids)[:3]) and not any(moves(record.grids)[3:])


def test_the_log_holds_grids_and_losses(tmp_path):
    model = prepared()
    trained(model, LogQuantizers(tmp_path), epochs=2)
    (file,) = tmp_path.iterdir()
    events = {}
    for record in tf.data.TFRecordDataset(str(file)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == "scalars"
            events[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    assert {step for _, step in events} == {0, 1}
    assert events["epoch_loss", 0] > 0
    for name, quantizer in quantizers_of(model).items():
        grid = quantizer.to_grid()
        assert events[f"scale/{name}", 1] == pytest.approx(np.exp(np.mean(np.log(grid.scale))), rel=1e-6)
    qgraph = extract(model)
    integers = qgraph.integers["hidden"]
    assert events["entropy/hidden/weights", 1] == pytest.approx(qgraph.weights["hidden"].entropy(integers), rel=1e-6)
    assert events["zeros/hidden/weights", 1] == pytest.approx(np.mean(integers == 0), rel=1e-6)
    assert events["scale/hidden/weights", 0] != events["scale/hidden/weights", 1]
    zero_point = int(quantizers_of(model)["hidden"].to_grid().zero_point)
    assert events["zero_point/hidden", 1] == zero_point


@pytest.mark.parametrize("arguments", [{}, {"at_step": 1, "at_epoch": 1}, {"at_step": -1}, {"at_epoch": 1.5}])
def test_when_must_be_said_once(arguments):
    with pytest.raises(kquant.ConfigError, match="at_step or at_epoch"):
        FreezeQuantizers(**arguments)


@pytest.mark.parametrize("callback", [FreezeQuantizers(at_step=1), LogQuantizers("unused")])
def test_a_float_model_has_no_quantizers(callback):
    with pytest.raises(kquant.ModelError, match="'network' has no quantizers"):
        trained(network(), callback)
