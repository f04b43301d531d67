"""Where the ranges of TFMOT go: markers in a graph -> grids of its tensors.

TFMOT has no quantizer behind what moves values only, nor in front of a concatenation, and gives some operations a
grid that their kernel cannot have: an average pool is computed on the grid of its input. So a grid is also that of the
input, or of the concatenation that reads the tensor, and where two grids meet a "requantize" goes between them, as
TensorFlow's converter does it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kquant.graph.ir import Graph, Node
from kquant.grids.grid import Grid
from kquant.keras.tfmot.saved_model import Marker
from kquant.quantize.plan import Plan
from kquant.targets.target import Target

Grids = dict[str, Grid | None]


def place_ranges(graph: Graph, target: Target) -> tuple[Graph, Grids]:
    """The graph without markers, and the grid of every tensor in it, None where TFMOT has none.

    Args:
        graph: prepared, with a "float" node for every `Marker`.
        target: whose kernels tie or fix grids.
    """
    graph, own = _take_markers(graph, target)
    _share_backward(graph, own, target)
    graph, own = _separate(graph, own, target)
    return graph, _spread(graph, own, target)


def same_grid(a: Grid | None, b: Grid | None) -> bool:
    """Whether two tensors have one grid."""
    if a is None or b is None:
        return a is b
    return float(a.scale) == float(b.scale) and int(a.zero_point) == int(b.zero_point)


def _take_markers(graph: Graph, target: Target) -> tuple[Graph, dict[str, Grid]]:
    """Each marker as the grid of the tensor that it reads, or as a "requantize" behind it."""
    own: dict[str, Grid] = {}
    nodes: dict[str, Node] = {}
    rename: dict[str, str] = {}
    for node in graph:
        node = node.with_(inputs=tuple(rename.get(i, i) for i in node.inputs))
        operation = node.call.operation if node.op == "float" else None
        if not isinstance(operation, Marker):
            nodes[node.name] = node
            continue
        source, grid = nodes[node.inputs[0]], operation.range.grid()
        if source.name not in own and source.op not in target.same_scale and _fixed(source, target) is None:
            own[source.name], rename[node.name] = grid, source.name
        elif same_grid(_grid(nodes, source.name, own, target), grid):
            rename[node.name] = source.name
        else:
            nodes[node.name], own[node.name] = _requantize(node.name, source), grid
    return graph.rebuild(nodes.values(), rename), own


def _fixed(node: Node, target: Target) -> Grid | None:
    grid = target.fixed_output(node.op, 8)
    if grid is None:
        return None
    return Grid(np.asarray(grid[0], np.float32), np.asarray(grid[1], np.int32), -128, 127)


def _grid(nodes: Mapping[str, Node], name: str, own: dict[str, Grid], target: Target) -> Grid | None:
    """The grid of a tensor: its own, the target's, or that of what it moves."""
    node = nodes[name]
    if node.op in target.same_scale:
        return _grid(nodes, node.inputs[0], own, target)
    return own.get(name) or _fixed(node, target)


def _requantize(name: str, source: Node) -> Node:
    return Node(
        name=name,
        op="requantize",
        inputs=(source.name,),
        shape=source.shape,
        batch=source.batch,
        attrs={"input_bits": 8},
        origin=source.origin,
        origin_type=source.origin_type,
    )


def _share_backward(graph: Graph, own: dict[str, Grid], target: Target) -> None:
    """What a concatenation reads has its grid, where it has none of its own."""
    for node in reversed(list(graph)):
        if node.op not in target.inputs_share_output or node.name not in own:
            continue
        for source in node.inputs:
            while graph[source].op in target.same_scale:
                source = graph[source].inputs[0]
            if _fixed(graph[source], target) is None:
                own.setdefault(source, own[node.name])


def _separate(graph: Graph, own: dict[str, Grid], target: Target) -> tuple[Graph, dict[str, Grid]]:
    """A "requantize" in front of every concatenation that reads another grid than its own."""
    nodes: dict[str, Node] = {}
    own = dict(own)
    for node in graph:
        inputs = list(node.inputs)
        for k, source in enumerate(inputs):
            if node.op not in target.inputs_share_output or node.name not in own or graph[source].op == "const":
                continue
            grid = _grid(graph.nodes, source, own, target)
            if grid is not None and not same_grid(grid, own[node.name]):
                inputs[k] = f"{node.name}/input_{k}"
                nodes[inputs[k]] = _requantize(inputs[k], graph[source])
                own[inputs[k]] = own[node.name]
        nodes[node.name] = node.with_(inputs=tuple(inputs))
    return graph.rebuild(nodes.values()), own


def _spread(graph: Graph, own: dict[str, Grid], target: Target) -> Grids:
    return {node.name: _grid(graph.nodes, node.name, own, target) for node in graph}


def float_layers(graph: Graph, grids: Grids) -> tuple[str, ...]:
    """The layers that stay float: a tensor that they read or return has no grid.

    Args:
        graph, grids: from `place_ranges`.
    """
    found: dict[str, None] = {}
    for node in graph:
        tensors = [t for t in (node.name, *node.inputs) if graph[t].op != "const" and graph[t].dtype == "float32"]
        if node.op != "const" and any(grids[t] is None for t in tensors):
            found[node.origin or node.name] = None
    return tuple(found)


def activation_grids(plan: Plan, grids: Grids) -> Grids:
    """The grids of a plan's tensors, from those of the graph that was planned.

    Args:
        plan: which nodes run in integers, and the "requantize" nodes that this takes.
        grids: from `place_ranges`.
    """
    leaders: dict[str, Grid] = dict(plan.fixed)
    for name, leader in plan.groups.items():
        node = plan.graph[name]
        added = node.op == "requantize" and name not in grids
        grid = grids[node.inputs[0]] if added and node.attrs["input_bits"] is None else grids.get(name)
        if grid is not None and not same_grid(leaders.setdefault(leader, grid), grid):
            raise AssertionError(f"{name!r} and {leader!r} have one grid in the target and two in TFMOT")
    if missing := sorted(set(plan.groups.values()) - leaders.keys()):
        raise AssertionError(f"no grid is known for {missing}")
    return {n.name: leaders[plan.groups[n.name]] if n.name in plan.groups else None for n in plan.graph}
