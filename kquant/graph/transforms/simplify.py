"""Removing operations that only move data without need, and choosing the simpler of two."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kquant.graph.ir import Graph, Node

ELEMENTWISE = frozenset({"clip", "leaky_relu", "logistic", "tanh", "elu", "gelu", "hard_swish"})


def simplify(graph: Graph) -> Graph:
    """The same function without needless reshapes, transposes, slices, pads and double clips.

    * operations that change nothing are dropped;
    * consecutive reshapes, transposes and clips become one;
    * a reshape in front of an elementwise operation is moved behind it, so that a one-dimensional
      convolution (a convolution between two reshapes) meets its batch normalization and activation,
      and the reshapes between two such convolutions cancel;
    * an average pooling of whole images becomes a mean.
    """
    changed = True
    while changed:
        changed = False
        for node in list(graph):
            if node.name not in graph.nodes:
                continue
            for rule in RULES:
                rewritten = rule(graph, graph[node.name])
                if rewritten is not None:
                    graph, changed = rewritten, True
                    break
    return graph


def _drop(graph: Graph, node: Node) -> Graph | None:
    """Remove an operation that returns its input."""
    if len(node.inputs) != 1:
        return None
    source, a = graph[node.inputs[0]], node.attrs
    same = {
        "reshape": lambda: node.shape == source.shape,
        "transpose": lambda: tuple(a["perm"]) == tuple(range(len(node.shape))),
        "slice": lambda: node.shape == source.shape and all(s == 1 for s in a["strides"]),
        "pad": lambda: not np.any(a["paddings"]),
        "requantize": lambda: True,
    }
    if node.op not in same or not same[node.op]():
        return None
    return graph.rebuild([n for n in graph if n.name != node.name], {node.name: source.name})


def _merge(graph: Graph, node: Node) -> Graph | None:
    """Let a reshape, transpose or clip read through the one before it."""
    if node.op not in ("reshape", "transpose", "clip"):
        return None
    first = graph[node.inputs[0]]
    if first.op != node.op:
        return None
    if node.op == "clip" and graph.sole_consumer(first.name) is None:
        return None  # both clips are needed anyway
    merged = node.with_(inputs=first.inputs)
    if node.op == "transpose":
        merged = merged.with_attrs(perm=tuple(first.attrs["perm"][p] for p in node.attrs["perm"]))
    elif node.op == "clip":
        lo, hi = node.attrs["lo"], node.attrs["hi"]

        def outer(v: float | None) -> float | None:
            if v is not None and lo is not None:
                v = max(v, lo)
            return v if v is None or hi is None else min(v, hi)

        low, high = outer(first.attrs["lo"]), outer(first.attrs["hi"])
        merged = merged.with_attrs(lo=lo if low is None else low, hi=hi if high is None else high)
    return graph.rebuild([merged if n.name == node.name else n for n in graph])


def _sink_reshape(graph: Graph, node: Node) -> Graph | None:
    """f(reshape(x)) = reshape(f(x)) for elementwise f, and for an affine if the reshape keeps the last axis."""
    if node.op not in ELEMENTWISE | {"affine"}:
        return None
    moved = graph[node.inputs[0]]
    if moved.op != "reshape" or graph.sole_consumer(moved.name) is None:
        return None
    source = graph[moved.inputs[0]]
    if node.op == "affine" and source.shape[-1] != moved.shape[-1]:
        return None
    first = node.with_(inputs=(source.name,), shape=source.shape)
    then = moved.with_(inputs=(first.name,), stats={})
    nodes: list[Node] = []
    for n in graph:
        if n.name == node.name:
            nodes += [first, then]
        elif n.name != moved.name:
            nodes.append(n.with_(inputs=tuple(moved.name if i == node.name else i for i in n.inputs)))
    outputs = tuple(moved.name if o == node.name else o for o in graph.outputs)
    return Graph(
        nodes={n.name: n for n in nodes},
        inputs=graph.inputs,
        outputs=outputs,
        input_names=graph.input_names,
        output_names=graph.output_names,
        name=graph.name,
    )


def _average_of_all(graph: Graph, node: Node) -> Graph | None:
    """Make an average pooling of whole images a mean: its output is on a grid of its own, not on that of the input.

    An average needs smaller steps than what it averages, most of all where the input has few bits.
    """
    if node.op != "avg_pool2d" or node.attrs["padding"] != "valid":
        return None
    source = graph[node.inputs[0]]
    if tuple(node.attrs["pool_size"]) != source.shape[1:3]:
        return None
    mean = node.with_(op="mean", attrs={"axes": (1, 2), "keepdims": True})
    return graph.rebuild([mean if n.name == node.name else n for n in graph])


RULES: tuple[Callable[[Graph, Node], Graph | None], ...] = (_drop, _merge, _sink_reshape, _average_of_all)


def absorb_padding(graph: Graph) -> Graph:
    """Turn zero padding in front of a "valid" convolution into "same" padding where that is the same thing."""
    for node in list(graph):
        if node.op not in ("conv2d", "depthwise_conv2d") or node.attrs["padding"] != "valid":
            continue
        pad = graph[graph[node.name].inputs[0]]
        if pad.op != "pad" or pad.attrs["mode"] != "constant" or pad.attrs["value"] != 0:
            continue
        if _equals_same(node, pad, graph[pad.inputs[0]]):
            same = graph[node.name].with_attrs(padding="same").with_(inputs=pad.inputs)
            graph = graph.rebuild([same if n.name == node.name else n for n in graph])
    return graph


def _equals_same(node: Node, pad: Node, source: Node) -> bool:
    """Whether "same" padding of `source` makes the convolution read what it reads from `pad`.

    "same" has ceil(size / stride) outputs and puts half (rounded down) of the
    max((out - 1) * stride + (k - 1) * dilation + 1 - size, 0) zeros in front. How many zeros stand
    behind does not matter where the number of outputs is equal.
    """
    if any(pad.attrs["paddings"][0]) or any(pad.attrs["paddings"][3]):
        return False
    for axis in (1, 2):
        size, stride, out = source.shape[axis] or 0, node.attrs["strides"][axis - 1], node.shape[axis] or 0
        reach = (node.weights["kernel"].shape[axis - 1] - 1) * node.attrs["dilation"][axis - 1] + 1
        total = max((out - 1) * stride + reach - size, 0)
        if out != -(-size // stride) or pad.attrs["paddings"][axis][0] != total // 2:
            return False
    return True
