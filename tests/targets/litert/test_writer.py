"""Files written from hand-made graphs, run by LiteRT and compared with the float functions of their nodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kquant.errors import ExportError
from kquant.graph.ir import Graph
from kquant.graph.ops import evaluate
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import dequantize
from kquant.targets.litert.flatbuffer import only_integer_ops, read_tensors, summary
from kquant.targets.litert.writer import write_tflite
from tests.support.graphs import (
    KERNELS,
    chain,
    check_file,
    conv,
    grid,
    integers,
    op,
    quantized,
    rng,
)  # fmt: skip
from tests.support.litert_files import run
from tests.support.operations import GRAPHS, IMAGE, INT8_ONLY, OUT, two

# int16: lookup tables are coarse, and bilinear weights have 10 bits
LSB = {("tanh", 16): 2, ("softmax", 16): 2, ("bilinear", 16): 128, ("bilinear_corner", 16): 128}


NO_REFERENCE_KERNEL = {"elu"}


def _feed(graph: Graph, batch: int = 2) -> list[np.ndarray]:
    return [rng(k).normal(size=(batch, *graph[n].shape[1:])).astype(np.float32) for k, n in enumerate(graph.inputs)]


def _kernels(name: str) -> list[str]:
    return [k for k in KERNELS if k != "reference" or name not in NO_REFERENCE_KERNEL]


# near zero the int16 kernel of rsqrt is far from the function, as its arithmetic in test_kernels.py is
EIGHT_BITS = INT8_ONLY | {"rsqrt"}


@pytest.mark.parametrize(
    ("container", "name"), [(c, name) for c in (8, 16) for name in GRAPHS if c == 8 or name not in EIGHT_BITS]
)
def test_integer_file_computes_the_nodes(name: str, container: int) -> None:
    graph = GRAPHS[name]()
    x = _feed(graph)
    qgraph = quantized(graph, x, bits=container, container=container)
    content, report = write_tflite(qgraph)
    assert only_integer_ops(content)
    assert report.float_nodes == {} and report.total_bytes == len(content)
    for kernels in _kernels(name):
        check_file(content, qgraph, integers(qgraph, x), kernels, LSB.get((name, container), 1))


@pytest.mark.parametrize("name", GRAPHS)
def test_float32_file_equals_the_graph(name: str) -> None:
    graph = GRAPHS[name]()
    x = _feed(graph, batch=3)
    content, _ = write_tflite(quantized(graph, x), mode="float32")
    out = graph.outputs[0]
    want = np.asarray(evaluate(graph, x)[0])
    for kernels in _kernels(name):
        np.testing.assert_allclose(run(content, x, KERNELS[kernels])[out], want, atol=1e-5, rtol=1e-5)


def test_elu_has_no_reference_kernel_yet() -> None:
    """Remove the exception above when this fails."""
    graph = GRAPHS["elu"]()
    content, _ = write_tflite(quantized(graph, _feed(graph)))
    with pytest.raises(ValueError, match="ELU"):
        run(content, integers(quantized(graph, _feed(graph)), _feed(graph)), KERNELS["reference"])


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize(
    "name", ["conv", "conv_relu", "conv_relu6", "add", "mean", "concat", "relu", "clip", "max_pool_same"]
)
def test_small_activations_stay_on_their_grid(name: str, bits: int) -> None:
    graph = GRAPHS[name]()
    x = _feed(graph)
    qgraph = quantized(graph, x, bits=bits)
    content, _ = write_tflite(qgraph)
    wild = [rng(3).integers(-128, 128, v.shape).astype(np.int8) for v in x]  # inputs beyond their grid, too
    for kernels in ("builtin", "reference"):
        tensors = check_file(content, qgraph, wild, kernels)
        q = qgraph.activations["x"]
        np.testing.assert_array_equal(tensors["x"], np.clip(wild[0], q.qmin, q.qmax))


def test_inputs_with_the_whole_container_are_fed_directly() -> None:
    graph = GRAPHS["conv_relu"]()
    content, report = write_tflite(quantized(graph, _feed(graph)))
    assert report.op_counts == {"CONV_2D": 1} and list(summary(content).inputs) == ["x"]


def _two_layers() -> Graph:
    return chain(IMAGE, conv(shape=OUT, clip=(0.0, None)), op("mean", (4,), axes=(1, 2), keepdims=False))


@pytest.mark.parametrize("container", [8, 16])
@pytest.mark.parametrize("output_type", [None, "int8", "uint8", "int16", "float32"])
@pytest.mark.parametrize("input_type", [None, "int8", "uint8", "int16", "float32"])
def test_types_of_inputs_and_outputs(input_type: str | None, output_type: str | None, container: int) -> None:
    graph = _two_layers()
    x = _feed(graph)
    qgraph = quantized(graph, x, bits=container, container=container)
    content, _ = write_tflite(qgraph, input_type=input_type, output_type=output_type)
    found, native = summary(content), f"INT{container}"
    ((source, (in_type, _)),), ((result, (out_type, _)),) = found.inputs.items(), found.outputs.items()
    assert in_type == (input_type or native).upper() and out_type == (output_type or native).upper()
    assert only_integer_ops(content)
    tensors = read_tensors(content)
    given, taken = tensors[source], tensors[result]
    fed = x[0]
    if in_type != "FLOAT32":
        limits = np.iinfo(given.dtype)
        fed = np.clip(np.rint(x[0] / given.s) + given.z, limits.min, limits.max).astype(given.dtype)
    want = np.asarray(evaluate(graph, x)[0])
    for kernels in KERNELS.values():
        y = run(content, [fed], kernels)[result].astype(np.float32)
        y = y if out_type == "FLOAT32" else (y - taken.z) * taken.s
        np.testing.assert_allclose(y, want, atol=0.03 * np.abs(want).max() + 0.01)


def test_uint8_is_the_int8_file_moved_by_128() -> None:
    graph = _two_layers()
    x = _feed(graph)
    qgraph = quantized(graph, x)
    plain, moved = (write_tflite(qgraph, input_type=t, output_type=t)[0] for t in ("int8", "uint8"))
    stored = integers(qgraph, x)[0]
    for kernels in KERNELS.values():
        want = run(plain, [stored], kernels)["mean"]
        found = run(moved, [(stored.astype(np.int16) + 128).astype(np.uint8)], kernels)["mean/output"]
        np.testing.assert_array_equal(found, want.astype(np.int16) + 128)


@pytest.mark.parametrize(
    "name", ["conv", "dense", "transposed_same", "affine_rank3", "reshape", "slice", "mean", "pad"]
)
def test_batch_can_be_resized_or_fixed(name: str) -> None:
    graph = GRAPHS[name]()
    qgraph = quantized(graph, _feed(graph))
    dynamic, fixed = write_tflite(qgraph)[0], write_tflite(qgraph, batch=3)[0]
    assert summary(dynamic).inputs["x"][1][0] == 1 and summary(fixed).inputs["x"][1][0] == 3
    stored = integers(qgraph, _feed(graph, batch=3))
    out = graph.outputs[0]
    for kernels in KERNELS.values():
        rows = [run(dynamic, [s[k : k + 1] for s in stored], kernels)[out] for k in range(3)]
        for content in (dynamic, fixed):
            # XNNPACK takes a transposed convolution of a fixed shape only, and rounds otherwise than the builtin kernel
            np.testing.assert_allclose(
                run(content, stored, kernels)[out], np.concatenate(rows), atol=name == "transposed_same"
            )


def test_transposed_convolution_of_a_fixed_batch_needs_no_shape_arithmetic() -> None:
    graph = GRAPHS["transposed_same"]()
    qgraph = quantized(graph, _feed(graph))
    assert "SHAPE" in write_tflite(qgraph)[1].op_counts
    assert "SHAPE" not in write_tflite(qgraph, batch=1)[1].op_counts


def test_signature_has_the_names_of_the_user() -> None:
    from ai_edge_litert.interpreter import Interpreter

    graph = two("add")
    content, _ = write_tflite(quantized(graph, _feed(graph)))
    runner = Interpreter(model_content=content).get_signature_runner("serving_default")
    assert set(runner.get_input_details()) == {"user_x", "user_y"} and set(runner.get_output_details()) == {"scores"}


def test_several_outputs_may_repeat_a_tensor() -> None:
    from ai_edge_litert.interpreter import Interpreter

    base = _two_layers()
    graph = replace(base, outputs=("mean", "conv", "mean"), output_names=("a", "b", "a"))
    x = _feed(graph)
    content, _ = write_tflite(quantized(graph, x), output_type="float32", input_type="float32")
    runner = Interpreter(model_content=content).get_signature_runner()
    found = runner(user_x=x[0][:1])
    np.testing.assert_array_equal(found["a"], found["a_1"])
    assert found["b"].shape == (1, 6, 7, 4)


@pytest.mark.parametrize(("source", "result"), [(8, 8), (8, 16), (16, 8), (16, 16)])
def test_requantize_between_containers(source: int, result: int) -> None:
    graph = chain(IMAGE, op("requantize", IMAGE))
    grids = {"x": grid(-3.0, 4.0, source, source), "requantize": grid(-2.0, 3.5, result, result)}
    qgraph = QuantizedGraph(graph, grids, {})
    content, report = write_tflite(qgraph)
    assert report.op_counts == {"QUANTIZE": 1}
    for kernels in KERNELS:
        check_file(content, qgraph, integers(qgraph, _feed(graph)), kernels)


def test_float_node_between_integer_nodes() -> None:
    graph = chain(
        IMAGE, conv(shape=OUT), op("elu", OUT[1:]), op("requantize", OUT[1:]), op("leaky_relu", OUT[1:], alpha=0.5),
        op("sub", OUT[1:], inputs=("leaky_relu", "conv"), name="sub"),
    )  # fmt: skip
    x = _feed(graph)
    qgraph = quantized(graph, x, floats=frozenset({"elu"}))
    content, report = write_tflite(qgraph, float_reasons={"elu": "asked for"})
    assert report.float_nodes == {"elu": "asked for"} and report.op_counts["DEQUANTIZE"] == 1
    check_file(content, qgraph, integers(qgraph, x))


def test_an_integer_tensor_is_dequantized_once() -> None:
    graph = chain(IMAGE, op("leaky_relu", IMAGE, alpha=0.5), op("logistic", IMAGE, inputs=("leaky_relu",)),
                  op("tanh", IMAGE, inputs=("leaky_relu",)), op("add", IMAGE, inputs=("logistic", "tanh")))  # fmt: skip
    x = _feed(graph)
    qgraph = quantized(graph, x, floats=frozenset({"logistic", "tanh", "add"}))
    content, report = write_tflite(qgraph)
    assert report.op_counts["DEQUANTIZE"] == 1
    tensors = run(content, integers(qgraph, x))
    value = dequantize(tensors["leaky_relu"], qgraph.activations["leaky_relu"])
    want = 1 / (1 + np.exp(-value)) + np.tanh(value)
    np.testing.assert_allclose(tensors["add"], want, atol=1e-5)


def test_report_counts_bytes_and_operators() -> None:
    graph = _two_layers()
    content, report = write_tflite(quantized(graph, _feed(graph)))
    row = report.rows[0]
    assert (row.node, row.operators, row.dtype, row.weights) == ("conv", ("CONV_2D",), "INT8", "INT8")
    assert row.bytes == 3 * 3 * 3 * 4 + 4 * 4
    assert report.op_counts == dict(summary(content).op_counts)


@pytest.mark.parametrize("changes", [{"mode": "int8"}, {"input_type": "int4"}, {"output_type": "uint16"}])
def test_unknown_options_are_refused(changes: dict[str, str]) -> None:
    graph = GRAPHS["conv"]()
    with pytest.raises(ExportError, match="Unknown .*known are"):
        write_tflite(quantized(graph, _feed(graph)), **changes)


def test_float_ends_have_no_integer_type() -> None:
    graph = GRAPHS["conv"]()
    qgraph = quantized(graph, _feed(graph))
    with pytest.raises(ExportError, match="'x' is float.*input_type='int8'"):
        write_tflite(qgraph, mode="float32", input_type="int8")
    with pytest.raises(ExportError, match="'conv' is float.*output_type='uint8'"):
        write_tflite(qgraph, mode="float32", output_type="uint8")


def test_an_input_may_be_an_output() -> None:
    base = GRAPHS["conv"]()
    graph = replace(base, outputs=("conv", "x"), output_names=("y", "same"))
    x = _feed(graph)
    qgraph = quantized(graph, x)
    stored = integers(qgraph, x)
    for kernels in KERNELS.values():
        np.testing.assert_array_equal(run(write_tflite(qgraph)[0], stored, kernels)["x"], stored[0])
