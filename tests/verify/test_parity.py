"""The parity report: it holds on a right file, and every planted fault is found by the check that should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf

from kquant.errors import CalibrationError, ExportError
from kquant.graph.quantized import QuantizedGraph
from kquant.keras.model import QuantizedModel, insert
from kquant.targets.litert.target import LITERT
from kquant.targets.litert.writer import write_tflite
from kquant.targets.target import register_target
from kquant.verify.end_to_end import same_decision
from kquant.verify.parity import ParityReport, TensorParity, verify_tflite
from tests.support.faults import build, swapped_depthwise, with_node, with_scale
from tests.support.toy import asked, toy_data


def verify(model: QuantizedModel, qgraph: QuantizedGraph) -> ParityReport:
    """The report on the file of a (tampered) graph."""
    content, _ = write_tflite(qgraph, target=model.target)
    return verify_tflite(model, content, toy_data(40, seed=9))


@pytest.fixture(scope="module")
def toy() -> tuple[QuantizedModel, QuantizedGraph]:
    return build()


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a4", "w8a16"])
def test_parity_holds_on_the_exported_file(name: str) -> None:
    report = verify(*build(name))
    assert report.ok, report
    assert report.structure == () and report.reference_max_lsb == 0 and report.op_by_op_max_lsb <= 1
    assert [e.equal for e in report.end_to_end] == [1.0]
    assert report.kernels == "reference"  # int4 depthwise included
    named = {t.name: t for t in report.tensors if t.op}
    assert {"c1", "dw", "add", "cat", "pool", "mean", "fc", "sm", "dw/requantize"} <= set(named)
    assert named["c1"].elements == 2 * 8 * 8 * 8 and named["c1"].simulation_equal > 0.99
    assert "parity holds" in str(report) and f"{report.bytes:,} bytes" in str(report)


def swapped_channels(q: QuantizedGraph) -> QuantizedGraph:
    return with_node(q, "c1", lambda n: n.with_weights(kernel=n.weights["kernel"][..., [1, 0, 2, 3, 4, 5, 6, 7]]))


def transposed_kernel(q: QuantizedGraph) -> QuantizedGraph:
    return with_node(q, "c1", lambda n: n.with_weights(kernel=n.weights["kernel"].transpose(1, 0, 2, 3)))


def wrong_bias(q: QuantizedGraph) -> QuantizedGraph:
    return with_node(q, "fc", lambda n: n.with_weights(bias=n.weights["bias"] + np.float32(0.1)))


def wrong_scale(q: QuantizedGraph) -> QuantizedGraph:
    return replace(q, activations=with_scale(dict(q.activations), ["dw"], 1.03))


def wrong_weight_scale(q: QuantizedGraph) -> QuantizedGraph:
    stretched = with_node(q, "c1", lambda n: n.with_weights(kernel=n.weights["kernel"] * np.float32(1.1)))
    return replace(stretched, weights=with_scale(dict(q.weights), ["c1"], 1.1))  # the same integers


def wrong_zero_point(q: QuantizedGraph) -> QuantizedGraph:
    fc = q.activations["fc"]
    assert fc is not None
    return replace(q, activations={**q.activations, "fc": replace(fc, zero_point=fc.zero_point + np.int32(1))})


def wrong_op(q: QuantizedGraph) -> QuantizedGraph:
    return with_node(q, "add", lambda n: n.with_(op="sub"))


def other_pool(q: QuantizedGraph) -> QuantizedGraph:
    return with_node(q, "pool", lambda n: n.with_(op="max_pool2d"))


def swapped_inputs(q: QuantizedGraph) -> QuantizedGraph:
    return with_node(q, "cat", lambda n: n.with_(inputs=n.inputs[::-1]))


def without_activation(q: QuantizedGraph) -> QuantizedGraph:
    # an activation grid that starts at zero would clamp all the same, so its grid moves too
    return with_node(q, "dw", lambda n: n.with_attrs(clip=[0.0, 1.0]))


IN_STRUCTURE = [swapped_channels, swapped_depthwise, transposed_kernel, wrong_bias, wrong_scale, wrong_weight_scale, wrong_zero_point]  # fmt: skip # noqa: E501
OP_BY_OP = {
    swapped_channels: "c1",
    swapped_depthwise: "dw",
    transposed_kernel: "c1",
    wrong_bias: "fc",
    wrong_weight_scale: "c1",
    wrong_op: "add",
    other_pool: "pool",
    swapped_inputs: "cat",
    without_activation: "dw",
}


@pytest.mark.parametrize("fault", IN_STRUCTURE, ids=lambda f: f.__name__)
def test_a_file_with_other_integers_or_grids_fails_in_structure(toy, fault) -> None:  # type: ignore[no-untyped-def]
    model, qgraph = toy
    report = verify(model, fault(qgraph))
    assert report.structure and not report.ok
    assert "FAILS" in str(report) and report.structure[0] in str(report)


@pytest.mark.parametrize("fault", OP_BY_OP, ids=lambda f: f.__name__)
def test_an_operation_that_computes_something_else_is_named(toy, fault) -> None:  # type: ignore[no-untyped-def]
    model, qgraph = toy
    report = verify(model, fault(qgraph))
    assert report.op_by_op_max_lsb > 1 and not report.ok
    assert report.reference_max_lsb == 0  # the file itself is computed rightly
    assert [t.name for t in report.tensors if t.simulation_max > 1] == [OP_BY_OP[fault]]


def test_a_single_wrong_integer_of_a_bias_is_found(toy) -> None:  # type: ignore[no-untyped-def]
    model, qgraph = toy
    x, w = qgraph.activations["mean"], qgraph.weights["fc"]
    assert x is not None and w is not None
    step = np.eye(5, dtype=np.float32)[2] * x.scale * w.scale
    report = verify(model, with_node(qgraph, "fc", lambda n: n.with_weights(bias=n.weights["bias"] + step)))
    assert report.structure == ("'fc/bias' differs from the plan",)


def with_add(name: str, qgraph: QuantizedGraph, **changes: object) -> QuantizedModel:
    """The model for a target whose addition differs from LiteRT's."""
    add = replace(LITERT.kernels["add"], **changes)
    register_target(replace(LITERT, name=name, kernels={**LITERT.kernels, "add": add}))
    return insert(qgraph, asked(name))


def test_a_writer_that_miswires_fails_in_float_too(toy) -> None:  # type: ignore[no-untyped-def]
    _, qgraph = toy

    def subtracts(e, node, x, out) -> None:  # type: ignore[no-untyped-def]
        e.op("SUB", x, [out.tensor], fusedActivationFunction=out.activation, potScaleInt16=False)

    report = verify(with_add("miswired", qgraph, write=subtracts), qgraph)
    assert report.float_error > 1e-2 and not report.ok
    assert report.structure == () and report.reference_max_lsb == 0


def test_a_wrong_simulation_is_found(toy) -> None:  # type: ignore[no-untyped-def]
    _, qgraph = toy
    right = LITERT.kernels["add"].arithmetic[8]
    wrong = with_add("wrong", qgraph, arithmetic={8: lambda call: right(call) + tf.constant(2.0)})
    report = verify(wrong, qgraph)
    assert [t.name for t in report.tensors if t.simulation_max > 1] == ["add"]
    assert not report.ok and report.structure == () and report.float_error < 1e-5


def test_a_model_that_changed_after_its_export_is_found() -> None:
    model, qgraph = build()
    content, _ = write_tflite(qgraph)
    layer = model.get_layer("fc")
    for variable in (layer.integers, layer.variables_by_name["bias"]):
        variable.assign(-variable)
    report = verify_tflite(model, content, toy_data(40))
    assert not report.ok and report.agreement < 0.9
    assert report.structure == ("'fc/kernel' differs from the plan", "'fc/bias' differs from the plan")


def test_a_missing_tensor_is_named(toy) -> None:  # type: ignore[no-untyped-def]
    model, qgraph = toy
    renamed = {"pool": "other"}
    graph = qgraph.graph
    nodes = [
        n.with_(name=renamed.get(n.name, n.name), inputs=tuple(renamed.get(i, i) for i in n.inputs)) for n in graph
    ]
    activations = {renamed.get(k, k): q for k, q in qgraph.activations.items()}
    report = verify(model, QuantizedGraph(graph.rebuild(nodes), activations, qgraph.weights))
    assert report.structure == ("'pool' is not in the file",) and not report.ok


def test_how_much_data_is_compared(toy) -> None:  # type: ignore[no-untyped-def]
    model, qgraph = toy
    content, _ = write_tflite(qgraph)
    report = verify_tflite(model, content, toy_data(40), samples=21, batch_size=8, tensor_samples=3)
    assert [e.samples for e in report.end_to_end] == [21]
    assert next(t for t in report.tensors if t.name == "sm").elements == 3 * 5
    with pytest.raises(CalibrationError):
        verify_tflite(model, content, toy_data(0))
    with pytest.raises(ExportError):
        verify_tflite(model, content[:200], toy_data(4))


def row(op: str, reference: float, unequal: int, elements: int = 10_000, simulation: float = 0) -> TensorParity:
    return TensorParity("t", op, "int8", elements, reference, unequal, simulation, 1.0)


@pytest.mark.parametrize(
    "tensor, ok",
    [
        (row("conv2d", 0, 0), True),
        (row("conv2d", 1, 1), False),  # the reference has no tolerance
        (row("conv2d", 0, 0, simulation=1), True),
        (row("conv2d", 0, 0, simulation=2), False),
        (row("softmax", 1, 1), True),  # but for softmax: 1 LSB in 10,000
        (row("softmax", 1, 2), False),
        (row("softmax", 2, 1), False),
    ],
)
def test_what_the_contract_tolerates(tensor: TensorParity, ok: bool) -> None:
    assert ParityReport((), 0.0, (tensor,), (), "reference").ok is ok


def test_same_decision_counts_ties_as_agreement() -> None:
    reference = np.float32([[0, 3, 3], [1, 0, 0], [2, 2, 2], [0, 1, 2]])
    ours = np.float32([[0, 1, 2], [0, 0, 1], [9, 0, 0], [0, 0, 5]])
    assert same_decision(ours, reference) == 0.75  # in row 1 class 2 is none of the largest
    assert same_decision(reference, reference) == 1.0
    assert same_decision(ours.reshape(2, 2, 3), reference.reshape(2, 2, 3)) == 0.75  # per position
