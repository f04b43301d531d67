"""Lowering of matrix products: einsum, matmul and dot, with a constant or of two tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kquant.graph.ir import Node
from kquant.graph.tracing.activations import activate
from kquant.graph.tracing.builder import (
    Builder,
    NotLowered,
    as_array,
    lowers_layer,
    lowers_op,
    reshape,
    transpose,
)
from kquant.graph.tracing.linear import constant_kernel, output_shape
from kquant.graph.training import UserWeight

L = keras.layers


@lowers_layer(L.EinsumDense)
def einsum_dense(b: Builder, layer: Any, x: Node) -> Node:
    bias = as_array(layer.bias) if layer.bias is not None else None
    y = contract(b, layer.equation, x, as_array(layer.kernel), bias, {"kernel": layer.kernel, "bias": layer.bias})
    return activate(b, layer.activation, y)


def contract(
    b: Builder,
    equation: str,
    x: Node,
    w: np.ndarray,
    bias: np.ndarray | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Node:
    """einsum(equation, x, w) + bias with a constant second operand, as a dense operation.

    Every label is either free in x, free in w, or summed over in both; x is permuted and reshaped to
    [batch, free, summed], w to [summed, free], and the product back to the order of the output. Labels of all three
    are groups, each with a matrix of its own.

    Args:
        b: the builder.
        equation: "<x>,<w>-><output>", an ellipsis allowed in x and output.
        x: the tensor.
        w: the constant.
        bias: constant that broadcasts against the output.
        variables: the user's "kernel" and "bias", where w and bias are those.

    Raises:
        NotLowered: the batch is not first, or the equation has another form.
    """
    xs, ws, out = _labels(equation, len(x.shape))
    summed = [c for c in xs if c in ws and c not in out]
    free_x, free_w = [c for c in xs if c not in summed], [c for c in ws if c not in summed]
    if set(xs) & set(ws) & set(out):
        y = _contract_groups(b, xs, ws, out, x, w, (variables or {}).get("kernel"))
        return y if bias is None else b.emit("add", y, b.const(bias, (variables or {}).get("bias")), suffix="bias")
    if set(free_x + free_w) != set(out) or out[0] != xs[0] or not summed:
        raise NotLowered(f"the equation {equation!r} is not a matrix product with a constant")
    sizes = {**dict(zip(ws, w.shape, strict=True)), **dict(zip(xs, x.shape, strict=True))}
    x = transpose(b, x, [xs.index(c) for c in free_x + summed])
    x = reshape(b, x, (*(sizes[c] for c in free_x), int(np.prod([sizes[c] for c in summed]))))
    order_w = [ws.index(c) for c in summed + free_w]
    kernel = w.transpose(order_w).reshape(int(x.shape[-1] or 0), -1)
    order = [(free_x + free_w).index(c) for c in out]
    fused, rest = _split_bias(bias, out, free_w, sizes)
    own = dict(variables or {"bias": None})
    if "kernel" in own:
        own["kernel"] = UserWeight.of(own["kernel"], kernel, b.scope.learns, order=tuple(order_w))
    shift, own["bias"] = own["bias"], own["bias"] if rest is None else None
    y = b.emit("dense", x, weights={"kernel": kernel, "bias": fused}, variables=own)
    y = reshape(b, y, [sizes[c] for c in free_x + free_w], "split")
    y = transpose(b, y, order, "order")
    return y if rest is None else b.emit("add", y, b.const(rest, shift), suffix="bias")


def _labels(equation: str, rank: int) -> tuple[str, str, str]:
    equation = equation.replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != 2 or "." in terms[1]:
        raise NotLowered(f"the equation {equation!r} is not a matrix product with a constant")
    spare = "".join(c for c in "ABCDEFGHIJKLMNOP" if c not in equation)
    dots = spare[: rank - len(terms[0].replace("...", ""))]
    xs, ws, out = terms[0].replace("...", dots), terms[1], out.replace("...", dots)
    if any(len(set(t)) != len(t) for t in (xs, ws, out)) or not out:
        raise NotLowered(f"the equation {equation!r} repeats a label")
    return xs, ws, out


def _split_bias(
    bias: np.ndarray | None, out: str, free_w: list[str], sizes: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The bias as a vector over the free labels of w, or zeros and the bias as it is."""
    columns = [sizes[c] for c in free_w]
    zeros = np.zeros(int(np.prod(columns)), np.float32)
    if bias is None:
        return zeros, None
    full = bias.reshape((1,) * (len(out) - bias.ndim) + bias.shape)
    if any(d != 1 and c not in free_w for c, d in zip(out, full.shape, strict=True)):
        return zeros, full[0]
    order = [out.index(c) for c in free_w]
    rows = full.transpose([i for i in range(len(out)) if i not in order] + order).reshape(
        [full.shape[i] for i in order]
    )
    return np.broadcast_to(rows, columns).reshape(-1), None


def contract_two(b: Builder, equation: str, x: Node, y: Node) -> Node:
    """einsum(equation, x, y) of two tensors, as products of matrices.

    Raises:
        NotLowered: the batch is not first in all three, or a label is summed over in one of them alone.
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    xs, _, ys = left.partition(",")
    if not arrow or "." in equation or any(len(set(t)) != len(t) for t in (xs, ys, out)):
        raise NotLowered(f"the equation {equation!r} is not a product of matrices")
    sizes = {**dict(zip(xs, x.shape, strict=True)), **dict(zip(ys, y.shape, strict=True))}
    both = [c for c in xs if c in ys]
    batch, summed = [c for c in both if c in out], [c for c in both if c not in out]
    free_x, free_y = [c for c in xs if c not in ys], [c for c in ys if c not in xs]
    if not batch or not xs[0] == ys[0] == out[0:1] or set(out) != {*batch, *free_x, *free_y}:
        raise NotLowered(f"the equation {equation!r} is not a product of matrices of each sample")

    def matrices(t: Node, labels: str, rows: list[str], columns: list[str], suffix: str) -> Node:
        t = transpose(b, t, [labels.index(c) for c in (*batch, *rows, *columns)], f"{suffix}_order")
        groups = [math.prod(int(sizes[c] or 1) for c in batch[1:])] if batch[1:] else []
        shape = [None, *groups, *(math.prod(int(sizes[c] or 1) for c in part) for part in (rows, columns))]
        return reshape(b, t, shape, f"{suffix}_matrices")

    z = b.emit("batch_matmul", matrices(x, xs, free_x, summed, "first"), matrices(y, ys, summed, free_y, "second"))
    z = reshape(b, z, [sizes[c] for c in (*batch, *free_x, *free_y)], "split")
    return transpose(b, z, [[*batch, *free_x, *free_y].index(c) for c in out], "order")


@lowers_layer(L.Dot)
def dot_layer(b: Builder, layer: Any, inputs: Sequence[Any]) -> Node:
    x, y = inputs
    if layer.normalize or not (isinstance(x, Node) and isinstance(y, Node)):
        raise NotLowered("a product of normalized vectors, or with a constant")
    axes = layer.axes if isinstance(layer.axes, list | tuple) else (layer.axes, layer.axes)
    first, second = (int(a) % len(t.shape) for a, t in zip(axes, inputs, strict=True))
    xs, ys = list("bcdefgh"[: len(x.shape)]), list("bijklmn"[: len(y.shape)])
    xs[first] = ys[second] = "z"
    out = "b" + "".join(c for c in (*xs[1:], *ys[1:]) if c != "z")
    return reshape(b, contract_two(b, f"{''.join(xs)},{''.join(ys)}->{out}", x, y), output_shape(b))


@lowers_op("Matmul")
def matmul(b: Builder, op: Any, x1: Any, x2: Any) -> Node:
    if isinstance(x1, Node) and isinstance(x2, Node):
        return _of_two(b, x1, x2)
    if isinstance(x1, Node):
        w = as_array(x2)
        if w.ndim == 2:
            weights = {"kernel": w, "bias": np.zeros(w.shape[1], np.float32)}
            return b.emit("dense", x1, weights=weights, variables=constant_kernel(x2))
        raise NotLowered(f"its constant has shape {w.shape}")
    w, rank = as_array(x1), len(x2.shape)
    if w.ndim != 2 or rank < 3:
        raise NotLowered(f"a constant of shape {w.shape} times a tensor of rank {rank}")
    return contract(b, "...kn,mk->...mn", x2, w, variables=constant_kernel(x1))


def _of_two(b: Builder, x1: Node, x2: Node) -> Node:
    """The product of two computed tensors, matrix by matrix."""
    if len(x1.shape) != len(x2.shape) or len(x1.shape) < 3 or x1.shape[:-2] != x2.shape[:-2]:
        raise NotLowered(f"it multiplies matrices of tensors of shapes {x1.shape} and {x2.shape}")
    return b.emit("batch_matmul", x1, x2)


@lowers_op("Dot")
def dot(b: Builder, op: Any, x1: Any, x2: Any) -> Node:
    return matmul(b, op, x1, x2)


@lowers_op("Einsum")
def einsum(b: Builder, op: Any, *operands: Any) -> Node:
    if len(operands) != 2 or not any(isinstance(o, Node) for o in operands):
        raise NotLowered("it is not a product of two")
    if all(isinstance(o, Node) for o in operands):
        return contract_two(b, op.subscripts, *operands)
    left, _, out = op.subscripts.replace(" ", "").partition("->")
    first, _, second = left.partition(",")
    x, w = operands if isinstance(operands[0], Node) else operands[::-1]
    equation = f"{left}->{out}" if x is operands[0] else f"{second},{first}->{out}"
    return contract(b, equation, x, as_array(w), variables=constant_kernel(w))


def _contract_groups(b: Builder, xs: str, ws: str, out: str, x: Node, w: np.ndarray, variable: Any) -> Node:
    """einsum("xs,ws->out", x, w) with a constant of a matrix for each of some groups: heads, say.

    Raises:
        NotLowered: it differs between samples, or the equation has another form.
    """
    if ws[:1] == xs[0] and w.shape[0] == 1:
        ws, w, variable = ws[1:], w[0], None
    summed = [c for c in xs if c in ws and c not in out]
    groups = [c for c in xs if c in ws and c in out]
    free_x, free_w = [c for c in xs[1:] if c not in ws], [c for c in ws if c not in xs]
    if xs[0] in ws or out[0] != xs[0] or set(out) != {xs[0], *groups, *free_x, *free_w} or not summed:
        raise NotLowered(f"the equation '{xs},{ws}->{out}' is not a matrix product with a constant")
    sizes = {**dict(zip(ws, w.shape, strict=True)), **dict(zip(xs, x.shape, strict=True))}

    def size(labels: Sequence[str]) -> int:
        return math.prod(int(sizes[c] or 1) for c in labels)

    x = transpose(b, x, [xs.index(c) for c in (xs[0], *groups, *free_x, *summed)])
    x = reshape(b, x, (None, *map(size, (groups, free_x, summed))))
    order = tuple(ws.index(c) for c in (*groups, *summed, *free_w))
    matrices = w.transpose(order).reshape([size(part) for part in (groups, summed, free_w)])
    own = None if variable is None else UserWeight.of(variable, matrices, b.scope.learns, order=order)
    y = b.emit("batch_matmul", x, b.const(matrices, own), suffix="groups")
    made = [xs[0], *groups, *free_x, *free_w]
    return transpose(b, reshape(b, y, [sizes[c] for c in made], "split"), [made.index(c) for c in out], "order")
