"""The apps, from flags to files."""

from __future__ import annotations

import configparser
import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from absl import app

import kquant
from kquant.targets.litert.flatbuffer import read_tensors
from kquant_tools import evaluate, export, pack, quantize, verify
from models import digits_cnn
from tests.support.apps import ROOT, checkout_environment, run_app


def halve(x):
    return x / 2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The digits model quantized and exported by the apps, and its data."""
    folder = tmp_path_factory.mktemp("tools")
    digits = digits_cnn.load_split()
    x, y = digits.x_test[:100], digits.y_test[:100]
    paths = {name: str(folder / name) for name in ("cal.npy", "test.npz", "q.keras", "direct.tflite", "q.tflite")}
    np.save(paths["cal.npy"], digits.calibration)
    np.savez(paths["test.npz"], x=x, y=y)
    options = {"model": digits_cnn.PATH, "data": paths["cal.npy"], "output": paths["q.keras"], "progress": False}
    assert run_app(quantize, **options, tflite=paths["direct.tflite"]) == 0
    assert run_app(export, model=paths["q.keras"], output=paths["q.tflite"], allow_float=False) == 0
    return SimpleNamespace(x=x, y=y, folder=folder, **{name.replace(".", "_"): path for name, path in paths.items()})


def test_the_files_are_those_of_the_library(files):
    model = keras.saving.load_model(digits_cnn.PATH)
    qmodel = kquant.quantize_model(model, digits_cnn.load_split().calibration, progress=False)
    content = kquant.export_tflite(qmodel).content
    assert Path(files.direct_tflite).read_bytes() == content
    assert Path(files.q_tflite).read_bytes() == content


@pytest.mark.slow
def test_evaluate_prints_what_the_models_score(files, capsys):
    options = {"model": digits_cnn.PATH, "quantized": files.q_keras, "tflite": files.q_tflite, "data": files.test_npz}
    assert run_app(evaluate, **options, batch_size=50) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    model = keras.saving.load_model(digits_cnn.PATH)
    expected = {
        "float": model.predict(files.x, verbose=0),
        "simulation": keras.saving.load_model(files.q_keras).predict(files.x, verbose=0),
        "tflite": kquant.TFLiteModel(files.q_tflite).predict(files.x)[0],
    }
    for name, scores in expected.items():
        assert rows[name][1] == f"{100 * np.mean(scores.argmax(-1) == files.y):.2f}"
        assert rows[name][2] == "100"


def scarcity(model):
    """A metric that is a function of a model."""
    return -float(np.mean(np.abs(model.predict(digits_cnn.load_split().x_test[:20], verbose=0))))


@pytest.mark.parametrize(
    "metric, name",
    [("kl", "-KL"), ("pixel_accuracy:10", "pixel accuracy (%)"), ("tests.tools.test_apps:scarcity", "scarcity")],
)
def test_evaluate_measures_any_metric(files, capsys, metric, name):
    options = {"model": digits_cnn.PATH, "quantized": files.q_keras, "tflite": files.q_tflite, "data": files.test_npz}
    assert run_app(evaluate, **options, metric=metric) == 0
    header, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert name in header and [line.split()[0] for line in lines] == ["float", "simulation", "tflite"]
    scores = [float(line.split()[1]) for line in lines]
    if metric == "kl":
        assert scores[0] == 0 > scores[1] > -0.1
    if metric.startswith("pixel"):
        model = keras.saving.load_model(digits_cnn.PATH)
        expected = 100 * np.mean(model.predict(files.x, verbose=0).argmax(-1) == files.y)
        assert scores[0] == pytest.approx(expected, abs=0.005)
    assert scores[2] == pytest.approx(scores[0], rel=0.05, abs=0.1)


@pytest.mark.slow
def test_verify_accepts_its_own_file_and_rejects_another(files, capsys):
    options = {"model": files.q_keras, "data": files.test_npz, "limit": 40}
    assert run_app(verify, tflite=files.q_tflite, **options) == 0
    assert "parity holds" in capsys.readouterr().out
    other = str(files.folder / "other.tflite")
    shifted = {"model": digits_cnn.PATH, "data": files.test_npz, "preprocess": f"{__name__}:halve", "progress": False}
    assert run_app(quantize, tflite=other, **shifted) == 0
    capsys.readouterr()
    assert run_app(verify, tflite=other, **options) == 1
    assert "FAILS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (quantize, {"model": "nope.keras"}, "ModelError: Cannot load a model from 'nope.keras'"),
        (quantize, {"config": "w8a9a"}, "ConfigError: Unknown preset 'w8a9a'"),
        (quantize, {"target": "nowhere"}, "ConfigError: Unknown target 'nowhere'"),
        (quantize, {"data": "nope.npz"}, "CalibrationError: There is no file or folder 'nope.npz'"),
        (quantize, {"output": "no/folder/q.keras"}, "ExportError: Cannot write"),
        (quantize, {"output": "q.h5"}, "ExportError: Cannot write 'q.h5': its name must end in .keras"),
        (export, {"output": "q.tflite"}, "ModelError"),
        (export, {"compress": "tflm", "model": None}, "ExportError: litert has no weights of compress='tflm'"),
        (verify, {"tflite": "nope.tflite"}, "ExportError: There is no file 'nope.tflite'"),
        (pack, {"input": "nope.tflite"}, "PackError: There is no file 'nope.tflite'"),
        (pack, {"action": "unpack", "output": "x.tflite"}, "PackError: this is no packed file"),
        (pack, {"output": "x.zip"}, "ExportError: Cannot write 'x.zip': its name must end in .kqz"),
    ],
)
def test_errors_are_one_message_and_exit_status_1(files, capsys, module, changes, message):
    defaults: dict[object, dict[str, object]] = {
        quantize: {"model": digits_cnn.PATH, "data": files.cal_npy, "output": str(files.folder / "x.keras")},
        export: {"model": files.q_keras if "compress" in changes else digits_cnn.PATH, "output": "x.tflite"},
        pack: {"input": files.q_tflite, "output": "x.kqz"},
        verify: {"model": files.q_keras, "data": files.test_npz},
    }
    given = {**defaults[module], **{name: value for name, value in changes.items() if value is not None}}
    assert run_app(module, **given) == 1
    err = capsys.readouterr().err
    assert err.startswith(message) and "Traceback" not in err


def test_pack_and_unpack_give_the_file_back(files, capsys):
    packed, back = str(files.folder / "q.kqz"), str(files.folder / "back.tflite")
    assert run_app(pack, input=files.q_tflite, output=packed) == 0
    assert run_app(pack, action="unpack", input=packed, output=back) == 0
    content = Path(files.q_tflite).read_bytes()
    assert Path(back).read_bytes() == content and Path(packed).stat().st_size < len(content)
    assert f"{len(content):,} bytes -> {packed}" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["q.tflite", "inspected.kqz"])
def test_inspect_shows_a_row_for_every_array_and_the_totals(files, capsys, source):
    kquant.pack_tflite(files.q_tflite, files.folder / "inspected.kqz")
    assert run_app(pack, action="inspect", input=str(files.folder / source)) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    sizes = {row[0]: [int(cell) for cell in row[-2:]] for row in rows}
    plain, packed = Path(files.q_tflite).stat().st_size, (files.folder / "inspected.kqz").stat().st_size
    assert sizes["total"] == [plain, packed]
    assert sum(int(row[-1]) for row in rows[:-1]) == packed
    kernels = {name for name in read_tensors(files.q_tflite) if name.endswith("/kernel")}
    assert {row[0] for row in rows if row[1] == "integers"} == kernels


@pytest.mark.slow
def test_export_stores_weights_for_micro(files, capsys):
    options = {"model": digits_cnn.PATH, "config": "w4a8-per_tensor", "target": "tflm", "data": files.cal_npy}
    micro, content = str(files.folder / "micro.keras"), str(files.folder / "micro.tflite")
    assert run_app(quantize, **options, adaround=False, output=micro, progress=False) == 0
    assert run_app(export, model=micro, output=content, compress="tflm") == 0
    assert "bytes stored in" in capsys.readouterr().out
    assert run_app(verify, model=micro, tflite=content, data=files.test_npz, limit=4) == 0


def test_quantize_switches_steps(files, capsys):
    """Flags win over the preset; the report says what was done."""
    options = {"model": digits_cnn.PATH, "config": "w4a8-per_tensor", "output": str(files.folder / "steps.keras")}
    switches = {"equalize": False, "correct_bias": True, "adaround": False, "input_range": "0,1"}
    assert run_app(quantize, **options, **switches, data=files.cal_npy, progress=False) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    steps = {
        row[0]: row[1] for row in rows if row and row[0] in ("equalize", "absorb_bias", "adaround", "correct_bias")
    }
    assert steps == {"equalize": "no", "absorb_bias": "no", "adaround": "no", "correct_bias": "yes"}
    config = keras.saving.load_model(options["output"]).quantization.config.to_dict()
    assert config["inputs"]["range"] == [0.0, 1.0] and config["equalize"] is False


@pytest.mark.parametrize("config", ["w8a8-per_tensor", "config.yaml"])
def test_a_target_wins_over_that_of_the_config(files, monkeypatch, config):
    """Whether a preset or a file names another one."""
    monkeypatch.chdir(files.folder)
    kquant.QuantConfig.load({"preset": "w8a8-per_tensor", "equalize": False}).save("config.yaml")
    options = {"model": digits_cnn.PATH, "data": files.cal_npy, "output": "target.keras", "progress": False}
    assert run_app(quantize, **options, config=config, target="litert") == 0
    given = kquant.QuantConfig.load(config)
    found = keras.saving.load_model("target.keras", compile=False).quantization.config
    assert given.target == "litert_per_tensor"
    assert found == replace(given, target="litert")


def test_quantize_without_data_says_what_needs_data(files, capsys):
    output = str(files.folder / "free.keras")
    assert run_app(quantize, model=digits_cnn.PATH, output=output, progress=False) == 1
    assert "Without calibration data" in capsys.readouterr().err
    assert run_app(quantize, model=digits_cnn.PATH, output=output, input_range="0,1", progress=False) == 0
    assert "without data: batch_norm" in capsys.readouterr().out


@pytest.mark.parametrize("module", [quantize, export, verify, evaluate])
def test_what_is_missing_on_the_command_line_is_a_usage_error(module):
    with pytest.raises(app.UsageError, match="--"):
        run_app(module, model=digits_cnn.PATH)


@pytest.mark.slow
def test_an_app_as_a_process(tmp_path):
    command = [sys.executable, "-m", "kquant_tools.quantize"]
    env = checkout_environment()
    done = subprocess.run([*command, "--help"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert "kquant-quantize --model" in done.stdout and "--config" in done.stdout and "--allow_float" not in done.stdout
    failing = ["--model=nope.keras", f"--output={tmp_path}/q.keras"]
    done = subprocess.run([*command, *failing], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ModelError: Cannot load a model from 'nope.keras'" in done.stderr and "Traceback" not in done.stderr


def test_console_scripts_name_functions_that_exist():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = re.findall(r"^(\S+) = kquant_tools\.(\w+):(\w+)$", setup["options.entry_points"]["console_scripts"], re.M)
    assert len(scripts) == 9
    for script, module, function in scripts:
        assert script == f"kquant-{module}".replace("_", "-")
        assert callable(getattr(importlib.import_module(f"kquant_tools.{module}"), function))
