"""Lowering of recurrent layers: every step written out, the product with the inputs once for all steps.

A tensor of one step is [batch, 1, width]. The nodes that play the same part in every step name it in the attribute
`part_of`: they have one grid, so that states go from step to step, and in and out of the model, as they are. What is
`wide` gets 16 bits where the target has them: the cell of an LSTM adds up over all steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from kquant.graph.ir import Node
from kquant.graph.tracing.activations import activate
from kquant.graph.tracing.builder import Builder, NotLowered, as_array, lowers_layer, reshape, scale_offset
from kquant.graph.tracing.operations import concat, slice_axis
from kquant.graph.training import UserWeight

L = keras.layers
States = list[Any]  # nodes, None for zeros
Step = Callable[[int, States], tuple[Node, States]]  # f(number, states before) -> output, states behind
Product = Callable[[Node, str], Node]  # f(x, suffix) -> x times a kernel, plus a bias
CELLS = (L.LSTMCell, L.GRUCell, L.SimpleRNNCell, L.StackedRNNCells)


@lowers_layer(L.LSTM, L.GRU, L.SimpleRNN, L.RNN)
def recurrent(b: Builder, layer: Any, sequences: Node, initial_state: Any = None, mask: Any = None) -> Any:
    """The outputs of a layer with a cell, and its states where it returns them."""
    if layer.stateful:
        raise NotLowered("it keeps its state between calls: make it an input and an output (return_state=True)")
    if len(sequences.shape) != 3:
        raise NotLowered("steps of more than one axis")
    scope, length = b.scope, int(sequences.shape[1] or 0)
    step = step_of(b, layer.cell, sequences)
    given = keras.tree.flatten(initial_state)
    states: States = [_given(b, layer, s, k) for k, s in enumerate(given) if s is not None]
    states = states or [None] * len(keras.tree.flatten(layer.cell.state_size))
    seen = None if mask is None else reshape(b, _as_mask(mask), (None, length, 1), "mask")
    held: Any = None
    outputs = []
    for t in range(length)[::-1] if layer.go_backwards else range(length):
        b.scope = replace(scope, name=f"{scope.name}/step_{t}")
        output, new = step(t, states)
        shown = output
        if seen is not None:
            visible = slice_axis(b, seen, 1, t, t + 1, "mask")
            is_state = next((k for k, s in enumerate(new) if s is output and states[k] is held), None)
            new = [_choose(b, visible, n, old, f"kept_{k}") for k, (n, old) in enumerate(zip(new, states, strict=True))]
            if layer.zero_output_for_mask:
                shown = _choose(b, visible, output, None, "shown")
            else:
                shown = _choose(b, visible, output, held, "held") if is_state is None else new[is_state]
        states, held = new, shown
        outputs.append(shown)
    b.scope = scope
    y = concat(b, outputs, 1, "outputs") if layer.return_sequences else _flat(b, outputs[-1], "output")
    return [y, *(_flat(b, s, f"last_{k}") for k, s in enumerate(states))] if layer.return_state else y


@lowers_layer(*CELLS)
def cell_alone(b: Builder, cell: Any, inputs: Node, states: Any) -> list[Node]:
    """One step of a cell: the output and the states."""
    before = [reshape(b, s, (None, 1, s.shape[-1]), f"state_{k}") for k, s in enumerate(keras.tree.flatten(states))]
    output, new = step_of(b, cell, reshape(b, inputs, (None, 1, inputs.shape[-1]), "step"))(0, before)
    return [_flat(b, x, "output") for x in (output, *new)]


@lowers_layer(L.Bidirectional)
def bidirectional(b: Builder, layer: Any, sequences: Node, initial_state: Any = None, mask: Any = None) -> Any:
    """Both directions, merged; the second in the order of the first."""
    given = keras.tree.flatten(initial_state) if initial_state is not None else []
    halves = given[: len(given) // 2], given[len(given) // 2 :]
    scope, parts = b.scope, []
    for inner, state in zip((layer.forward_layer, layer.backward_layer), halves, strict=True):
        b.scope = replace(scope, name=f"{scope.name}/{inner.name}")
        parts.append(keras.tree.flatten(recurrent(b, inner, sequences, state or None, mask)))
    b.scope = scope
    (y, *ends), (reverse, *reverse_ends) = parts
    if layer.return_sequences:
        steps = int(reverse.shape[1] or 0)
        reverse = b.emit("gather", reverse, axis=1, indices=tuple(range(steps))[::-1], suffix="in_order")
    if layer.merge_mode is None:
        return [y, reverse, *ends, *reverse_ends]
    if layer.merge_mode == "concat":
        merged = concat(b, [y, reverse], -1, "merged")
    else:
        merged = b.emit("mul" if layer.merge_mode == "mul" else "add", y, reverse, suffix="merged")
    if layer.merge_mode == "ave":
        merged = scale_offset(b, merged, 0.5, 0.0, "average")
    return [merged, *ends, *reverse_ends] if layer.return_state else merged


def step_of(b: Builder, cell: Any, x: Node) -> Step:
    """The steps of a cell over a sequence [batch, steps, channels], with the products of all inputs computed."""
    for kind, step in ((L.LSTMCell, _lstm), (L.GRUCell, _gru), (L.SimpleRNNCell, _simple)):
        if type(cell) is kind:
            _warn_of_dropout(b, cell)
            return step(b, cell, x)
    return _stacked(b, cell, x) if type(cell) is L.StackedRNNCells else _traced(b, cell, x)


def _lstm(b: Builder, cell: Any, x: Node) -> Step:
    """c = f c' + i g, h = o act(c) with the gates i, f, o of all states before, and the candidate g."""
    n, name = cell.units, b.scope.name
    gates, candidate = [*range(2 * n), *range(3 * n, 4 * n)], list(range(2 * n, 3 * n))
    given = [_product(b, cell.kernel, cell.bias, c)(x, s) for c, s in ((gates, ""), (candidate, "candidate"))]
    inner = [_product(b, cell.recurrent_kernel, None, c) for c in (gates, candidate)]

    def step(t: int, states: States) -> tuple[Node, States]:
        h, c = states
        sums = [_sum(b, name, slice_axis(b, v, 1, t, t + 1, f"{s}_in"), h, r, s)
                for v, r, s in zip(given, inner, ("gates", "new"), strict=True)]  # fmt: skip
        open_ = _activated(b, cell.recurrent_activation, sums[0], "open")
        i, f, o = (slice_axis(b, open_, 2, k * n, (k + 1) * n, s) for k, s in enumerate(("input", "forget", "output")))
        new = b.emit("mul", i, _activated(b, cell.activation, sums[1], "candidate"), suffix="written", wide=True)
        if c is not None:
            kept = b.emit("mul", f, c, suffix="kept", wide=True)
            new = b.emit("add", kept, new, suffix="cell", wide=True)
        new = _part(b, new, name, "cell")
        h = b.emit("mul", o, _activated(b, cell.activation, new, "cell_out"), suffix="hidden")
        h = _part(b, h, name, "hidden")
        return h, [h, new]

    return step


def _gru(b: Builder, cell: Any, x: Node) -> Step:
    """h = g + z (h' - g) with the gates z, r of all states before, and the candidate g, which r resets."""
    n, name, after = cell.units, b.scope.name, bool(cell.reset_after)
    gates, candidate = list(range(2 * n)), list(range(2 * n, 3 * n))
    bias = cell.bias if cell.use_bias else None
    rows = (0, 1) if bias is not None and after else (None, None)
    given = [_product(b, cell.kernel, bias, c, rows[0])(x, s) for c, s in ((gates, ""), (candidate, "candidate"))]
    inner = [_product(b, cell.recurrent_kernel, bias if rows[1] else None, c, rows[1]) for c in (gates, candidate)]
    zeros = _zeros(b, x, np.zeros(n), name) if rows[1] else None

    def step(t: int, states: States) -> tuple[Node, States]:
        h = zeros if states[0] is None else states[0]
        ins = [slice_axis(b, v, 1, t, t + 1, f"{s}_in") for v, s in zip(given, ("gates", "new"), strict=True)]
        open_ = _activated(b, cell.recurrent_activation, _sum(b, name, ins[0], h, inner[0], "gates"), "open")
        z, r = (slice_axis(b, open_, 2, k * n, (k + 1) * n, s) for k, s in enumerate(("update", "reset")))
        total = ins[1]
        if h is not None and after:
            old = b.emit("mul", r, inner[1](h, "new_inner"), suffix="reset_inner")
            total = b.emit("add", total, old, suffix="new")
        elif h is not None:
            total = _sum(b, name, total, b.emit("mul", r, h, suffix="reset_hidden"), inner[1], "new")
        g = _activated(b, cell.activation, total, "candidate")
        difference = scale_offset(b, g, -1.0, 0.0, "minus") if h is None else b.emit("sub", h, g, suffix="difference")
        new = b.emit("add", g, b.emit("mul", z, difference, suffix="kept"), suffix="hidden")
        new = _part(b, new, name, "hidden")
        return new, [new]

    return step


def _simple(b: Builder, cell: Any, x: Node) -> Step:
    name = b.scope.name
    given, inner = _product(b, cell.kernel, cell.bias, None)(x, ""), _product(b, cell.recurrent_kernel, None, None)

    def step(t: int, states: States) -> tuple[Node, States]:
        total = _sum(b, name, slice_axis(b, given, 1, t, t + 1, "in"), states[0], inner, "sum")
        h = _part(b, _activated(b, cell.activation, total, "hidden"), name, "hidden")
        return h, [h]

    return step


def _stacked(b: Builder, cell: Any, x: Node) -> Step:
    """Each cell reads the output of the one before, step by step."""
    sizes = [len(keras.tree.flatten(inner.state_size)) for inner in cell.cells]
    scope = b.scope

    def step(t: int, states: States) -> tuple[Node, States]:
        here, rest = b.scope, list(states)
        new: States = []
        y = slice_axis(b, x, 1, t, t + 1, "in")
        for k, (inner, size) in enumerate(zip(cell.cells, sizes, strict=True)):
            b.scope = replace(scope, name=f"{here.name}/{k}")
            y, behind = step_of(b, inner, y)(0, rest[:size])
            rest, new = rest[size:], [*new, *behind]
        b.scope = here
        return y, new

    return step


def _traced(b: Builder, cell: Any, x: Node) -> Step:
    """A cell of the user's: its call is traced at every step."""
    if hasattr(cell, "get_initial_state"):
        starts = [as_array(s)[0] for s in keras.tree.flatten(cell.get_initial_state(batch_size=1))]
    else:
        starts = [np.zeros(size, np.float32) for size in keras.tree.flatten(cell.state_size)]
    if any(s.ndim != 1 for s in starts):
        raise NotLowered("states of more than one axis")
    zeros: dict[int, Node] = {}

    def step(t: int, states: States) -> tuple[Node, States]:
        scope = b.scope
        for k, start in enumerate(starts):
            if states[k] is None and k not in zeros:
                zeros[k] = _zeros(b, x, start, f"{scope.name}/{k}")
        flat = [_flat(b, zeros[k] if s is None else s, f"state_{k}") for k, s in enumerate(states)]
        now = _flat(b, slice_axis(b, x, 1, t, t + 1, "in"), "now")
        before = keras.tree.pack_sequence_as(cell.state_size, flat)
        before = before if isinstance(before, list | tuple) else [before]
        y, *new = b.trace_function(b, lambda v, s: cell(v, s), [now, list(before)], owner=cell)
        b.scope = scope
        new = [_part(b, reshape(b, s, (None, 1, s.shape[-1]), f"new_{k}"), scope.name.rsplit("/", 1)[0], f"state_{k}")
               for k, s in enumerate(new)]  # fmt: skip
        return reshape(b, y, (None, 1, y.shape[-1]), "result"), new

    return step


def _product(b: Builder, kernel: Any, bias: Any, columns: Sequence[int] | None, row: int | None = None) -> Product:
    """The product with some columns of a kernel, plus those of a bias, or of a row of it."""
    columns = list(range(kernel.shape[-1])) if columns is None else list(columns)
    w, width = as_array(kernel)[:, columns], len(columns)
    shift = np.zeros(width, np.float32) if bias is None else as_array(bias)[... if row is None else row][columns]
    learns = b.scope.learns
    variables = {"kernel": UserWeight.of(kernel, w, learns), "bias": UserWeight.of(bias, shift, learns)}

    def product(x: Node, suffix: str) -> Node:
        shape = (*x.shape[:-1], width)
        return b.emit("dense", x, weights={"kernel": w, "bias": shift}, variables=variables, suffix=suffix, shape=shape)

    return product


def _sum(b: Builder, name: str, given: Node, h: Node | None, inner: Product, part: str) -> Node:
    """What the input and the state before contribute."""
    if h is None:
        return given
    return b.emit("add", given, inner(h, f"{part}_inner"), suffix=part)


def _part(b: Builder, node: Node, name: str, part: str) -> Node:
    return b.replace(node.with_attrs(part_of=f"{name}/{part}"))


def _activated(b: Builder, function: Any, x: Node, suffix: str) -> Node:
    scope = b.scope
    b.scope = replace(scope, name=f"{scope.name}/{suffix}")
    y = activate(b, function, x)
    b.scope = scope
    return y


def _choose(b: Builder, visible: Node, new: Node, old: Node | None, suffix: str) -> Node:
    """`new` where the step is visible, else `old`, on the grid of the part that `new` plays."""
    parts = {k: v for k, v in new.attrs.items() if k in ("part_of", "wide")}
    if old is None:
        old = b.replace(b.const(np.zeros((1, new.shape[-1] or 1))).with_attrs(**parts))
    return b.emit("select", visible, new, old, suffix=suffix, shape=new.shape, **parts)


def _given(b: Builder, layer: Any, state: Node, index: int) -> Node:
    """A state that is given; an input of the model has the grid of the state that the model returns."""
    if state.op == "input" and isinstance(layer, (L.LSTM, L.GRU, L.SimpleRNN)):
        state = _part(b, state, b.scope.name, ("hidden", "cell")[index])
        state = b.replace(state.with_attrs(wide=True)) if index else state
    return _moved(b, state, (None, 1, state.shape[-1]), f"state_{index}")


def _moved(b: Builder, x: Node, shape: tuple[int | None, ...], suffix: str) -> Node:
    """A reshape that keeps the bits."""
    y = reshape(b, x, shape, suffix)
    return b.replace(y.with_attrs(wide=True)) if x.attrs.get("wide") and y is not x else y


def _as_mask(mask: Any) -> Node:
    mask = mask[0] if isinstance(mask, list | tuple) else mask
    if not isinstance(mask, Node) or mask.dtype != "bool" or len(mask.shape) != 2:
        raise NotLowered("a mask that is not one truth value for every step")
    return mask


def _zeros(b: Builder, x: Node, start: np.ndarray, name: str) -> Node:
    """A state [batch, 1, width] of constants, from any number of the sample (within 0 and 1, whatever it is)."""
    number = slice_axis(b, slice_axis(b, x, 1, 0, 1, "first"), 2, 0, 1, "number")
    number = b.emit("logistic", number, suffix="bounded")
    zeros = b.emit("mul", number, b.const(np.zeros(len(start))), suffix="zeros")
    if np.any(start):
        return b.emit("add", zeros, b.const(start), suffix="start")
    return _part(b, zeros, name, "hidden")


def _flat(b: Builder, x: Node, suffix: str) -> Node:
    """[batch, 1, width] as [batch, width]."""
    return _moved(b, x, (None, x.shape[-1]), suffix)


def _warn_of_dropout(b: Builder, cell: Any) -> None:
    if b.training and (cell.dropout or cell.recurrent_dropout):
        warnings.warn(
            f"Layer {b.scope.origin!r}: dropout inside a recurrent layer is left out in training.", stacklevel=2
        )
