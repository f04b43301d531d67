"""What gets installed is complete: the wheel in a folder of its own, used far from the checkout."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from tests.support.apps import ROOT

pytestmark = pytest.mark.slow
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
COMMANDS = ("quantize", "export", "pack", "evaluate", "verify", "diagnose", "profile", "search", "train_qat")


def checked(command: list[str], **options: object) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what is needed; the network is not."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("kquant", "tools", "models", "experiments", "tests"):  # the last three must stay out
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    checked([*PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(folder), str(source)])
    (found,) = folder.glob("kquant-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed into."""
    folder = tmp_path_factory.mktemp("installed")
    checked([*PIP, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)])
    return folder


class Shell:
    """An empty folder in which only the installed packages are found."""

    def __init__(self, installed: Path, folder: Path) -> None:
        self.installed, self.folder = installed, folder
        self.env = {**os.environ, "PYTHONPATH": str(installed), "TF_CPP_MIN_LOG_LEVEL": "3"}

    def python(self, *arguments: str) -> str:
        """Run the interpreter."""
        return checked([sys.executable, *arguments], cwd=self.folder, env=self.env)

    def __call__(self, command: str, *arguments: str) -> str:
        """Run a console script."""
        script = self.installed / "bin" / f"kquant-{command.replace('_', '-')}"
        return checked([sys.executable, str(script), *arguments], cwd=self.folder, env=self.env)


@pytest.fixture
def shell(installed: Path, tmp_path: Path) -> Shell:
    return Shell(installed, tmp_path)


def test_the_wheel_holds_the_two_packages_and_their_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"kquant", "kquant_tools"}
    wanted = [p.relative_to(ROOT) for p in (ROOT / "kquant").rglob("*") if p.suffix in (".py", ".html", ".css", ".js")]
    wanted += [p.relative_to(ROOT / "tools") for p in (ROOT / "tools" / "kquant_tools").glob("*.py")]
    assert {str(path) for path in wanted} <= set(names)


def test_what_is_imported_is_what_was_installed(shell: Shell) -> None:
    out = shell.python("-c", "import kquant, kquant_tools; print(kquant.__file__); print(kquant_tools.__file__)")
    for line in out.splitlines()[-2:]:
        assert Path(line).is_relative_to(shell.installed)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_its_help(shell: Shell, command: str) -> None:
    scripts = configparser.ConfigParser()
    scripts.read(next(shell.installed.glob("kquant-*.dist-info/entry_points.txt")))
    assert len(scripts["console_scripts"]) == len(COMMANDS)
    script = [sys.executable, str(shell.installed / "bin" / f"kquant-{command.replace('_', '-')}"), "--help"]
    module = [sys.executable, "-m", f"kquant_tools.{command}", "--help"]
    for line in (script, module):  # absl ends --help with status 1
        done = subprocess.run(line, cwd=shell.folder, env=shell.env, capture_output=True, text=True, check=False)
        flag = "--input" if command == "pack" else "--model"
        assert flag in done.stdout and f"kquant-{command.replace('_', '-')}" in done.stdout, done.stderr


def test_from_a_float_model_to_a_diagnosis_in_an_empty_folder(shell: Shell) -> None:
    rng = np.random.default_rng(0)
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(8, 3, activation="relu", name="conv")(inputs)
    x = layers.Dense(4, name="logits")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, x)
    images = rng.normal(size=(64, 8, 8, 3)).astype(np.float32)
    labels = np.argmax(model.predict(images, verbose=0), -1)
    model.save(shell.folder / "float.keras")
    np.savez(shell.folder / "data.npz", x=images, y=labels)

    model_flag, data = "--model=float.keras", "--data=data.npz"
    shell("quantize", model_flag, data, "--target=litert", "--output=q.keras", "--noprogress")
    assert "every operation is an integer operation" in shell("export", "--model=q.keras", "--output=q.tflite")
    out = shell("evaluate", model_flag, "--quantized=q.keras", "--tflite=q.tflite", data)
    rows = [line.split() for line in out.splitlines()]
    scores = {row[0]: row[1:3] for row in rows if row and row[0] in ("float", "simulation", "tflite")}
    assert scores["float"] == ["100.00", "64"] and float(scores["tflite"][0]) > 80
    assert scores["tflite"] == scores["simulation"]
    assert "parity holds" in shell("verify", "--model=q.keras", "--tflite=q.tflite", data)
    written = ["--json=d.json", "--recommended=better.yaml"]
    try:
        import plotly  # noqa: F401

        written.append("--html=d.html")
    except ImportError:
        pass
    out = shell("diagnose", model_flag, data, "--config=w4a8-per_tensor", "--noprogress", *written)
    assert "culprit:" in out and (shell.folder / "d.json").stat().st_size > 0
    assert not written[2:] or "<html" in (shell.folder / "d.html").read_text()
    shell("train_qat", model_flag, data, "--config=w4a8", "--epochs=1", "--output=t.keras", "--noprogress")
    assert (shell.folder / "t.keras").exists()
