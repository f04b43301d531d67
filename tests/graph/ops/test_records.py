"""Every record against the operation's own float function: what it claims is tried out."""

from __future__ import annotations

import numpy as np
import pytest

from kquant.graph.ir import Graph, Node
from kquant.graph.moments import Moments
from kquant.graph.ops import OPS, Tie, compute, evaluate, op_of, weight_of, weight_view
from kquant.graph.scaling import Scaling
from tests.support.nodes import CLOSE, EXAMPLES, normal

NAMES = list(EXAMPLES)


def run(node: Node, xs: list[np.ndarray]) -> np.ndarray:
    return np.asarray(compute(node, xs))


def scaling(channels: int, offset: bool = True, positive: bool = True) -> Scaling:
    scale, shift = normal(channels).astype(np.float64), normal(channels).astype(np.float64)
    return Scaling(np.abs(scale) + 0.1 if positive else scale, shift * offset, {})


def applied(s: Scaling, x: np.ndarray) -> np.ndarray:
    return (x * s.scale + s.offset).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_records_are_complete(name: str) -> None:
    node, xs = EXAMPLES[name]
    record = op_of(node)
    assert record.name == node.op and record.moments is not None
    assert run(node, xs).shape[1:] == tuple(node.shape[1:]) or not xs
    named = {record.bias, record.values, record.weight and record.weight.name, *record.parameters} - {None}
    assert named == set(node.weights)
    assert (record.linear is not None) == (record.bias is not None)
    if record.weight is not None and record.weight.channels is not None:
        channels = len(node.weights["table"]) if record.lookup else node.shape[-1]  # a table has a scale for a row
        assert weight_view(node).shape[record.weight.channels] == channels


def test_the_grid_is_tied_as_the_kernels_of_tflite_tie_it() -> None:
    of_input = {n for n, record in OPS.items() if record.grid is Tie.OF_INPUT}
    shared = {n for n, record in OPS.items() if record.grid is Tie.SHARED}
    pooled, chosen = {"max_pool2d", "avg_pool2d", "reduce_max", "reduce_min"}, {"gather", "take_along", "top_k"}
    moved = {"reshape", "transpose", "slice", "pad", "resize", "train_only"}  # the last is in no file
    assert of_input == moved | pooled | chosen
    assert shared == {"concat", "maximum", "minimum", "select"}


@pytest.mark.parametrize("name", [n for n in NAMES if op_of(EXAMPLES[n][0]).grid is not Tie.OWN])
def test_on_a_tied_grid_values_are_those_of_the_inputs(name: str) -> None:
    node, xs = EXAMPLES[name]
    record = op_of(node)
    if not (record.averages or record.inserts):
        assert set(run(node, xs).reshape(-1)) <= {v for x in xs for v in x.reshape(-1)}


def test_moved_values_that_are_not_those_of_the_input_are_declared() -> None:
    tied = {n: e for n, e in EXAMPLES.items() if op_of(e[0]).grid is Tie.OF_INPUT}
    new = {n for n, (node, xs) in tied.items() if not set(run(node, xs).reshape(-1)) <= set(xs[0].reshape(-1))}
    assert new == {"avg_pool2d", "avg_pool2d, all", "resize", "pad", "pad, value"}


def test_tables_hold_the_values_of_the_output() -> None:
    assert {n for n, record in OPS.items() if record.values} == {"const", "embedding"}
    node, xs = EXAMPLES["embedding"]
    assert op_of(node).lookup and set(run(node, xs).reshape(-1)) <= set(node.weights["table"].reshape(-1))
    assert {n for n, record in OPS.items() if record.given} == {"input", "const", "embedding"}


@pytest.mark.parametrize("name", [n for n in NAMES if op_of(EXAMPLES[n][0]).elementwise])
def test_elementwise_functions_commute_with_any_order(name: str) -> None:
    node, (x,) = EXAMPLES[name]
    flat = run(node.with_(shape=(None, x[0].size)), [x.reshape(len(x), -1)[:, ::-1].copy()])
    np.testing.assert_array_equal(flat[:, ::-1].reshape(x.shape), run(node, [x]))


# the bounds of a clip would have to scale too
EQUIVARIANT = [n for n in NAMES if (c := op_of(EXAMPLES[n][0]).channels) and c.equivariant and n != "clip, both"]


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_equivariant_functions_commute_with_positive_factors(name: str) -> None:
    node, xs = EXAMPLES[name]
    channels = op_of(node).channels
    assert channels is not None
    s = scaling(4, offset=False)
    expected = applied(s, run(node, xs))
    np.testing.assert_allclose(run(node, [applied(s, x) for x in xs]), expected, **CLOSE)
    np.testing.assert_array_equal(channels.index_behind(node, xs[0].shape, np.arange(4)), np.arange(4))


COMMUTES = (
    "max_pool2d; avg_pool2d; avg_pool2d, all; window_mean; mean; reduce_max; reshape; reshape, flat; transpose; slice; "
    "slice, channels; resize; resize, nearest; reduce_min; gather; gather, channels; train_only"
).split("; ")


@pytest.mark.parametrize("name", NAMES)
def test_a_scaling_in_front_is_one_behind(name: str) -> None:
    node, xs = EXAMPLES[name]
    channels, s = op_of(node).channels, scaling(xs[0].shape[-1] if xs else 4)
    moved = None if channels is None else channels.behind(node, (None, *xs[0].shape[1:]), s)
    assert (moved is not None) == (name in COMMUTES)
    if moved is not None and channels is not None:
        np.testing.assert_allclose(run(node, [applied(s, xs[0])]), applied(moved, run(node, xs)), **CLOSE)
        assert channels.offset(node)
        index = channels.index_behind(node, (None, *xs[0].shape[1:]), np.arange(4))
        np.testing.assert_allclose(s.scale[index], moved.scale)


@pytest.mark.parametrize("name", NAMES)
def test_a_scaling_behind_is_one_in_front(name: str) -> None:
    node, xs = EXAMPLES[name]
    record, s = op_of(node), scaling(node.shape[-1])
    sources = [(None, *x.shape[1:]) for x in xs]
    moved = None if record.channels is None else record.channels.in_front(node, sources, s)
    if moved is None:
        assert name not in {
            "add",
            "sub",
            "concat",
            "concat, rows",
            "reshape",
            "transpose",
            "slice",
            "mean",
            "avg_pool2d",
        }
        return
    found = run(node, [applied(m, x) for m, x in zip(moved, xs, strict=True)])
    np.testing.assert_allclose(found, applied(s, run(node, xs)), **CLOSE)


def test_a_maximum_commutes_with_positive_factors_only() -> None:
    node, (x,) = EXAMPLES["max_pool2d"]
    channels = op_of(node).channels
    assert channels is not None
    assert channels.behind(node, x.shape, Scaling.factors(np.asarray([1.0, 1.0, -1.0, 1.0]))) is None


def index_behind(name: str) -> np.ndarray | None:
    """Where the four channels of the input are in the output."""
    node, xs = EXAMPLES[name]
    channels = op_of(node).channels
    if channels is None or len(xs) != 1:
        return None
    return channels.index_behind(node, (None, *xs[0].shape[1:]), np.arange(4))


def test_what_passes_channels_on() -> None:
    others = {"clip", "clip, both", "leaky_relu", "prelu", "pad", "pad, reflect", "window_mean, zeros"}
    assert {n for n in NAMES if index_behind(n) is not None} == {*COMMUTES, *others}


@pytest.mark.parametrize("name", [n for n in NAMES if index_behind(n) is not None])
def test_constants_behind_an_operation(name: str) -> None:
    """A constant in each channel stays one where the record says which, wherever the operation passes channels on."""
    node, xs = EXAMPLES[name]
    channels, index = op_of(node).channels, index_behind(name)
    assert channels is not None and index is not None
    c = np.asarray([0.0, -1.25, 2.5, 0.5])
    y = run(node, [np.broadcast_to(c, xs[0].shape).astype(np.float32)]).reshape(-1, node.shape[-1])
    found = channels.constant(node, c[index])
    known = np.isfinite(found)
    np.testing.assert_allclose(y[:, known], np.broadcast_to(found[known], y[:, known].shape), **CLOSE)
    varies = np.ptp(y, axis=0) > 1e-5
    assert not (varies & known).any()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_unchanged(name: str) -> None:
    node, xs = EXAMPLES[name]
    for candidate in (node, *_trivial(node, xs)):
        if xs and op_of(candidate).unchanged(candidate, (None, *xs[0].shape[1:])):
            np.testing.assert_array_equal(run(candidate, xs), xs[0])
        else:
            assert candidate is node


def _trivial(node: Node, xs: list[np.ndarray]) -> list[Node]:
    """The node with settings that change nothing, where there are any."""
    shape = (None, *xs[0].shape[1:]) if xs else ()
    zeros = (0,) * len(shape)
    changes = {
        "reshape": {},
        "transpose": {"perm": tuple(range(len(shape)))},
        "gather": {"axis": 1, "indices": tuple(range(shape[1] if shape else 0))},
        "slice": {"begin": zeros, "end": shape, "strides": (1,) * len(shape)},
        "pad": {"paddings": tuple((0, 0) for _ in shape)},
    }
    return [node.with_(shape=shape).with_attrs(**changes[node.op])] if node.op in changes else []


MERGED = {
    "reshape": [{}, {}],
    "transpose": [{"perm": (0, 3, 1, 2)}, {"perm": (0, 2, 1, 3)}],
    "clip": [{"lo": -0.5, "hi": 1.0}, {"lo": 0.0, "hi": None}],
    "function": [{"steps": (("exp", 0), ("add", 0, 1))}, {"steps": (("mul", 0, 0.5), ("mul", 0, 1))}],
    "clip, apart": [{"lo": 1.0, "hi": None}, {"lo": None, "hi": 0.5}],
}


@pytest.mark.parametrize("name", MERGED)
def test_two_merged_are_one(name: str) -> None:
    node, xs = EXAMPLES[name.split(",")[0]]
    first, second = (
        node.with_(name=n, inputs=(i,)).with_attrs(**a) for n, i, a in zip("ab", "xa", MERGED[name], strict=True)
    )
    first = first.with_(shape=(None, *run(first, xs).shape[1:]))
    if node.op == "reshape":
        second = second.with_(shape=(None, 10, 12))
    merge = op_of(node).merge
    assert merge is not None
    merged = merge(first, second)
    assert merged.inputs == ("x",)
    np.testing.assert_array_equal(run(merged, xs), run(second, [run(first, xs)]))


def test_merging_is_known_of_what_merges() -> None:
    assert {n for n, record in OPS.items() if record.merge} == {"reshape", "transpose", "clip", "function"}


@pytest.mark.parametrize("name", NAMES)
def test_the_simpler_operation_computes_the_same(name: str) -> None:
    node, xs = EXAMPLES[name]
    simpler = op_of(node).simpler(node, (None, *xs[0].shape[1:])) if xs else None
    assert (simpler is not None) == (name == "avg_pool2d, all")
    if simpler is not None:
        assert op_of(simpler).grid is Tie.OWN
        np.testing.assert_allclose(run(simpler, xs), run(node, xs), **CLOSE)


NOT_OF_THE_MEAN = {
    "softmax",
    "normalize",
    "normalize, length",
    "conv2d, same",
    "depthwise_conv2d, same",
    "conv2d_transpose",
    "prelu",
}
FUNCTIONS = [
    n
    for n, (node, xs) in EXAMPLES.items()
    if xs and node.dtype == "float32" and not (op_of(node).lookup or op_of(node).inserts) and n not in NOT_OF_THE_MEAN
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_moments_of_a_constant_are_the_value(name: str) -> None:
    """Without deviation the moments are the function itself, where no border of zeros and no mixture is in the way."""
    node, xs = EXAMPLES[name]
    record = op_of(node)
    values = [np.linspace(-1, 2, x.shape[-1]) + k for k, x in enumerate(xs)]
    if name in {"transpose, channels", "mean, channels", "concat, rows", "select", "top_k", "take_along"}:
        values = [np.full_like(v, 0.3) for v in values]
    if name == "rsqrt":
        values = [np.square(v) + 0.1 for v in values]
    sources = [Node(name=n, op="input", shape=(None, *x.shape[1:])) for n, x in zip(node.inputs, xs, strict=True)]
    assert record.moments is not None
    found = record.moments(node, sources, [Moments.normal(v, np.zeros_like(v)) for v in values])
    y = run(node, [np.broadcast_to(v, x.shape).astype(np.float32) for v, x in zip(values, xs, strict=True)])
    expected = y.reshape(-1, y.shape[-1])[0]
    if name in {"clip", "clip, both"}:  # clipped by who asks
        expected = values[0]
    np.testing.assert_allclose(np.broadcast_to(found.mean, expected.shape), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.std, 0, atol=1e-4)


def test_evaluate_runs_a_graph_in_order() -> None:
    a = Node(name="a", op="input", shape=(None, 4))
    b = Node(name="b", op="affine", inputs=("a",), shape=(None, 4), weights={"scale": normal(4), "offset": normal(4)},
             attrs={"clip": (0.0, [1.0, 2.0, 0.5, 3.0])})  # fmt: skip
    c = Node(name="c", op="mul", inputs=("b", "a"), shape=(None, 4))
    graph = Graph(nodes={n.name: n for n in (a, b, c)}, inputs=("a",), outputs=("c",))
    x = normal(3, 4)
    clipped = np.minimum(np.maximum(x * b.weights["scale"] + b.weights["offset"], 0), [1.0, 2.0, 0.5, 3.0])
    y, z = evaluate(graph, [x], ["b", "c"])
    np.testing.assert_allclose(y, clipped, **CLOSE)
    np.testing.assert_allclose(z, clipped * x, **CLOSE)


def test_asking_for_what_an_operation_has_not_names_the_node() -> None:
    node, _ = EXAMPLES["add"]
    with pytest.raises(AssertionError, match=r"'n' \(add\) has no weight"):
        weight_of(node)
