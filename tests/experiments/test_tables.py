"""The tables of the results, on the digits model."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest

import kquant
from experiments import paper_tables, tables, training_tables, zoo
from experiments.results import plain
from models import digits_cnn
from tests.support.apps import ROOT, checkout_environment


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


def cells(table: tables.Table, seeds: int = 2, **options: object) -> dict[str, dict[str, str]]:
    """variant -> column -> cell of a table of the digits model, as it is kept."""
    found = list(table.all_rows(["digits"], tables.Options(samples=100, seeds=seeds, **options)))
    rows = [dict(zip(table.header, map(plain, row), strict=True)) for row in found]
    assert all(row.pop("model") == "digits" for row in rows)
    assert len(set(map(tuple, ([row[k] for k in table.key if k != "model"] for row in rows)))) == len(rows)
    return {row.pop("variant"): row for row in rows}


@pytest.mark.parametrize(
    ("key", "variants", "expected"),
    [
        ("1", "^mse, per channel", ["mse, per channel"]),
        ("2", "^batch", ["batch_norm"]),
        pytest.param(
            "3", "activations . abs", ["CLE, dead channels, activations + absorption"], marks=pytest.mark.slow
        ),
        ("4", "^CLE$", ["CLE"]),
        pytest.param("5", "^nearest$|^descent, a", ["nearest", "descent, asymmetric"], marks=pytest.mark.slow),
        pytest.param("6", "no data$", ["per tensor, no data", "per channel, no data"], marks=pytest.mark.slow),
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
    rows = cells(training_tables.TABLES[key], variants=variants, epochs=1, seeds=1)
    assert list(rows) == expected
    for row in rows.values():
        assert row["epochs"] == "1"
        trained = row["trained" if key == "training" else "trained .tflite"]
        assert float(trained.split(" ± ")[0]) > 80
    if key == "training":
        parity = rows["w4a4, distilled"]["reference LSB, LSB op by op, same decision"]
        assert parity.startswith("0, ") and parity.endswith(" %")


@pytest.mark.slow
def test_the_command_of_the_tables_starts():
    """In a process of its own: its flags must not clash with those of what it imports."""
    command = [sys.executable, "-m", "experiments.reproduce", "--table=no_such_table"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=checkout_environment())
    assert done.returncode == 1 and "--table=no_such_table: value should be one of" in done.stderr


def test_calibration_subsets_depend_on_the_seed_alone(digits_zoo):
    a, b, again = (paper_tables.subset("digits", seed) for seed in (0, 1, 0))
    np.testing.assert_array_equal(a, again)
    assert len(a) == len(b) == zoo.MODELS["digits"].calibration_size
    assert (a != b).any()


@pytest.mark.slow
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
