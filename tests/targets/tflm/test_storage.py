"""Files with DECODE: shorter, read back, and the same on the runtime, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import pytest

import kquant
from kquant.errors import ExportError
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.targets.litert.flatbuffer import read_tensors, summary
from kquant.targets.litert.runtime import TFLiteModel
from kquant.targets.litert.target import LITERT
from kquant.targets.litert.writer import WriteReport, write_tflite
from kquant.targets.tflm.runtime import MicroModel, arena
from kquant.targets.tflm.target import TFLM
from models import digits_cnn
from tests.support import graphs as g

pytest.importorskip("tflite_micro", reason="tflite-micro is not installed: pip install .[tflm]")
RNG = np.random.default_rng


def changed(integers: Callable[[np.ndarray], np.ndarray]) -> QuantizedGraph:
    """Three layers of 4,000 weights whose integers are changed."""
    graph = g.chain((6, 6, 24), g.conv("a", cin=24, cout=24, shape=(None, 6, 6, 24)),
                    g.conv("bb", cin=24, cout=24, shape=(None, 6, 6, 24)),
                    g.conv("ccc", cin=24, cout=24, shape=(None, 6, 6, 24)))  # fmt: skip
    x = RNG(0).normal(size=(2, 6, 6, 24)).astype(np.float32)
    qgraph = g.quantized(graph, [x])
    made = {name: integers(qgraph.integers[name]) for name in ("a", "bb", "ccc")}
    return QuantizedGraph(graph, qgraph.activations, {k: _wide(q) for k, q in qgraph.weights.items()}, made)


def _wide(q: Grid | None) -> Grid | None:
    return None if q is None else Grid(q.scale, q.zero_point, -127, 127, q.axis)


def files(qgraph: QuantizedGraph) -> tuple[bytes, bytes, WriteReport]:
    plain, _ = write_tflite(qgraph, target=TFLM)
    compressed, report = write_tflite(qgraph, target=TFLM, compress="tflm")
    return plain, compressed, report


def few(q: np.ndarray) -> np.ndarray:
    """Of a bell curve, at its width."""
    return np.rint(q / 40).astype(int)


def signs(q: np.ndarray) -> np.ndarray:
    return np.where(q < 0, -1, 1)


def prune(q: np.ndarray) -> np.ndarray:
    """Every tenth weight, all different from each other."""
    mask = RNG(1).random(q.shape) < 0.1
    return np.where(mask, RNG(2).integers(-127, 128, q.shape), 0)


def per_channel(q: np.ndarray) -> np.ndarray:
    """Four levels in each channel, others in each."""
    levels = RNG(3).integers(-127, 128, (4, q.shape[-1]))
    return np.take_along_axis(levels, (q.reshape(-1, q.shape[-1]) % 4), axis=0).reshape(q.shape)


@pytest.mark.parametrize(
    "integers, how",
    [(few, "Huffman"), (per_channel, "table"), (prune, "pruned"), (signs, "table"),
     (lambda q: RNG(4).integers(-127, 128, q.shape), "plain")],
    ids=["few", "levels of channels", "zeros", "signs", "noise"],
)  # fmt: skip
def test_the_shortest_way_computes_the_same(integers: Callable[[np.ndarray], np.ndarray], how: str) -> None:
    qgraph = changed(integers)
    plain, compressed, report = files(qgraph)
    assert {s.how for s in report.stored} == {how}
    assert (len(compressed) < len(plain)) if how != "plain" else compressed == plain
    x = g.integers(qgraph, [RNG(5).normal(size=(3, 6, 6, 24)).astype(np.float32)])
    np.testing.assert_array_equal(MicroModel(plain).run(x)[0], MicroModel(compressed).run(x)[0])
    np.testing.assert_array_equal(TFLiteModel(plain).run(x)[0], TFLiteModel(compressed).run(x)[0])


def test_equal_statistics_share_one_code() -> None:
    _, compressed, report = files(changed(few))
    described = [t for t in read_tensors(compressed).values() if t.type == "UINT8" and t.data[:2].tolist() == [1, 1]]
    assert len(described) == 1 and [s.how for s in report.stored] == ["Huffman"] * 3
    assert summary(compressed).op_counts == {"CONV_2D": 3, "TFLM_DECODE": 3}


def test_weights_that_are_stored_once_stay_so() -> None:
    """Three layers of equal weights share their bytes: three operators cost more than the table saves."""
    levels = np.resize(np.arange(-20, 20), (3, 3, 24, 24))
    plain, compressed, _ = files(changed(lambda q: levels))
    assert len(plain) < 2 * 24 * 24 * 9
    assert len(compressed) < len(plain)
    assert len({t.data.tobytes() for t in read_tensors(compressed).values() if t.type == "UINT8"}) == 2


def test_the_sizes_in_the_report_explain_the_file() -> None:
    plain, compressed, report = files(changed(per_channel))
    saved = sum(s.plain - s.bytes for s in report.stored)
    assert 0 < saved - (len(plain) - len(compressed)) < 3 * 200  # operators and tensors


def test_the_kernels_write_out_what_is_read_here() -> None:
    """The tensors that DECODE leaves in the arena are those that the reader says the file has."""
    qgraph = changed(few)
    _, compressed, _ = files(qgraph)
    micro = MicroModel(compressed, keep_tensors=True)
    micro.run(g.integers(qgraph, [RNG(5).normal(size=(1, 6, 6, 24)).astype(np.float32)]))
    found, read = micro.tensors(), read_tensors(compressed)
    for name in ("a/kernel", "bb/kernel", "ccc/kernel"):
        assert read[name].unpacked
        np.testing.assert_array_equal(found[name], read[name].data)


def test_the_arena_holds_a_tensor_that_is_written_out() -> None:
    plain, compressed, _ = files(changed(per_channel))
    more = arena(compressed).total - arena(plain).total
    assert 0 < more < 2 * 24 * 24 * 9 + 2000


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["w8a8", "w4a8-kmeans", "w2a8-ternary"])
def test_a_model_verifies(preset: str) -> None:
    digits = digits_cnn.load_split()
    config = {"preset": preset, "target": "tflm", "adaround": False}
    qmodel = kquant.quantize_model(
        keras.saving.load_model(digits_cnn.PATH, compile=False), digits.calibration[:32], config, progress=False
    )
    report = kquant.export_tflite(qmodel, compress="tflm")
    parity = kquant.verify_tflite(qmodel, report.content, digits.x_test[:8], samples=8)
    assert parity.ok, str(parity)
    plain = kquant.export_tflite(qmodel).content
    assert len(report.content) <= len(plain) and ("stored in" in str(report))


def test_other_targets_and_modes_are_refused() -> None:
    qgraph = changed(signs)
    with pytest.raises(ExportError, match="litert has no weights of compress='tflm': it takes compress='densify'"):
        write_tflite(qgraph, target=LITERT, compress="tflm")
    with pytest.raises(ExportError, match="tflm has no weights of compress='zip'"):
        write_tflite(qgraph, target=TFLM, compress="zip")
    with pytest.raises(ExportError, match="mode='float32'"):
        write_tflite(qgraph, target=TFLM, mode="float32", compress="tflm")
