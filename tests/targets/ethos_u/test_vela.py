"""Vela: what it makes of a file, and what it says of one that it cannot compile."""

from __future__ import annotations

import importlib.util
import subprocess
from typing import Any

import numpy as np
import pytest

from kquant.errors import ExportError, MissingPackageError
from kquant.targets.ethos_u import vela
from kquant.targets.ethos_u.target import ETHOS_U
from kquant.targets.ethos_u.vela import ACCELERATORS, CpuOperator, compile_file
from kquant.targets.litert.reader import read
from kquant.targets.litert.writer import write_tflite
from tests.support.faults import build
from tests.support.litert_files import Op, T
from tests.support.litert_files import build as file_of
from tests.targets.litert.cases import conv

pytest.importorskip("ethosu.vela", reason="Vela is not installed: pip install .[ethos-u]")


@pytest.fixture(scope="module")
def content() -> bytes:
    return write_tflite(build("w4a8")[1], target=ETHOS_U)[0]


@pytest.mark.parametrize("accelerator", ["ethos-u55-128", "ethos-u65-256", "ethos-u85-256"])
def test_a_network_runs_on_the_accelerator_entirely(content: bytes, accelerator: str) -> None:
    made = compile_file(content, accelerator)
    assert made.accelerator == accelerator and made.cpu_operators == ()
    assert [op.code for op in read(made.content).operators] == ["CUSTOM"]
    assert made.npu_operators >= 8 and made.dram == 0
    # the input and output of the concatenation; 8 x 8 x 3 x 8 + 3 x 3 x 8 + 16 x 5 weights of 4 bits and the commands
    assert 8 * 8 * 16 <= made.sram < 16_000 and 168 <= made.flash < 4_000
    assert made.macs == 64 * 27 * 8 + 64 * 9 * 8 + 80 or made.macs > 64 * 27 * 8
    assert sum(layer.cycles for layer in made.layers) <= made.cycles == pytest.approx(made.seconds * 500e6, rel=0.01)
    assert {layer.runs_on for layer in made.layers} == {"NPU"} and "0 on the CPU" in str(made)


def float_floor() -> bytes:
    x, y = T("x", (1, 4), "FLOAT32"), T("y", (1, 4), "FLOAT32")
    return file_of([x, y], [Op("FLOOR", ["x"], ["y"])], ["y"])


def test_what_is_left_to_the_cpu_is_named_with_the_reason() -> None:
    made = compile_file(float_floor())
    (left,) = made.cpu_operators
    assert (left.code, left.output) == ("FLOOR", "y") and left.reason
    assert "on the CPU: FLOOR (making 'y')" in str(made) and made.npu_operators == 0
    assert str(CpuOperator(code="A", output="b")) == "A (making 'b')"


def test_weights_in_int4_tensors_are_named() -> None:
    """On them the compiler dies of a signal."""
    with pytest.raises(ExportError, match=r'int4 or int2 tensors.*CONV_2D \(making .y.\).*"target": "ethos_u"'):
        compile_file(conv(bits=4)(np.random.default_rng(0))[0])


def test_other_failures_tell_what_the_compiler_said(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "reading\n", "Traceback\nRuntimeError: no room for it\n")

    monkeypatch.setattr(vela.subprocess, "run", run)
    with pytest.raises(ExportError, match="ethos-u55-128: RuntimeError: no room for it"):
        compile_file(content)


def test_unknown_accelerators_are_refused(content: bytes) -> None:
    with pytest.raises(ExportError, match="'ethos-u55-1'; known are .*ethos-u85-2048"):
        compile_file(content, "ethos-u55-1")
    assert len(ACCELERATORS) == len(set(ACCELERATORS)) == 11


def test_a_missing_package_is_named(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"kquant\[ethos-u\]"):
        compile_file(content)
