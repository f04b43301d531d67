"""Sparse weights in front of DENSIFY: shorter, and the same on all of LiteRT's kernels."""

from __future__ import annotations

import numpy as np
import pytest

from kquant.errors import ExportError
from kquant.graph.quantized import QuantizedGraph
from kquant.targets.ethos_u.target import ETHOS_U
from kquant.targets.litert.flatbuffer import read_tensors, summary
from kquant.targets.litert.reference.interpreter import IntegerReference
from kquant.targets.litert.runtime import TFLiteModel
from kquant.targets.litert.writer import write_tflite
from tests.support import graphs as g


def pruned(zeros: float) -> QuantizedGraph:
    """A convolution, a 1x1 convolution and a dense layer without some of their weights."""
    graph = g.chain((6, 6, 16), g.conv("a", cin=16, cout=32, shape=(None, 6, 6, 32)),
                    g.conv("point", cin=32, cout=96, size=1, shape=(None, 6, 6, 96)),
                    g.conv("last", cin=96, cout=8, shape=(None, 6, 6, 8)))  # fmt: skip
    qgraph = g.quantized(graph, [np.random.default_rng(0).normal(size=(2, 6, 6, 16)).astype(np.float32)])
    mask = {name: np.random.default_rng(1).random(q.shape) >= zeros for name, q in qgraph.integers.items()}
    made = {name: (q * mask[name]).astype(np.int8) for name, q in qgraph.integers.items()}
    return QuantizedGraph(graph, qgraph.activations, qgraph.weights, made)


@pytest.mark.parametrize("kernels", ["default", "builtin", "reference"])
def test_the_file_is_shorter_and_computes_the_same(kernels: str) -> None:
    qgraph = pruned(0.8)
    plain, _ = write_tflite(qgraph)
    sparse, report = write_tflite(qgraph, compress="densify")
    assert [s.how for s in report.stored] == ["sparse"] * 3 and len(sparse) < 0.65 * len(plain)
    x = g.integers(qgraph, [np.random.default_rng(5).normal(size=(4, 6, 6, 16)).astype(np.float32)])
    np.testing.assert_array_equal(TFLiteModel(plain, kernels).run(x)[0], TFLiteModel(sparse, kernels).run(x)[0])


def test_dense_weights_stay_as_they_are() -> None:
    qgraph = pruned(0.1)
    content, report = write_tflite(qgraph, compress="densify")
    assert {s.how for s in report.stored} == {"plain"} and content == write_tflite(qgraph)[0]


def test_the_file_is_read_as_the_plain_one() -> None:
    qgraph = pruned(0.8)
    plain, sparse = write_tflite(qgraph)[0], write_tflite(qgraph, compress="densify")[0]
    first, second = read_tensors(plain), read_tensors(sparse)
    for name in ("a/kernel", "point/kernel", "last/kernel"):
        assert second[name].unpacked and not first[name].unpacked
        np.testing.assert_array_equal(first[name].data, second[name].data)
    assert summary(sparse).op_counts == {"CONV_2D": 3, "DENSIFY": 3}
    x = g.integers(qgraph, [np.ones((1, 6, 6, 16), np.float32)])
    made, expected = IntegerReference(sparse).run(x), IntegerReference(plain).run(x)
    np.testing.assert_array_equal(made["last"], expected["last"])


def test_ethos_u_has_no_other_way_of_storing() -> None:
    with pytest.raises(ExportError, match="ethos_u has no weights of compress='densify': it takes weights as they are"):
        write_tflite(pruned(0.8), target=ETHOS_U, compress="densify")
