"""Fusing elementwise operations into functions of one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Set

from kquant.graph.ir import Graph, Node
from kquant.graph.ops import clip_of, op_of
from kquant.graph.ops.functions import Program, inline
from kquant.graph.transforms.bound_masks import unbounded_masks


def fuse_functions(graph: Graph) -> Graph:
    """The same graph with as few "function" nodes as their neighbours leave.

    An 8-bit kernel computes a function of one tensor exactly, whatever it is, with one rounding. So a function takes in
    the elementwise operations in front of it and behind it, as far as the whole is a function of one tensor: in
    x * tanh(log(1 + exp(x))) all of them. Chains that have kernels of their own are left alone, and so are large masks.

    Args:
        graph: a float graph whose activations are fused.
    """
    apart = set(unbounded_masks(graph))
    for node in list(graph):
        if node.name not in graph.nodes or program_of(node) is None or node.dtype != "float32" or node.name in apart:
            continue
        chain = _chain(graph, node, apart)
        if chain is None:
            continue
        steps, source = chain
        fused = node.with_(op="function", inputs=(source,), attrs={"steps": steps}, weights={})
        graph = graph.rebuild([fused if n.name == node.name else n for n in graph])
    return graph


def program_of(node: Node) -> Program | None:
    """What a node computes, its fused activation included, as a program of its inputs; None where it is none."""
    steps, (lo, hi) = op_of(node).program(node), clip_of(node)
    if steps is None or node.op == "clip":
        return steps
    for name, bound in (("maximum", lo), ("minimum", hi)):
        if isinstance(bound, list | tuple):
            return None
        if bound is not None:
            steps = (*steps, (name, len(node.inputs) + len(steps) - 1, float(bound)))
    return steps


def _chain(graph: Graph, last: Node, apart: Set[str]) -> tuple[Program, str] | None:
    """The longest function of one tensor that ends in `last` and needs a table: its program, and the tensor."""
    order = {name: k for k, name in enumerate(graph.nodes)}
    inside, cut = {last.name: last}, None
    frontier = {i for i in last.inputs if _scalar(graph[i]) is None}
    while frontier:
        if len(frontier) == 1 and len(inside) > 1 and any(n.op == "function" for n in inside.values()):
            (source,) = frontier
            if graph[source].dtype == "float32" and graph[source].shape == last.shape:
                cut = source, dict(inside)
        name = max(frontier, key=order.__getitem__)
        node = graph[name]
        readers = {n.name for n in graph.consumers(name)}
        if (
            name in graph.outputs
            or name in apart
            or not readers <= inside.keys()
            or node.shape != last.shape
            or not node.inputs
            or program_of(node) is None
        ):
            break
        inside[name] = node
        frontier = (frontier - {name}) | {i for i in node.inputs if _scalar(graph[i]) is None}
    if cut is None:
        return None
    source, inside = cut
    steps = _program(graph, last.name, source, inside)
    assert isinstance(steps, tuple), "it ends in an operation"
    return steps, source


def _scalar(node: Node) -> float | None:
    """The number that a constant is, if it is one."""
    value = node.weights["value"] if node.op == "const" else None
    return float(value.reshape(())) if value is not None and value.size == 1 else None


def _program(graph: Graph, name: str, source: str, inside: Mapping[str, Node]) -> Program | int | float:
    """The value of a node as a program of the tensor `source`."""
    if name == source:
        return 0
    if name not in inside:
        constant = _scalar(graph[name])
        assert constant is not None, "what is outside is the source or a constant"
        return constant
    steps = program_of(inside[name])
    assert steps is not None, "only such nodes are taken in"
    return inline(steps, [_program(graph, i, source, inside) for i in inside[name].inputs], 1)
