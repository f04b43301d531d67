"""What the simulation computes against LiteRT's default kernels, operation by operation."""

from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.ops import compute
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.keras.model import insert
from kquant.quantize.calibrate import place
from kquant.targets.litert.elementwise import move, real
from kquant.targets.litert.kernels import KERNELS, REFERENCE_KERNELS
from kquant.targets.litert.reference.interpreter import IntegerReference
from kquant.targets.litert.runtime import TFLiteModel
from kquant.targets.litert.target import LITERT
from kquant.targets.litert.writer import write_tflite
from kquant.targets.operand import Call, Operand
from kquant.targets.target import register_target
from tests.support.graphs import chain, conv, dense, depthwise, integers, op, quantized, rng
from tests.support.operations import GRAPHS, INT8_ONLY, LINEAR
from tests.support.toy import asked

MOVES = {"reshape", "transpose", "slice", "pad", "pad_value", "pad_reflect", "pad_symmetric", "nearest_corner"}
MOVES |= {"gather", "gather_channels", "top_k", "reduce_min"}
CASES = [(name, c) for name in GRAPHS for c in (8, 16) if c == 8 or name not in INT8_ONLY]


def feeds(graph, samples=24):
    """Inputs, a few of them outside the range of the grids."""
    return [rng(k).normal(size=(samples, *graph[n].shape[1:])).astype(np.float32) for k, n in enumerate(graph.inputs)]


def quantized_on(graph, x, **settings):
    return quantized(graph, [v[:4] for v in x], **settings)


def check(qgraph: QuantizedGraph, x, container: int):
    """The simulation's integers are those of the file under the default kernels."""
    content, _ = write_tflite(qgraph)
    found = TFLiteModel(content).run(integers(qgraph, x))[0].astype(np.int64)
    q = qgraph.activations[qgraph.graph.outputs[0]]
    y = np.asarray(insert(qgraph, asked("litert"))(x if len(x) > 1 else x[0]))
    ours = np.rint(y / q.scale).astype(np.int64) + q.zero_point
    # an int16 kernel saturates at -32768, which is no integer of the symmetric grid
    found = np.maximum(found, -32767) if container == 16 else found
    assert len(np.unique(found)) > 2  # not all saturated
    np.testing.assert_array_equal(ours, found)


def with_ties(q: QuantizedGraph) -> QuantizedGraph:
    """The graph on the nearest grids with powers of two for scales, where many values are ties."""

    def near(g: Grid | None) -> Grid | None:
        return g and replace(g, scale=np.exp2(np.rint(np.log2(g.scale))).astype(np.float32))

    return QuantizedGraph(q.graph, *({k: near(g) for k, g in grids.items()} for grids in (q.activations, q.weights)))


@pytest.mark.parametrize("name, container", CASES)
def test_equals_the_default_kernels(name, container):
    graph = GRAPHS[name]()
    x = feeds(graph)
    check(quantized_on(graph, x, bits=container, container=container), x, container)


@pytest.mark.parametrize("name, container", [c for c in CASES if c[0] not in MOVES])
def test_ties_are_rounded_as_the_kernels_do(name, container):
    graph = GRAPHS[name]()
    x = feeds(graph)
    q = quantized_on(graph, x, bits=container, container=container)
    check(with_ties(q), x, container)


def _transposed_11():
    weights = {"kernel": rng(3).normal(size=(2, 2, 11, 3)).astype(np.float32), "bias": np.zeros(11, np.float32)}
    attrs = {"strides": (2, 2), "padding": "same"}
    shape = (None, 10, 10, 11)
    return chain((5, 5, 3), Node(name="up", op="conv2d_transpose", shape=shape, attrs=attrs, weights=weights))


LINEAR = {
    **LINEAR,
    "transposed_11": _transposed_11,
    "depthwise_11": lambda: chain((5, 5, 11), depthwise(c=11, shape=(None, 5, 5, 11))),
    "conv_32": lambda: chain((5, 5, 32), conv(cin=32, cout=9, shape=(None, 5, 5, 9))),
    "dense_12": lambda: chain((12,), dense(cin=12, cout=5)),
    "dense_14": lambda: chain((14,), dense(cin=14, cout=5)),
}


SETTINGS = [(4, 8, True), (2, 8, True), (4, 16, True)]  # bits of weights, container, ties


@pytest.mark.parametrize("weight_bits, container, ties", SETTINGS)
@pytest.mark.parametrize("name", LINEAR)
def test_packed_weights(name, weight_bits, container, ties):
    graph = LINEAR[name]()
    x = feeds(graph)
    bits = {"bits": container, "container": container, "weight_bits": weight_bits}
    q = quantized_on(graph, x, **bits, per_channel=weight_bits > 2)
    check(with_ties(q) if ties else q, x, container)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", ["conv_relu6", "depthwise", "dense", "add_relu", "mul", "mean", "concat", "clip"])
def test_small_activations_at_the_edge_of_the_container(name, bits):
    graph = GRAPHS[name]()
    x = feeds(graph)
    q = quantized_on(graph, x, bits=bits)
    check(replace(q, activations={k: place(v) for k, v in q.activations.items()}), x, 8)


def wide(scale) -> Grid:
    return Grid(np.float32(scale), np.int32(0), -32767, 32767)


# 3.07...e-5 times 3 * 2^12 rounds up in float32
SCALES = [2.0**e * f for e in (-12, -11) for f in (0.999, 1.001)] + [3.0731159e-05, *rng(8).uniform(1e-5, 1e-3, 8)]


def curve_of_16_bits(kind, scale):
    graph = chain((500,), op(kind, (500,)))
    x = [(rng(1).integers(-32767, 32768, (8, 500)) * np.float32(scale)).astype(np.float32)]
    return QuantizedGraph(graph, {"x": wide(scale), kind: wide(2.0**-15)}, {}), x


@pytest.mark.parametrize("kind", ["logistic", "tanh"])
@pytest.mark.parametrize("scale", SCALES)
def test_curves_of_16_bits_on_any_scale(kind, scale):
    check(*curve_of_16_bits(kind, scale), 16)


@pytest.mark.parametrize("kind", ["logistic", "tanh"])
@pytest.mark.parametrize("scale", [2.0**e * f for e in (-12, -11) for f in (0.9995, 1.0, 1.0005)])
def test_curves_of_16_bits_on_about_a_power_of_two(kind, scale):
    """The reference kernels take the scale for that power. The default ones have another formula there, 11 LSB off."""
    qgraph, x = curve_of_16_bits(kind, scale)
    found = TFLiteModel(write_tflite(qgraph)[0], "reference").run(integers(qgraph, x))[0]
    ours = np.rint(np.asarray(insert(qgraph, asked("litert"))(x[0])) * 2**15)
    np.testing.assert_array_equal(ours, np.maximum(found, -32767))


def test_the_scale_of_a_product_of_tensors_is_taken_in_float32():
    """Where the float64 product of two scales is one more in the 16 bits of the multiplier."""

    def reduced(ratio):
        return (int(np.frexp(ratio)[0] * 2**31 + 0.5) + (1 << 15)) >> 16

    b = np.float32(1 / 32767)
    scales = rng(0).uniform(1e-5, 1e-4, 999).astype(np.float32)
    scales = [a for a in scales if reduced(float(a * b) / float(a)) < reduced(float(a) * float(b) / float(a))][:3]
    graph = chain((4, 5), op("batch_matmul", (4, 5), inputs=("x", "y")))
    graph = replace(graph, nodes={**graph.nodes, "y": graph["y"].with_(shape=(None, 5, 5))})
    for a in scales:
        x = [
            (rng(k).integers(-32767, 32768, s) * g).astype(np.float32)
            for k, (s, g) in enumerate((((24, 4, 5), a / 2), ((24, 5, 5), b / 2)))
        ]
        check(QuantizedGraph(graph, {"x": wide(a), "y": wide(b), "batch_matmul": wide(a)}, {}), x, 16)
    assert len(scales) == 3


@pytest.mark.parametrize("source, result", [(8, 16), (16, 8), (8, 8), (16, 16)])
def test_changes_of_grid(source, result):
    graph = chain((500,), op("requantize", (500,), input_bits=source))
    x = feeds(graph)
    grids = {8: (np.float32(0.031), np.int32(-9), -128, 127), 16: (np.float32(0.00013), np.int32(0), -32767, 32767)}
    finer = [Grid(grids[b][0] * np.float32(f), *grids[b][1:]) for b, f in ((source, 1.0), (result, 0.77))]
    q = QuantizedGraph(graph, dict(zip(graph.nodes, finer, strict=True)), {})
    check(q, x, result)


def has_formula(name, container):
    """Whether the operation has a formula of its own, and no bounds or constants that complicate the comparison."""
    graph = GRAPHS[name]()
    node = graph[graph.outputs[0]]
    plain = "c" not in node.inputs and "clip" not in node.attrs and node.op not in ("clip", "avg_pool2d")
    return plain and not node.weights and KERNELS[node.op].arithmetic[container] not in (real, move)


@pytest.mark.parametrize("name, container", [c for c in CASES if has_formula(*c)])
def test_gradients_are_those_of_the_real_function(name, container):
    graph = GRAPHS[name]()
    node, x = graph[graph.outputs[0]], feeds(graph, 2)
    scales = [tf.constant(0.02), tf.constant(0.05)]
    x = [np.abs(v) + 0.1 for v in x] if name == "rsqrt" else x
    centered = [tf.round(v / s) + 0.25 for v, s in zip(x, scales, strict=False)]  # never at a kink
    out = Operand(None, scales[0] if node.op == "resize" else tf.constant(0.04), tf.constant(0.0), container)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(centered)
        operands = [Operand(c, s, tf.constant(0.0), container) for c, s in zip(centered, scales, strict=False)]
        call = Call(node=node, inputs=operands, out=out)
        ours = KERNELS[node.op].arithmetic[container](call) * out.scale
        real = compute(node, [o.value for o in operands])
    for c in centered:
        np.testing.assert_allclose(tape.gradient(ours, c), tape.gradient(real, c), rtol=1e-4, atol=1e-6)


def check_reference(qgraph: QuantizedGraph, x):
    """The integers of the reference kernels' arithmetic on tensors are those of its formulas in numpy."""
    name = register_target(replace(LITERT, name="reference", kernels=REFERENCE_KERNELS)).name
    content, _ = write_tflite(qgraph)
    reference = IntegerReference(content)
    found = reference.run(integers(qgraph, x))[reference.output_names[0]].astype(np.int64)
    q = qgraph.activations[qgraph.graph.outputs[0]]
    y = np.asarray(insert(qgraph, asked(name))(x if len(x) > 1 else x[0]))
    np.testing.assert_array_equal(np.rint(y / q.scale).astype(np.int64) + q.zero_point, found)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_reference_arithmetic_equals_its_numpy(name, ties):
    graph = GRAPHS[name]()
    x = feeds(graph)
    q = quantized_on(graph, x)
    check_reference(with_ties(q) if ties and name not in MOVES else q, x)


@pytest.mark.parametrize("weight_bits", [4, 2])
@pytest.mark.parametrize("name", LINEAR)
def test_reference_arithmetic_of_packed_weights_equals_its_numpy(name, weight_bits):
    graph = LINEAR[name]()
    x = feeds(graph)
    check_reference(quantized_on(graph, x, weight_bits=weight_bits, per_channel=weight_bits > 2), x)
