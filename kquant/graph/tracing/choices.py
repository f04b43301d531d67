"""Lowering of comparisons, of truth values, and of choices between tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from kquant.errors import ModelError
from kquant.graph.ir import Node
from kquant.graph.ops import op_of
from kquant.graph.tracing.builder import (
    Builder,
    NotLowered,
    as_array,
    lowers_layer,
    lowers_op,
    reshape,
    sample_constant,
    scale_offset,
)
from kquant.graph.tracing.functions import function, number_of
from kquant.graph.tracing.linear import look_up
from kquant.graph.tracing.operations import reduce, two_inputs

HIDDEN = 1e9
_ABOVE = (("greater", 0, 0.5),)
ROWS = 1024  # of a table of truth values
LARGE = 1e4  # a number so far off stands for infinity; one grid cannot hold it beside others


def _comparison(name: str) -> Callable[[Builder, Any, Any, Any], Node]:
    mirrored = {"greater": "less", "less": "greater", "greater_equal": "less_equal", "less_equal": "greater_equal"}

    def lower(b: Builder, op: Any, x1: Any, x2: Any) -> Node:
        if compares_ids(b, x1, x2):
            return ids_compared(b, x1, name, number_of(x2, "a bound"))
        if isinstance(x1, Node) and x1.dtype == "bool" and not isinstance(x2, Node):
            return _truth_compared(b, x1, name, number_of(x2, "a bound"))
        if any(isinstance(x, Node) and x.dtype != "float32" for x in (x1, x2)):
            raise NotLowered("it compares integers")
        if isinstance(x1, Node) and isinstance(x2, Node):
            difference = two_inputs(b, "sub", x1, x2, "difference")
            return function(b, difference, lambda t: t.call(name, t, 0.0), dtype="bool")
        x, value, kind = (x1, x2, name) if isinstance(x1, Node) else (x2, x1, mirrored.get(name, name))
        bound = number_of(value, "a bound")
        return function(b, x, lambda t: t.call(kind, t, bound), dtype="bool")

    return lower


def _truth_compared(b: Builder, truth: Node, name: str, bound: float) -> Node:
    """A comparison of truth values as zeros and ones: they themselves, or their opposite."""
    no, yes = (bool(getattr(np, name)(value, bound)) for value in (0.0, 1.0))
    if no == yes:
        raise NotLowered(f"all truth values compare alike with {bound:g}")
    return truth if yes else b.emit("function", truth, steps=(("logical_not", 0),), dtype="bool")


def compares_ids(b: Builder, x: Any, bound: Any) -> bool:
    """Whether an input is compared that holds ids: integers (moved perhaps), or what a table is read at."""
    if not isinstance(x, Node) or isinstance(bound, Node):
        return False
    if x.op != "input":
        return x.dtype == "int32" and _moved_from(b, x)[0].op == "input"
    return x.dtype == "int32" or any(op_of(n).lookup and n.inputs[0] == x.name for n in b.nodes.values())


def ids_compared(b: Builder, ids: Node, name: str, bound: float, suffix: str = "") -> Node:
    """Truth values from a table of zeros and ones, since all ids above the bound compare alike."""
    if bound != int(bound) or not 0 <= bound < ROWS:
        raise NotLowered(f"ids are compared with {bound:g}")
    rows = np.arange(int(bound) + 2, dtype=np.float64)
    table = getattr(np, name)(rows, bound).astype(np.float32)[:, None]
    source, moves = _moved_from(b, ids)
    seen = look_up(b, source, table, clamp=True, suffix="seen")
    seen = reshape(b, seen, source.shape, "seen_ids")
    for move in moves:
        seen = b.emit(move.op, seen, shape=move.shape, batch=move.batch, suffix="seen_moved", **move.attrs)
    return b.emit("function", seen, steps=_ABOVE, suffix=suffix, dtype="bool")


def _moved_from(b: Builder, x: Node) -> tuple[Node, list[Node]]:
    """The integers that reshapes and transposes made a tensor of, and these, in order."""
    moves: list[Node] = []
    while x.op in ("reshape", "transpose"):
        moves.insert(0, x)
        x = b.nodes[x.inputs[0]]
    return x, moves


_COMPARED = {
    "Greater": "greater",
    "GreaterEqual": "greater_equal",
    "Less": "less",
    "LessEqual": "less_equal",
    "Equal": "equal",
    "NotEqual": "not_equal",
}
COMPARISONS = frozenset(_COMPARED)
for _name, _kind in _COMPARED.items():
    lowers_op(_name)(_comparison(_kind))


def _logical(name: str, count: int) -> Callable[..., Node]:
    def lower(b: Builder, op: Any, *xs: Any) -> Node:
        xs = tuple(_truth(b, x) if isinstance(x, Node) and x.dtype == "int32" else x for x in xs)
        if any(isinstance(x, Node) and x.dtype != "bool" for x in xs):
            raise NotLowered("operands that are no truth values")
        if all(isinstance(x, Node) and x.shape == xs[0].shape for x in xs):
            return b.emit("function", *xs, steps=((name, *range(count)),), dtype="bool")
        return _of_numbers(b, "mul" if name == "logical_and" else "maximum", xs)

    return lower


def _of_numbers(b: Builder, joined: str, xs: Sequence[Any]) -> Node:
    """Two truth values of which one is a constant or broadcasts, as zeros and ones."""
    computed = next(x for x in xs if isinstance(x, Node))
    numbers = [
        _from_truth(b, x, 1.0, 0.0, "number") if isinstance(x, Node) else b.const(sample_constant(computed, x) != 0)
        for x in xs
    ]
    return b.emit("function", b.emit(joined, *numbers, suffix="both"), steps=_ABOVE, dtype="bool")


def _counted(numbers: str, truths: str) -> Callable[..., Node]:
    """A minimum, maximum or product, which among zeros and ones is "and" or "or"."""

    def lower(b: Builder, op: Any, x1: Any, x2: Any) -> Node:
        if all(not isinstance(x, Node) or x.dtype == "float32" for x in (x1, x2)):
            return two_inputs(b, numbers, x1, x2)
        if numbers != "minimum" and any(isinstance(x, Node) and x.dtype == "int32" for x in (x1, x2)):
            raise NotLowered("it computes with integers")
        node = _logical(truths, 2)(b, op, _truth(b, x1), _truth(b, x2))
        b.counts.add(node.name)
        return node

    return lower


def _truth(b: Builder, x: Any) -> Any:
    """Zeros and ones as truth values.

    Raises:
        NotLowered: they are other integers, as far as can be told.
    """
    if isinstance(x, Node):
        if x.dtype == "bool":
            return x
        if not compares_ids(b, x, 1.0):
            raise NotLowered("it computes with integers")
        return ids_compared(b, x, "greater_equal", 1.0, suffix="truth")
    if not np.isin(as_array(x), (0, 1)).all():
        raise NotLowered("it computes with integers")
    return as_array(x) != 0


for _name, _kinds in {
    "Minimum": ("minimum", "logical_and"),
    "Multiply": ("mul", "logical_and"),
    "Maximum": ("maximum", "logical_or"),
}.items():
    lowers_op(_name)(_counted(*_kinds))
lowers_op("LogicalAnd")(_logical("logical_and", 2))
lowers_op("LogicalOr")(_logical("logical_or", 2))
lowers_op("LogicalNot")(_logical("logical_not", 1))


@lowers_op("Where")
def where(b: Builder, op: Any, condition: Any, x1: Any = None, x2: Any = None) -> Node:
    if x1 is not None and x2 is not None and not isinstance(condition, Node):
        return _constant_choice(b, as_array(condition) != 0, x1, x2)
    if x1 is None or x2 is None or not isinstance(condition, Node) or condition.dtype != "bool":
        raise NotLowered("a choice without a computed condition, or without values")
    for scores, hidden, seen in ((x1, x2, 1.0), (x2, x1, 0.0)):
        if isinstance(scores, Node) and not isinstance(hidden, Node) and np.max(as_array(hidden)) <= -LARGE:
            return _hide(b, scores, _from_truth(b, condition, seen, 1.0 - seen))
    values = [_choice(b, condition, x) for x in (x1, x2)]
    if all(v.op == "const" for v in values):
        numbers = [number_of(v.weights["value"], "a choice between constants") for v in values]
        return _from_truth(b, condition, numbers[0], numbers[1])
    return b.emit("select", condition, *values)


def _constant_choice(b: Builder, condition: np.ndarray, x1: Any, x2: Any) -> Node:
    """A choice that is the same for every sample: what is not chosen times zero, or a mask in front of a softmax."""
    sides = ((x1, condition), (x2, ~condition))
    computed = [(x, chosen) for x, chosen in sides if isinstance(x, Node)]
    if any(x.dtype != "float32" for x, _ in computed):
        raise NotLowered("a choice between integers")
    filled = [
        sample_constant(computed[0][0], np.where(chosen, np.maximum(as_array(x), -HIDDEN), 0.0))
        for x, chosen in sides
        if not isinstance(x, Node)
    ]
    if filled and filled[0].min() <= -LARGE:  # nothing is left of the scores beside it
        return b.emit("add", computed[0][0], b.const(filled[0]))
    terms = [
        b.emit("mul", x, b.const(sample_constant(x, chosen)), suffix=f"of_{k}")
        for k, (x, chosen) in enumerate(computed)
    ]
    terms += [b.const(value) for value in filled if value.any()]
    return terms[0] if len(terms) == 1 else b.emit("add", *terms)


def _hide(b: Builder, scores: Node, seen: Node) -> Node:
    """The scores where `seen` is 1, and a number that softmax takes for -infinity elsewhere."""
    if len(scores.shape) != len(seen.shape):
        raise NotLowered("a mask with another rank than the scores")
    return b.emit("add", scores, scale_offset(b, seen, HIDDEN, -HIDDEN, "mask"))


def _choice(b: Builder, condition: Node, value: Any) -> Node:
    if isinstance(value, Node):
        if value.dtype != "float32" or len(value.shape) != len(condition.shape):
            raise NotLowered("a choice between integers, or with other ranks")
        return value
    array = sample_constant(condition, value)
    if not (np.abs(array) < LARGE).all():
        raise NotLowered(f"a choice with {float(array.reshape(-1)[np.argmax(np.abs(array))]):g}, a mask")
    return b.const(array)


def _from_truth(b: Builder, x: Node, yes: float, no: float, suffix: str = "") -> Node:
    if (seen := as_number(b, x)) is not None:
        return scale_offset(b, seen, yes - no, no)
    return b.emit("function", x, steps=(("select", 0, float(yes), float(no)),), suffix=suffix)


def as_number(b: Builder, truth: Node) -> Node | None:
    """The zeros and ones that a truth value of ids was made of; None for others."""
    node = truth
    while node.op == "reshape":
        node = b.nodes[node.inputs[0]]
    source = b.nodes[node.inputs[0]] if node.op == "function" and node.attrs["steps"] == _ABOVE else node
    table = source
    while table.op == "reshape":
        table = b.nodes[table.inputs[0]]
    return reshape(b, source, truth.shape, "seen_axes") if table.attrs.get("clamp") else None


@lowers_op("Cast")
def cast(b: Builder, op: Any, x: Node) -> Node:
    """Between float types (all are float32 here), of truth values to numbers, and of numbers to truth values."""
    if str(op.dtype) == "bool":
        if compares_ids(b, x, 0.0):
            return ids_compared(b, x, "not_equal", 0.0)
        return x if x.dtype == "bool" else function(b, x, lambda t: t.call("not_equal", t, 0.0), dtype="bool")
    if "int" in str(op.dtype) and x.dtype in ("int32", "bool"):
        b.counts.update({x.name} if x.dtype == "bool" else ())  # zeros and ones, of which some take note
        return x
    if "float" not in str(op.dtype) or x.dtype == "int32":  # of an input, see `inputs.settle_inputs`
        raise NotLowered(f"a cast from {x.dtype} to {op.dtype}")
    return _from_truth(b, x, 1.0, 0.0) if x.dtype == "bool" else x


@lowers_op("ConvertToTensor")
def convert_to_tensor(b: Builder, op: Any, x: Node) -> Node:
    """What is a tensor already; a cast where another type is asked for."""
    return x if op.dtype is None else cast(b, op, x)


def _of_all(kind: str, suffix: str) -> Callable[..., Node]:
    """Whether the largest (any), or the smallest (all), of zeros and ones is above 0."""

    def lower(b: Builder, op: Any, x: Node) -> Node:
        if x.dtype != "bool":
            raise NotLowered("of numbers")
        extreme = reduce(b, op, _from_truth(b, x, 1.0, 0.0), kind, suffix)
        return b.emit("function", extreme, steps=_ABOVE, dtype="bool")

    return lower


lowers_op("Any")(_of_all("reduce_max", "largest"))
lowers_op("All")(_of_all("reduce_min", "smallest"))


@lowers_op("FullLike")
def full_like(b: Builder, op: Any, x: Node, fill_value: Any, dtype: Any = None) -> np.ndarray:
    """A constant of the shape of a tensor, with one entry for the batch."""
    if x.batch != 1:
        raise NotLowered("a constant for several entries of a sample")
    kind = str(dtype or getattr(op, "dtype", None) or x.dtype)
    sizes = [int(d or 0) for d in x.shape[1:]]
    return np.full((1, *sizes), number_of(fill_value, "a value"), "float32" if "float" in kind else kind)


@lowers_op("ZerosLike")
def zeros_like(b: Builder, op: Any, x: Node, dtype: Any = None) -> np.ndarray:
    return full_like(b, op, x, 0.0, dtype)


@lowers_op("OnesLike")
def ones_like(b: Builder, op: Any, x: Node, dtype: Any = None) -> np.ndarray:
    return full_like(b, op, x, 1.0, dtype)


@lowers_layer(keras.layers.Masking)
def masking(b: Builder, layer: Any, inputs: Node) -> Node:
    """Zeros at the steps all of whose entries are the mask's value; only 0 is on every grid."""
    if layer.mask_value != 0:
        raise ModelError(
            f"Layer {b.scope.origin!r} (Masking) hides steps by the value {layer.mask_value:g}, which is on no grid "
            "exactly: hide them by 0, or give the layers behind it a mask that is an input."
        )
    return inputs
