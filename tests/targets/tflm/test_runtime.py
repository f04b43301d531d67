"""TensorFlow Lite Micro's interpreter: batches, tensors, memory, and what it says of files that it refuses."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from kquant.errors import ExportError, MissingPackageError
from kquant.targets.litert.reference.interpreter import IntegerReference
from kquant.targets.litert.runtime import TFLiteModel
from kquant.targets.litert.writer import write_tflite
from kquant.targets.tflm.kernels import REFERENCE
from kquant.targets.tflm.runtime import MicroModel, arena
from kquant.targets.tflm.target import TFLM
from tests.support.faults import build
from tests.support.toy import toy_data
from tests.targets.litert.cases import conv, fully_connected, unary

pytest.importorskip("tflite_micro", reason="tflite-micro is not installed: pip install .[tflm]")
RNG = np.random.default_rng


@pytest.fixture(scope="module")
def content() -> bytes:
    _, qgraph = build("w8a8")
    return write_tflite(qgraph, target=TFLM)[0]


def test_a_batch_runs_sample_by_sample(content: bytes) -> None:
    x, micro = toy_data(5, seed=3), MicroModel(content)
    together = micro.run([x])
    alone = [micro.run([x[k : k + 1]])[0] for k in range(len(x))]
    np.testing.assert_array_equal(together[0], np.concatenate(alone))
    assert together[0].dtype == np.int8


def test_real_valued_outputs_are_those_of_litert_within_a_step(content: bytes) -> None:
    x = toy_data(8, seed=3)
    ours, theirs = MicroModel(content).predict(x), TFLiteModel(content, "reference").predict(x)
    assert ours[0].shape == theirs[0].shape and np.max(np.abs(ours[0] - theirs[0])) <= 2 / 256


def test_every_tensor_of_a_batch_can_be_read(content: bytes) -> None:
    x, micro = toy_data(3, seed=4), MicroModel(content, keep_tensors=True)
    micro.run([x])
    found, reference = micro.tensors(), IntegerReference(content, kernels=REFERENCE)
    expected = reference.run([found[reference.input_names[0]]])
    assert found.keys() == expected.keys() and len(found[reference.input_names[0]]) == 3
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_tensors_are_kept_on_request_only(content: bytes) -> None:
    with pytest.raises(ExportError, match="keep_tensors=True"):
        MicroModel(content).tensors()


def test_the_arena_holds_the_largest_pair_of_tensors(content: bytes) -> None:
    used = arena(content)
    assert used.total == used.activations + used.persistent
    cat, add = 8 * 8 * 16, 8 * 8 * 8  # input and output of the concatenation, and of it the other input
    assert cat + 2 * add <= used.activations < 2 * (cat + 2 * add) and used.persistent > 0


def test_nothing_is_written_to_the_terminal(content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    arena(content)
    with pytest.raises(ExportError):
        MicroModel(fully_connected(bits=4)(RNG(0))[0])
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (fully_connected(bits=4)(RNG(0))[0], r"does not accept operator 0 FULLY_CONNECTED \(making 'y'\).*kTfLiteInt4"),
        (unary("GELU", "INT8", "GeluOptions", 2)(RNG(0))[0], r"does not accept operator 0 GELU \(making 'y'\)"),
        (conv("INT16", 4)(RNG(0))[0], r"operator 0 CONV_2D \(making 'y'\)"),
    ],
)
def test_a_refusal_names_the_operator_its_reason_and_a_remedy(model: bytes, named: str) -> None:
    with pytest.raises(ExportError, match=named) as found:
        MicroModel(model)
    assert '"target": "tflm"' in str(found.value)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    model, inputs = conv()(RNG(0))  # made for two samples
    assert len(MicroModel(model).run([np.concatenate([inputs[0]] * 2)])[0]) == 4
    with pytest.raises(ExportError, match="2 samples at a time, found 3"):
        MicroModel(model).run([np.concatenate([inputs[0], inputs[0][:1]])])


def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(ExportError, match="corrupt or truncated|bytes for"):
        MicroModel(content[: len(content) // 2])


def test_a_missing_package_is_named(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tflite_micro", None)
    with pytest.raises(MissingPackageError, match=r"kquant\[tflm\]"):
        MicroModel(content)
