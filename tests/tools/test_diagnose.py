"""The command line of the diagnosis: flags to summary, report, record and config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import kquant
from kquant.diagnosis.records import Diagnosis
from kquant_tools import common, diagnose
from tests.support.apps import run_app
from tests.support.digits_chain import DIGITS, PER_TENSOR, TEST, wide_depthwise


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("diagnose")
    wide_depthwise().save(folder / "float.keras")
    np.savez(folder / "test.npz", x=TEST[0], y=TEST[1])
    np.save(folder / "calibration.npy", DIGITS.calibration)
    kquant.QuantConfig.load(PER_TENSOR).save(folder / "config.yaml")
    names = {"model": "float.keras", "data": "test.npz", "calibration": "calibration.npy", "config": "config.yaml"}
    return {key: str(folder / name) for key, name in names.items()}


@pytest.mark.slow
def test_from_flags_to_files(files: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("plotly")
    written = {"html": "r.html", "json": "r.json", "recommended": "better.yaml"}
    paths = {key: str(tmp_path / name) for key, name in written.items()}
    assert run_app(diagnose, **files, **paths, sensitivity=False, progress=False) == 0
    text = capsys.readouterr().out
    assert "culprit: weights" in text and all(f"wrote {path}" in text for path in paths.values())
    d = Diagnosis.from_json(Path(paths["json"]).read_text())
    assert d.samples == 300 and str(d) in text
    assert "<html" in Path(paths["html"]).read_text()
    better = kquant.QuantConfig.load(paths["recommended"])
    assert better.to_dict() == d.recommendation and better.equalize is True


def accuracy_of_ten(model: Any) -> float:
    return float(np.mean(np.argmax(model.predict(TEST[0][:10], verbose=0), -1) == TEST[1][:10]))


def test_a_metric_of_a_module() -> None:
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(metric=f"{__name__}:accuracy_of_ten"):
        assert common.metric_of_flags() is accuracy_of_ten
    with flagsaver.flagsaver(metric="kl"):
        assert common.metric_of_flags() == "kl"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"html": "report.txt"}, "ExportError: Cannot write 'report.txt': its name must end in .html"),
        ({"config": "w8a9a"}, "ConfigError: Unknown preset 'w8a9a'"),
        ({"calibration": "nope.npz"}, "CalibrationError: There is no file or folder 'nope.npz'"),
        ({"tflite": "nope.tflite"}, "ExportError: There is no file 'nope.tflite'"),
    ],
)
def test_errors_are_one_message(files: dict[str, str], capsys: Any, changes: dict[str, str], message: str) -> None:
    assert run_app(diagnose, **{**files, "progress": False, "limit": 20, **changes}) == 1
    assert message in capsys.readouterr().err
