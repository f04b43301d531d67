"""Running files: batches, types of inputs, kernels, errors."""

from __future__ import annotations

import numpy as np
import pytest

from kquant.errors import ExportError
from kquant.graph.ir import Graph
from kquant.graph.ops import evaluate
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import dequantize, quantize
from kquant.targets.litert.runtime import KERNELS, TFLiteModel, as_stored, dequantized
from kquant.targets.litert.writer import write_tflite
from tests.support.graphs import chain, dense, op, quantized, rng

SHAPE = (4, 6)


def feeds(samples: int = 7) -> list[np.ndarray]:
    return [rng(k).normal(size=(samples, *SHAPE)).astype(np.float32) for k in range(2)]


def graph() -> Graph:
    return chain(SHAPE, op("add", SHAPE, inputs=("x", "y")), dense(cin=6, cout=3, shape=(None, 4, 3)))


@pytest.fixture(scope="module")
def qgraph() -> QuantizedGraph:
    return quantized(graph(), feeds())


@pytest.fixture(scope="module")
def content(qgraph: QuantizedGraph) -> bytes:
    return write_tflite(qgraph)[0]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_change_nothing(content: bytes, batch_size: int) -> None:
    (expected,) = TFLiteModel(content).predict(feeds(), batch_size=7)
    model = TFLiteModel(content)
    for _ in range(2):  # the last batch is smaller than the first of the next call
        (found,) = model.predict(feeds(), batch_size=batch_size)
        np.testing.assert_array_equal(found, expected)
    streamed = model.predict_batches([x[k : k + 2] for x in feeds()] for k in range(0, 7, 2))
    np.testing.assert_array_equal(streamed[0], expected)


def test_outputs_are_those_of_the_graph(content: bytes, qgraph: QuantizedGraph) -> None:
    (found,) = TFLiteModel(content).predict(feeds())
    want = np.asarray(evaluate(graph(), feeds())[0])
    np.testing.assert_allclose(found, want, atol=6 * float(qgraph.activations["dense"].scale))
    (stored,) = TFLiteModel(content).run(feeds())
    assert stored.dtype == np.int8
    np.testing.assert_allclose(found, dequantize(stored, qgraph.activations["dense"]), rtol=1e-6)


def test_real_and_stored_inputs_are_the_same(content: bytes, qgraph: QuantizedGraph) -> None:
    real = [10 * x for x in feeds()]  # beyond the grid: saturated, not wrapped
    stored = [quantize(x, qgraph.activations[n]).astype(np.int8) for n, x in zip(("x", "y"), real, strict=True)]
    model = TFLiteModel(content)
    np.testing.assert_array_equal(model.run(real)[0], model.run(stored)[0])
    np.testing.assert_array_equal(model.run([x.astype(np.float64) for x in real])[0], model.run(stored)[0])


def test_tensors_inside_are_readable_where_the_kernels_keep_them(content: bytes, qgraph: QuantizedGraph) -> None:
    for kernels in ("builtin", "reference"):
        model = TFLiteModel(content, kernels, keep_tensors=True)
        model.run(feeds())
        tensors = model.tensors()
        assert {"x", "y", "add", "dense"} <= set(tensors)
        total = sum(dequantize(tensors[n], qgraph.activations[n]) for n in ("x", "y"))
        np.testing.assert_allclose(tensors["add"], quantize(total, qgraph.activations["add"]), atol=1)


@pytest.mark.parametrize("kernels", KERNELS)
def test_threads_and_kernels_agree(content: bytes, kernels: str) -> None:
    one, three = (TFLiteModel(content, kernels, threads=n).run(feeds())[0] for n in (1, 3))
    np.testing.assert_array_equal(one, three)
    np.testing.assert_allclose(one.astype(int), TFLiteModel(content).run(feeds())[0].astype(int), atol=1)


def test_float_outputs_stay_as_they_are() -> None:
    y = np.float32([1.5, -2])
    assert dequantized(y, {"quantization": (0.0, 0)}) is y
    found = dequantized(np.int8([-128, 127]), {"quantization": (0.5, -128)})
    np.testing.assert_array_equal(found, np.float32([0, 127.5]))


def test_paths_and_bytes(content: bytes, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "m.tflite"
    path.write_bytes(content)
    expected = TFLiteModel(content).run(feeds())[0]
    for source in (path, str(path), bytearray(content)):
        np.testing.assert_array_equal(TFLiteModel(source).run(feeds())[0], expected)


def test_errors_say_what_was_found(content: bytes, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ExportError, match="no file .*absent.tflite"):
        TFLiteModel(tmp_path / "absent.tflite")
    with pytest.raises(ExportError, match="not a .tflite file"):
        TFLiteModel(b"PK\x03\x04 something else")
    with pytest.raises(ExportError, match="not a .tflite file"):
        TFLiteModel(b"")
    with pytest.raises(ExportError, match="does not accept"):
        TFLiteModel(content[: len(content) // 2])


def test_a_wrong_number_of_inputs_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        TFLiteModel(content).run(feeds()[:1])


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float64"])
def test_numbers_of_another_type_than_the_files_are_real_values(dtype: str) -> None:
    detail = {"name": "x", "dtype": np.int8, "quantization": (2.0, -100)}
    assert as_stored(np.array([0, 100, 255], dtype), detail).tolist() == [-100, -50, 28]


def test_numbers_that_a_tensor_without_grid_cannot_hold_are_refused() -> None:
    detail = {"name": "ids", "dtype": np.int32, "quantization": (0.0, 0)}
    assert as_stored(np.array([3.0, 7.0]), detail).tolist() == [3, 7]
    for wrong in (np.array([0.5]), np.array([2**40])):
        with pytest.raises(ExportError, match="'ids'.*cannot hold"):
            as_stored(wrong, detail)
