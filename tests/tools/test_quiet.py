"""Commands load TensorFlow without its notices; what fails to load still says why."""

import subprocess
import sys
from pathlib import Path

import pytest

from kquant_tools.quiet import stderr_held_back

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_tensorflow_loads_without_notices() -> None:
    code = "import kquant_tools, sys; import tensorflow; print('loaded', tensorflow.__version__, file=sys.stderr)"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}", "PATH": "/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stderr.startswith("loaded") and len(run.stderr.splitlines()) == 1


@pytest.mark.slow
def test_no_file_is_announced() -> None:
    """The demo prints what it says itself, and warnings of what it quantizes."""
    code = (
        "from kquant_tools.quiet import load_delegate; load_delegate(); import keras, kquant, numpy as np;"
        "model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]); x = np.ones((8, 4), 'float32');"
        "q = kquant.quantize_model(model, x, progress=False);"
        "kquant.TFLiteModel(kquant.export_tflite(q).content).predict(x)"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}", "PATH": "/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stderr == ""


def test_what_was_held_back_is_written_if_the_block_fails(capfd: pytest.CaptureFixture[str]) -> None:
    import os

    with stderr_held_back():
        os.write(2, b"a notice\n")
    assert capfd.readouterr().err == ""
    with pytest.raises(ImportError), stderr_held_back():
        os.write(2, b"the cause\n")
        raise ImportError
    assert capfd.readouterr().err == "the cause\n"
