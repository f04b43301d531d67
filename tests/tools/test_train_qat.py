"""The training app, from flags to files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from absl import app
from keras import layers

import kquant
from kquant_tools import quantize, train_qat
from models import digits_cnn
from tests.support.apps import run_app


def network() -> keras.Model:
    """A small convolutional net, trained for a moment."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(12, 3, 2, padding="same", activation="relu", name="stem")(inputs)
    x = layers.Conv2D(16, 3, 2, padding="same", activation="relu", name="conv")(x)
    x = layers.Dense(10, activation="softmax", name="classes")(layers.Flatten()(x))
    model, digits = keras.Model(inputs, x, name="small"), digits_cnn.load_split()
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", jit_compile=False)
    model.fit(digits.x_train, digits.y_train, 64, 4, verbose=0)
    return keras.Model(model.inputs, model.outputs, name=model.name)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The network and its data."""
    folder, digits = tmp_path_factory.mktemp("train"), digits_cnn.load_split()
    network().save(folder / "float.keras")
    np.savez(folder / "train.npz", x=digits.x_train[:320], y=digits.y_train[:320])
    np.save(folder / "unlabelled.npy", digits.x_train[:128])
    np.savez(folder / "nan.npz", x=digits.x_train[:64] * np.nan, y=digits.y_train[:64])
    np.savez(folder / "test.npz", x=digits.x_test, y=digits.y_test)
    found = SimpleNamespace(folder=folder, x=digits.x_test, y=digits.y_test)
    run_options = {"model": folder / "float.keras", "data": folder / "train.npz", "batch_size": 64, "progress": False}
    found.options = {**run_options, "epochs": 2, "calibration_samples": 100, "config": "w4a4"}
    return found


def percent(predictions: np.ndarray, labels: np.ndarray) -> str:
    return f"{100 * np.mean(predictions.argmax(-1) == labels):.2f}"


@pytest.fixture(scope="module")
def trained(files):
    """One run with everything, and what it printed."""
    folder = files.folder
    paths = {name: str(folder / name) for name in ("out.keras", "out.tflite", "best.keras", "logs")}
    outputs = {"output": paths["out.keras"], "tflite": paths["out.tflite"], "checkpoint": paths["best.keras"]}
    extras = {"validation": folder / "test.npz", "tensorboard": paths["logs"], "freeze_epoch": 1, "distill": True}
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *args, **kwargs: lines.extend(str(args[0]).splitlines() if args else []))
        assert run_app(train_qat, **files.options, **outputs, **extras) == 0
    return SimpleNamespace(lines=lines, **{k.replace(".", "_"): v for k, v in paths.items()})


@pytest.mark.slow
def test_the_table_says_what_the_files_score(files, trained):
    rows = {line[:15].strip(): line[15:].split() for line in trained.lines}
    model = keras.saving.load_model(files.folder / "float.keras")
    qmodel = keras.saving.load_model(trained.out_keras, compile=False)
    file = kquant.TFLiteModel(trained.out_tflite)
    assert rows["float"] == [percent(model.predict(files.x, verbose=0), files.y), "500"]
    assert rows["after training"] == [percent(qmodel.predict(files.x, verbose=0), files.y), "500"]
    assert rows["tflite"] == [percent(file.predict(files.x)[0], files.y), "500"]
    assert float(rows["after training"][0]) > float(rows["before training"][0])


@pytest.mark.slow
def test_the_written_model_is_the_file_and_can_train_on(files, trained):
    qmodel = keras.saving.load_model(trained.out_keras)
    assert kquant.export_tflite(qmodel).content == Path(trained.out_tflite).read_bytes()
    assert qmodel.quantization.training.gradient == "lsq"
    assert isinstance(keras.saving.load_model(trained.best_keras, compile=False), kquant.QuantizedModel)
    assert len(list(Path(trained.logs).iterdir())) == 1


@pytest.mark.slow
def test_training_goes_on_from_the_written_model(files, trained, tmp_path, capsys):
    options = {k: v for k, v in files.options.items() if k != "config"} | {"model": trained.out_keras, "epochs": 1}
    assert run_app(train_qat, **options, output=tmp_path / "more.keras", augment="flip_crop", optimizer="sgd") == 0
    before, after = (
        keras.saving.load_model(p, compile=False).get_weights() for p in (trained.out_keras, tmp_path / "more.keras")
    )
    assert any((a != b).any() for a, b in zip(before, after, strict=True))
    for flag, value in (("config", "w8a8"), ("target", "litert"), ("gradient", "lsq+")):
        assert run_app(train_qat, **options, output=tmp_path / "x.keras", **{flag: value}) == 1
        assert f"ConfigError: {trained.out_keras!r} has settings of its own for --{flag}" in capsys.readouterr().err
    assert run_app(train_qat, **options, output=tmp_path / "x.keras", distill=True) == 1
    assert "name the float model with --teacher" in capsys.readouterr().err


@pytest.mark.slow
def test_a_post_training_model_is_prepared_and_learns_without_labels(files, tmp_path):
    unlabelled = str(files.folder / "unlabelled.npy")
    start, end = tmp_path / "ptq.keras", tmp_path / "trained.keras"
    options = {"data": unlabelled, "progress": False}
    assert run_app(quantize, model=files.folder / "float.keras", config="w4a8", output=start, **options) == 0
    teacher = {"teacher": files.folder / "float.keras", "gradient": "min_max", "epochs": 1}
    assert run_app(train_qat, model=start, output=end, **options, **teacher) == 0
    model = keras.saving.load_model(end, compile=False)
    assert model.quantization.training.gradient == "min_max"
    assert model.quantization.config.weights.bits == 4


@pytest.mark.slow
def test_an_interrupted_run_goes_on_after_its_last_epoch(files, tmp_path, monkeypatch):
    epochs: list[int] = []
    original = train_qat.callbacks

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            epochs.append(epoch)
            if epochs == [0, 1]:
                raise KeyboardInterrupt

    monkeypatch.setattr(train_qat, "callbacks", lambda: [*original(), Interrupt()])
    options = {**files.options, "epochs": 3, "backup": tmp_path / "backup", "output": tmp_path / "out.keras"}
    with pytest.raises(KeyboardInterrupt):
        run_app(train_qat, **options)
    assert run_app(train_qat, **options) == 0
    assert epochs == [0, 1, 1, 2]
    model = keras.saving.load_model(tmp_path / "out.keras")
    assert int(model.optimizer.iterations.numpy()) == 15  # 3 epochs of 5 steps, no epoch twice


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nope.keras"}, "ModelError: Cannot load a model from 'nope.keras'"),
        ({"data": "nope.npz"}, "CalibrationError: There is no file or folder 'nope.npz'"),
        ({"data": "{folder}/unlabelled.npy"}, "ConfigError: '{folder}/unlabelled.npy' has no labels"),
        ({"data": "{folder}/nan.npz", "calibration_samples": 1}, "CalibrationError"),
        ({"validation": "{folder}/unlabelled.npy"}, "ConfigError: '{folder}/unlabelled.npy' has no labels"),
        ({"gradient": "lqs"}, "ConfigError: Unknown gradient 'lqs' (did you mean"),
        ({"rate": -1}, "ConfigError: rate must be a positive number"),
        ({"output": "no/folder/out.keras"}, "ExportError: Cannot write"),
        ({"output": "out.h5"}, "ExportError: Cannot write 'out.h5': its name must end in .keras"),
        ({"distill": True, "alpha": 2}, "ConfigError: alpha of a Distiller"),
    ],
)
def test_errors_are_one_message_and_exit_status_1(files, tmp_path, capsys, changes, message):
    folder = str(files.folder)
    changes = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in changes.items()}
    assert run_app(train_qat, **{**files.options, "output": tmp_path / "out.keras", **changes}) == 1
    error = capsys.readouterr().err
    assert error.startswith(message.format(folder=folder)) and len(error.splitlines()) == 1


@pytest.mark.slow
def test_nan_while_training_is_one_message(files, tmp_path, capsys):
    start = tmp_path / "ptq.keras"
    data = files.folder / "train.npz"
    assert run_app(quantize, model=files.folder / "float.keras", data=data, output=start, progress=False) == 0
    options = {"data": files.folder / "nan.npz", "output": tmp_path / "out.keras", "progress": False, "epochs": 1}
    assert run_app(train_qat, model=start, **options) == 1
    assert "ModelError: The loss became NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "out.keras").exists()


@pytest.mark.parametrize("missing", ["data", "output", "validation"])
def test_what_is_missing_on_the_command_line_is_a_usage_error(files, missing):
    options = {**files.options, "output": "out.keras"}
    options = {k: v for k, v in options.items() if k != missing}
    with pytest.raises(app.UsageError, match=f"--{missing}"):
        run_app(train_qat, **options, **({"checkpoint": "best.keras"} if missing == "validation" else {}))
