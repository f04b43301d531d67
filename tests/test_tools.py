"""The command line: data sources, evaluation, and the apps from flags to files."""

from __future__ import annotations

import configparser
import importlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver
from PIL import Image

import kquant
from models import digits_cnn
from tools import common, demo, evaluate, export, paper_tables, quantize, tables, training_tables, verify, zoo
from tools.data import PREPROCESS, load_data, spread

ROOT = Path(__file__).parents[1]


def inputs(*shapes: tuple[int | None, ...], names: tuple[str, ...] = ("image", "other")) -> list[SimpleNamespace]:
    return [SimpleNamespace(name=name, shape=shape) for name, shape in zip(names, shapes, strict=False)]


GREY = inputs((None, 2, 2, 1))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(path: Path, pictures: list[Image.Image], **more: np.ndarray) -> str:
    """An .npz of encoded pictures (PNG, so that decoding is exact)."""
    files = []
    for image in pictures:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(path, jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, **more)
    return str(path)


# --- data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [("x", "y"), ("images", "labels")])
def test_npz_gives_batches_in_order_and_can_be_read_again(tmp_path, keys):
    x, y = np.arange(40, dtype=np.float32).reshape(10, 2, 2, 1), np.arange(10)
    np.savez(tmp_path / "d.npz", **dict(zip(keys, (x, y), strict=True)))
    data = load_data(str(tmp_path / "d.npz"), GREY, batch_size=4)
    for _ in range(2):
        batches = list(data)
        assert [len(b[0]) for b in batches] == [4, 4, 2]
        np.testing.assert_array_equal(np.concatenate([b[0] for b in batches]), x)
        np.testing.assert_array_equal(np.concatenate([b[1] for b in batches]), y)


def test_npy_and_unlabelled_data_give_bare_arrays(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 2, 2, 1)
    np.save(tmp_path / "d.npy", x)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(3))
    for name in ("d.npy", "d.npz"):
        (batch,) = load_data(str(tmp_path / name), GREY, labels=False)
        np.testing.assert_array_equal(batch, x)


def test_several_inputs_come_by_name(tmp_path):
    image, other = np.ones((3, 2, 2, 1), np.float32), np.arange(6).reshape(3, 2)
    np.savez(tmp_path / "d.npz", image=image, other=other)
    (batch,) = load_data(str(tmp_path / "d.npz"), inputs((None, 2, 2, 1), (None, 2)))
    np.testing.assert_array_equal(batch["image"], image)
    np.testing.assert_array_equal(batch["other"], other)
    assert batch["other"].dtype == other.dtype  # ids stay integers


def test_encoded_images_equal_pillows(tmp_path):
    pictures = [picture(6, 4, seed) for seed in range(5)]
    path = encoded(tmp_path / "d.npz", pictures, labels=np.arange(5))
    ((x, y),) = load_data(path, inputs((None, 4, 6, 3)))
    np.testing.assert_array_equal(x, np.stack([np.asarray(p, np.float32) for p in pictures]))
    np.testing.assert_array_equal(y, np.arange(5))
    assert x.dtype == np.float32


def test_crop_cuts_the_centre_and_stretch_resizes(tmp_path):
    image = picture(7, 7)
    path, model = encoded(tmp_path / "d.npz", [image]), inputs((None, 4, 4, 3))
    (cropped,) = load_data(path, model, fit="crop")
    np.testing.assert_array_equal(cropped[0], np.asarray(image, np.float32)[1:5, 1:5])
    (stretched,) = load_data(path, model)
    np.testing.assert_array_equal(stretched[0], np.asarray(image.resize((4, 4), Image.Resampling.BILINEAR), np.float32))
    with pytest.raises(kquant.CalibrationError, match="too small to crop"):
        list(load_data(path, inputs((None, 8, 8, 3)), fit="crop"))


def test_folder_of_classes(tmp_path):
    for k, name in enumerate(("cat", "ant", "bee")):
        (tmp_path / name).mkdir()
        picture(2, 2, k).save(tmp_path / name / "a.png")
    (tmp_path / "bee" / "notes.txt").write_text("not an image")
    ((x, y),) = load_data(str(tmp_path), inputs((None, 2, 2, 3)))
    np.testing.assert_array_equal(y, [0, 1, 2])
    np.testing.assert_array_equal(x, np.stack([np.asarray(picture(2, 2, k), np.float32) for k in (1, 2, 0)]))


def test_flat_folder_and_grey_model(tmp_path):
    picture(2, 2).save(tmp_path / "a.png")
    (x,) = load_data(str(tmp_path), GREY)
    np.testing.assert_array_equal(x[0, :, :, 0], np.asarray(picture(2, 2).convert("L"), np.float32))


def test_preprocessing_maps_the_ends_of_the_range():
    ends = np.array([0, 255], np.float32).reshape(2, 1, 1, 1) * np.ones(3, np.float32)
    np.testing.assert_array_equal(PREPROCESS["none"](ends), ends)
    np.testing.assert_allclose(PREPROCESS["unit"](ends)[:, 0, 0, 0], [0, 1])
    np.testing.assert_allclose(PREPROCESS["tf"](ends)[:, 0, 0, 0], [-1, 1])
    np.testing.assert_allclose(PREPROCESS["torch"](ends)[0, 0, 0], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    np.testing.assert_allclose(PREPROCESS["torch"](ends)[1, 0, 0], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])
    assert all(f(ends).dtype == np.float32 for f in PREPROCESS.values())


def halve(x):
    return x / 2


def stream():
    yield np.full((3, 2, 2, 1), 8.0), np.arange(3)
    yield np.full((3, 2, 2, 1), 4.0), np.arange(3, 6)
    raise AssertionError("read further than the limit")


def test_functions_give_batches_and_preprocessing():
    data = load_data(f"{__name__}:stream", GREY, preprocess=f"{__name__}:halve", limit=5)
    for _ in range(2):
        (a, ya), (b, yb) = data
        assert (a.shape[0], b.shape[0], a.max(), b.max()) == (3, 2, 4.0, 2.0)
        np.testing.assert_array_equal(np.concatenate([ya, yb]), np.arange(5))
    assert isinstance(next(iter(load_data(f"{__name__}:stream", GREY, labels=False))), np.ndarray)


@pytest.mark.parametrize(("count", "limit"), [(10, None), (10, 10), (10, 20), (10, 3), (1000, 7), (5, 1)])
def test_a_limit_is_spread_evenly(count, limit):
    numbers = spread(count, limit)
    assert len(numbers) == min(limit or count, count)
    assert numbers[0] == 0 and numbers[-1] < count
    gaps = np.diff(numbers)
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("missing.npz", {}, "no file or folder"),
        ("words.txt", {}, "neither"),
        ("broken.npz", {}, "Cannot read"),
        ("other.npz", {}, "the model needs x or images"),
        ("empty.npy", {}, "no sample"),
        ("good.npy", {"preprocess": "imagenet"}, "Unknown preprocessing 'imagenet'"),
        ("good.npy", {"limit": 0}, "limit must be at least 1"),
        ("good.npy", {"fit": "pad"}, "Unknown fit 'pad'"),
        ("nowhere.at_all:batches", {}, "Cannot import"),
        ("os:no_such_function", {}, "Cannot import"),
    ],
)
def test_bad_sources_are_named(tmp_path, monkeypatch, source, options, message):
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("x")
    Path("broken.npz").write_text("this is no zip file")
    np.savez("other.npz", a=np.zeros(3))
    np.save("empty.npy", np.zeros((0, 2, 2, 1)))
    np.save("good.npy", np.zeros((1, 2, 2, 1)))
    with pytest.raises(kquant.CalibrationError, match=message):
        load_data(source, GREY, **options)


def test_an_undecodable_image_is_named(tmp_path):
    np.savez(tmp_path / "d.npz", jpeg=np.zeros(9, np.uint8), offsets=np.array([0, 9]))
    with pytest.raises(kquant.CalibrationError, match="Cannot decode"):
        list(load_data(str(tmp_path / "d.npz"), GREY))


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_scores_are_counted_over_batches():
    truth, wrong = np.array([0, 1, 2, 0, 1]), np.array([0, 2, 2, 1, 1])
    models = {"a": lambda x: np.eye(3)[x[:, 0]], "b": lambda x: np.eye(3)[x[:, 1]]}
    batches = [(np.stack([truth, wrong], 1)[k : k + 3], truth[k : k + 3]) for k in (0, 3)]
    scores = evaluate.evaluate(models, batches)
    assert scores["a"].accuracy == 1 and scores["b"].accuracy == 3 / 5
    assert scores["b"].agrees["a"] == pytest.approx(3) and scores["a"].agrees == {}
    text = evaluate.format_scores(scores, {"a": 1000, "b": 10})
    assert "60.00" in text and "100.00" in text and "1,000" in text


def test_without_labels_only_agreement_is_known():
    scores = evaluate.evaluate({"a": lambda x: np.eye(3)[x]}, [np.array([0, 1])])
    assert scores["a"].accuracy is None and scores["a"].samples == 2


@pytest.mark.parametrize("y", [np.array([2, 0]), np.array([[2], [0]]), np.eye(3)[[2, 0]]])
def test_labels_of_any_usual_form(y):
    np.testing.assert_array_equal(evaluate.class_indices(y), [2, 0])


# --- apps ---------------------------------------------------------------------------------------------------------


def run_app(module, **values: object) -> int:
    """Run an app in this process with the given flags; returns its exit status."""
    arguments = ["app", *(f"--{name}={value}" for name, value in values.items())]
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        rest = flags.FLAGS(arguments)
        try:
            common.guarded(module.main, rest)
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


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
        (quantize, {"data": "nope.npz"}, "CalibrationError: There is no file or folder 'nope.npz'"),
        (quantize, {"output": "no/folder/q.keras"}, "ExportError: Cannot write"),
        (quantize, {"output": "q.h5"}, "ExportError: Cannot write 'q.h5': its name must end in .keras"),
        (export, {"output": "q.tflite"}, "ModelError"),
        (verify, {"tflite": "nope.tflite"}, "ExportError: There is no file 'nope.tflite'"),
    ],
)
def test_errors_are_one_message_and_exit_status_1(files, capsys, module, changes, message):
    defaults: dict[object, dict[str, object]] = {
        quantize: {"model": digits_cnn.PATH, "data": files.cal_npy, "output": str(files.folder / "x.keras")},
        export: {"model": digits_cnn.PATH},
        verify: {"model": files.q_keras, "data": files.test_npz},
    }
    assert run_app(module, **{**defaults[module], **changes}) == 1
    err = capsys.readouterr().err
    assert err.startswith(message) and "Traceback" not in err


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


def test_an_app_as_a_process(tmp_path):
    command = [sys.executable, "-m", "tools.quantize"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
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
    assert len(scripts) == 6
    for script, module, function in scripts:
        assert script == f"kquant-{module}".replace("_", "-")
        assert callable(getattr(importlib.import_module(f"tools.{module}"), function))


# --- the tables of the results -----------------------------------------------------------------------------------


@pytest.fixture
def digits_zoo(monkeypatch):
    """The digits model in the place of the real ones."""
    digits = digits_cnn.load_split()
    entry = zoo.RealModel(
        "digits_cnn",
        calibration=lambda limit: digits.calibration[:limit],
        evaluation=lambda limit: [(digits.x_test[:limit], digits.y_test[:limit])],
        top1=0.0,
        converter=0.0,
        converter_bytes=0,
        calibration_size=50,
        training=lambda limit: (digits.x_train[:256], digits.y_train[:256]),
    )
    monkeypatch.setattr(zoo, "MODELS", {"digits": entry})
    monkeypatch.setattr(zoo, "load_model", lambda name: keras.saving.load_model(digits_cnn.PATH, compile=False))
    return digits


def cells(table: tables.Table, **options: object) -> dict[str, dict[str, str]]:
    """variant -> column -> cell of a table of the digits model, as printed."""
    header, rule, *lines = table.markdown(["digits"], tables.Options(samples=100, seeds=2, **options))
    names = [c.strip() for c in header.strip("|").split("|")]
    assert rule.count("---") == len(names) == len(table.header)
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == len(names) and row[0] == "digits" for row in rows)
    return {row[1]: dict(zip(names[2:], row[2:], strict=True)) for row in rows}


@pytest.mark.parametrize(
    ("key", "variants", "expected"),
    [
        ("1", "^mse, per channel", ["mse, per channel"]),
        ("2", "^batch", ["batch_norm"]),
        ("3", "activations . abs", ["CLE, dead channels, activations + absorption"]),
        ("4", "^CLE$", ["CLE"]),
        ("5", "^nearest$|^descent, a", ["nearest", "descent, asymmetric"]),
        ("6", "no data$", ["per tensor, no data", "per channel, no data"]),
    ],
)
def test_a_table_has_the_wanted_variants_and_sane_cells(digits_zoo, key, variants, expected):
    rows = cells(paper_tables.TABLES[key], variants=variants)
    assert list(rows) == expected
    for row in rows.values():
        assert row.pop("samples") == "100"
        row.pop("seconds", None)
        assert all(0 <= float(cell.split(" ± ")[0]) <= 100 for cell in row.values())
        wide = [cell for column, cell in row.items() if column not in ("A4", "A6", "W4", "W4A8 .tflite")]
        assert min(float(cell.split(" ± ")[0]) for cell in wide) >= float(row["float"]) - 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "variants", "expected"),
    [
        ("training", "^w4a4, d", ["float", "w4a4, distilled"]),
        ("7", "^kept", ["kept, per channel"]),
    ],
)
def test_a_table_about_training(digits_zoo, key, variants, expected):
    rows = cells(training_tables.TABLES[key], variants=variants, epochs=1)
    assert list(rows) == expected
    for row in rows.values():
        assert row["epochs"] == "1"
        trained = row["trained" if key == "training" else "trained .tflite"]
        assert float(trained.split(" ± ")[0]) > 80
    if key == "training":
        parity = rows["w4a4, distilled"]["reference LSB, LSB op by op, same decision"]
        assert parity.startswith("0, ") and parity.endswith(" %")


def test_the_command_of_the_tables_starts():
    """In a process of its own: its flags must not clash with those of what it imports."""
    command = [sys.executable, "-m", "tools.reproduce", "--table=no_such_table"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "--table=no_such_table: value should be one of" in done.stderr


def test_calibration_subsets_depend_on_the_seed_alone(digits_zoo):
    a, b, again = (paper_tables.subset("digits", seed) for seed in (0, 1, 0))
    np.testing.assert_array_equal(a, again)
    assert len(a) == len(b) == zoo.MODELS["digits"].calibration_size
    assert (a != b).any()


@pytest.mark.parametrize("preset", ["w3", "w4-per_tensor"])
def test_the_file_with_rounded_weights_computes_what_the_simulation_does(preset):
    digits = digits_cnn.load_split()
    model = keras.saving.load_model(digits_cnn.PATH, compile=False)
    qmodel = kquant.quantize_model(model, None, {"preset": preset, **tables.OFF}, progress=False)
    expected = qmodel.predict(digits.x_test, verbose=0)
    found = kquant.TFLiteModel(paper_tables.rounded_file(qmodel), threads=1).predict(digits.x_test)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - model.predict(digits.x_test, verbose=0)).max() > 0.1  # it is quantized


def test_repeated_measurements_show_their_spread():
    assert paper_tables.spread([81.0]) == 81.0
    assert paper_tables.spread([80.0, 81.0, 82.5]) == "81.17 ± 1.25"


# --- the benchmark ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["depthwise 3x3, 96", "conv 1x1, 96 to 24"])
def test_the_benchmark_of_one_layer(layer, tmp_path):
    """In a process of its own, as the benchmark runs it: its flags are not those of the other tools."""
    command = [sys.executable, "-m", "tools.benchmark", f"--worker={layer}", "--iterations=200"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    assert list(rows) == ["descent", "gram", "stochastic"]
    assert all(0 < row["error"] < 1 and row["seconds"] > 0 for row in rows.values())
    assert rows["descent"]["speed"] is None and rows["gram"]["speed"] > 0


# --- the demo and its model ---------------------------------------------------------------------------------------


def test_the_split_is_fixed_and_calibrates_on_training_images_only():
    a, b = digits_cnn.load_split(), digits_cnn.load_split()
    np.testing.assert_array_equal(a.x_test, b.x_test)
    assert len(a.x_train) + len(a.x_test) == 1797
    assert np.shares_memory(a.calibration, a.x_train)


def test_the_stored_model_is_the_recipes():
    stored, built = keras.saving.load_model(digits_cnn.PATH), digits_cnn.build()
    assert [w.path for w in stored.weights] == [w.path for w in built.weights]
    assert [w.shape for w in stored.weights] == [w.shape for w in built.weights]
    assert digits_cnn.PATH.stat().st_size < 200_000
    digits = digits_cnn.load_split()
    assert np.mean(stored.predict(digits.x_test, verbose=0).argmax(-1) == digits.y_test) >= 0.98


def test_the_recipe_learns():
    digits = digits_cnn.load_split()
    model = digits_cnn.train(epochs=2, verbose=0)
    assert np.mean(model.predict(digits.x_test, verbose=0).argmax(-1) == digits.y_test) > 0.8


def test_the_demo_prints_its_table_and_holds(capsys, monkeypatch):
    digits = digits_cnn.load_split()
    few = replace(digits, x_test=digits.x_test[:100], y_test=digits.y_test[:100])
    monkeypatch.setattr(digits_cnn, "load_split", lambda: few)
    demo.main([])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("float32", "w"))]
    assert [row[0] for row in rows[:3]] == ["float32", "w8a8", "w4a8"]
    assert min(float(value) for row in rows[:3] for value in row[1:3]) >= 95
    size = [int(row[3].replace(",", "")) for row in rows[:3]]
    assert size[2] < size[1] < size[0] / 2
    assert all(row[-1] == "holds" for row in rows[1:3])
