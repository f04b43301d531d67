"""Whatever would be silently wrong is refused, with the node, what was found and the remedy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kquant.errors import ExportError
from kquant.graph.ir import Graph, Node
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.targets.litert.writer import write_tflite
from tests.support.graphs import chain, conv, dense, grid, op, quantized, rng

SHAPE = (4, 4, 3)
A, B = grid(-1.0, 2.0), grid(-3.0, 2.0)
WIDE = grid(-1.0, 2.0, 16, 16)


def refused(graph: Graph, grids: dict[str, Grid | None], match: str) -> None:
    with pytest.raises(ExportError, match=match):
        write_tflite(QuantizedGraph(graph, grids, {}))


TIED = {
    "reshape": {"shape": (16, 3)},
    "transpose": {"shape": (3, 4, 4), "perm": (0, 3, 1, 2)},
    "slice": {"shape": (2, 4, 3), "begin": (0, 0, 0, 0), "end": (None, 2, 4, 3), "strides": (1, 1, 1, 1)},
    "pad": {"shape": (6, 4, 3), "paddings": ((0, 0), (1, 1), (0, 0), (0, 0)), "mode": "constant"},
    "max_pool2d": {"shape": (2, 2, 3), "pool_size": (2, 2), "strides": (2, 2), "padding": "valid"},
    "avg_pool2d": {"shape": (2, 2, 3), "pool_size": (2, 2), "strides": (2, 2), "padding": "valid"},
    "resize": {"shape": (8, 8, 3), "size": (8, 8), "method": "nearest", "half_pixel_centers": True},
    "reduce_max": {"shape": (3,), "axes": (1, 2), "keepdims": False},
}


@pytest.mark.parametrize("kind", TIED)
def test_operations_that_move_values_need_one_grid(kind: str) -> None:
    attrs = dict(TIED[kind])
    graph = chain(SHAPE, op(kind, attrs.pop("shape"), **attrs))
    write_tflite(QuantizedGraph(graph, {"x": A, kind: A}, {}))
    refused(graph, {"x": A, kind: B}, f"'{kind}': {kind} needs the same grid.*requantize")


@pytest.mark.parametrize("kind", ["concat", "maximum", "minimum"])
def test_operands_need_the_grid_of_the_output(kind: str) -> None:
    shape, attrs = ((4, 4, 6), {"axis": 3}) if kind == "concat" else (SHAPE, {})
    graph = chain(SHAPE, op(kind, shape, inputs=("x", "y"), **attrs))
    write_tflite(QuantizedGraph(graph, {"x": A, "y": A, kind: A}, {}))
    refused(graph, {"x": A, "y": B, kind: A}, f"'{kind}': {kind} needs the same grid.*'y'")


@pytest.mark.parametrize("kind", ["softmax", "logistic", "tanh"])
@pytest.mark.parametrize("q", [A, WIDE])
def test_fixed_outputs(kind: str, q: Grid) -> None:
    refused(
        chain(SHAPE, op(kind, SHAPE)), {"x": q, kind: q}, f"'{kind}': the kernel of {kind} writes on scale .*requantize"
    )


@pytest.mark.parametrize("kind", ["gelu", "elu", "hard_swish"])
def test_no_int16_kernel(kind: str) -> None:
    graph = chain(SHAPE, op(kind, SHAPE, approximate=False))
    refused(graph, {"x": WIDE, kind: WIDE}, f"'{kind}': {kind} has no kernel for int16.*8 bits")


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("node", [dense(cin=3, cout=2, shape=(None, 4, 4, 2)), conv(shape=(None, 4, 4, 4))])
def test_weights_with_a_zero_point(node: Node, per_channel: bool) -> None:
    graph = chain(SHAPE, node)
    qgraph = quantized(graph, [rng().normal(size=(1, *SHAPE)).astype(np.float32)], per_channel=per_channel)
    w = qgraph.weights[node.name]
    zero_point = np.asarray(3 * (w.scale == np.ravel(w.scale)[-1]), np.int32)  # on one channel
    with pytest.raises(ExportError, match=f"'{node.name}': weights with zero point 3.*symmetric=True"):
        write_tflite(replace(qgraph, weights={node.name: replace(w, zero_point=zero_point)}))


def test_int16_with_a_zero_point() -> None:
    q = Grid(np.float32(1e-3), np.int32(5), -32767, 32767)
    refused(
        chain(SHAPE, op("leaky_relu", SHAPE, alpha=0.1)), {"x": WIDE, "leaky_relu": q}, "int16.*zero point 0, found 5"
    )
    refused(chain(SHAPE, op("leaky_relu", SHAPE, alpha=0.1)), {"x": q, "leaky_relu": WIDE}, "'x': int16.*zero point 0")


def test_mixed_containers() -> None:
    graph = chain(SHAPE, op("add", SHAPE, inputs=("x", "y")))
    refused(graph, {"x": A, "y": WIDE, "add": A}, "'add' makes int8 but reads int16 from 'y'.*requantize")
    refused(graph, {"x": A, "y": A, "add": WIDE}, "'add' makes int16 but reads int8 from 'x'.*requantize")


def test_integer_operation_on_a_float_tensor() -> None:
    graph = chain(SHAPE, op("add", SHAPE, inputs=("x", "y")))
    refused(graph, {"x": A, "y": None, "add": A}, "'add' runs in integers but reads 'y', which is float")


@pytest.mark.parametrize("scale", [0.0, np.inf, np.nan, -1.0])
def test_scales_that_are_no_scales(scale: float) -> None:
    q = Grid(np.float32(scale), np.int32(0), -128, 127)
    refused(
        chain(SHAPE, op("leaky_relu", SHAPE, alpha=0.1)), {"x": A, "leaky_relu": q}, "'leaky_relu': scale .*calibrate"
    )


def test_grids_that_no_activation_tensor_holds() -> None:
    graph = chain(SHAPE, op("leaky_relu", SHAPE, alpha=0.1))
    several = Grid(np.float32([1, 2, 3]), np.int32([0, 0, 0]), -128, 127, 3)
    refused(graph, {"x": A, "leaky_relu": several}, "'leaky_relu': an activation needs one scale, found 3")
    outside = Grid(np.float32(1), np.int32(9), -8, 7)
    refused(graph, {"x": A, "leaky_relu": outside}, r"'leaky_relu': zero point 9 on \[-8, 7\]")
    refused(graph, {"x": A, "leaky_relu": Grid(np.float32(1), np.int32(0), -70000, 70000)}, "does not fit 16 bits")


def test_operations_and_shapes_that_cannot_be_written() -> None:
    refused(
        chain(SHAPE, op("erf", SHAPE)),
        {"x": A, "erf": None},
        "'erf': litert has no operator for 'erf'.*another target",
    )
    graph = chain((None, 4, 3), op("leaky_relu", (None, 4, 3), alpha=0.1))
    refused(graph, {"x": A, "leaky_relu": A}, "'x': TFLite needs fixed sizes.*fixed input shape")
    deep = (2, 2, 2, 2, 2)
    sliced = op("slice", deep, begin=(0,) * 6, end=(None,) * 6, strides=(1,) * 6)
    refused(chain(deep, sliced), {"x": A, "slice": A}, "'slice': slice takes at most 5 axes, found 6")


@pytest.mark.parametrize("first, second, out", [(A, A, WIDE), (WIDE, A, WIDE), (A, WIDE, A), (WIDE, WIDE, A)])
def test_products_of_mixed_containers_are_refused(first: Grid, second: Grid, out: Grid) -> None:
    """int8 times int8 to int16 corrupts the heap of the runtime."""
    graph = chain((3, 3), op("batch_matmul", (3, 3), inputs=("x", "y")))
    refused(graph, {"x": first, "y": second, "batch_matmul": out}, "'batch_matmul' makes int.*requantize")


@pytest.mark.parametrize("kind", ["add", "sub"])
@pytest.mark.parametrize("bits, factor", [(8, 2.0**19), (16, 2.0**14)])
def test_sums_that_are_much_finer_than_an_operand(kind: str, bits: int, factor: float) -> None:
    """LiteRT aborts the process in an addition, and computes garbage in a subtraction."""
    half = 2 ** (bits - 1) - 1
    coarse, fine = (Grid(np.float32(s), np.int32(0), -half, half) for s in (1.0, 1.0 / factor))
    graph = chain(SHAPE, op(kind, SHAPE, inputs=("x", "y")))
    refused(
        graph, {"x": fine, "y": coarse, kind: fine}, f"'{kind}': the kernels of {kind} cannot take 'y'.*wider range"
    )
    write_tflite(QuantizedGraph(graph, {"x": fine, "y": coarse, kind: replace(fine, scale=np.float32(2 / factor))}, {}))
