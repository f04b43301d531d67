"""Which grids of a quantized graph learn, and how; and what stays equal while they do."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from kquant.config.quant_config import QuantConfig
from kquant.config.specs import QuantSpec, Training
from kquant.graph.ir import Graph, Node, sample_size
from kquant.graph.ops import op_of, weight_of, weight_view
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.keras.model import Learning
from kquant.qat.batch_norm import batch_norm_layers
from kquant.quantize.layer_specs import resolve
from kquant.quantize.plan import share_grids
from kquant.targets.target import Target, get_target


def learning_of(qgraph: QuantizedGraph, config: QuantConfig, training: Training) -> Learning:
    """How the grids of `qgraph` learn.

    Args:
        qgraph: what is trained.
        config: its specs; what they want symmetric, or a power of two, stays so.
        training: how.
    """
    graph, target = qgraph.graph, get_target(config.target)
    specs = resolve(graph, config)
    weights = {}
    for name, q in qgraph.weights.items():
        if q is not None and not op_of(graph[name]).lookup and graph[name].learns:
            elements = np.size(graph[name].weights[weight_of(graph[name]).name]) // np.size(q.scale)
            weights[name] = _settings(_symmetric(training.gradient, specs[name].weights), training, elements, q)
    groups = _groups(qgraph, target)
    grids = {}
    for members in groups:
        settings: Mapping[str, Any] = {}
        node, q = graph[members[0]], qgraph.activations[members[0]]
        frozen = all(not graph[name].learns for name in members if not _shares(graph[name], target))
        if (
            q is not None
            and not frozen
            and not any(_is_given(graph[name], qgraph.activations[name], target) for name in members)
        ):
            gradient = _asymmetric(training.gradient, node, q, specs[node.name].activations)
            settings = _settings(gradient, training, sample_size(node), q)
        grids.update(dict.fromkeys(members, settings))
    owners = [tuple(n for n in members if not _shares(graph[n], target)) for members in groups]
    return Learning(
        weights=weights,
        grids=grids,
        tied_weights=_shared_weights(graph),
        layer=batch_norm_layers(qgraph, training),
        tied_grids=tuple(names for names in owners if len(names) > 1),
        relative_weights=training.relative_weights,
        keep_zeros=config.keeps_zeros,
    )


def zero_ranges(qgraph: QuantizedGraph, config: QuantConfig, zero: Collection[str] = ()) -> list[str]:
    """The layers (names of the user's) with weights, or an output over the calibration data, that are all zero.

    A range of zero width has scale 1 (`affine.grid_from_range`), which says nothing about the values to come. Scales
    that were given, or are rounded to powers of two, may be 1 in good faith.

    Args:
        qgraph: grids as calibrated.
        config: what was asked for.
        zero: `Quantization.zero`; such tensors may have the scale of their neighbours.
    """
    graph, target, specs = qgraph.graph, get_target(config.target), resolve(qgraph.graph, config)
    dead = [n for n, q in qgraph.weights.items() if q is not None and not np.any(weight_view(graph[n]))]
    for members in _groups(qgraph, target):
        q, spec = qgraph.activations[members[0]], specs[members[0]].activations
        if q is None or spec is None or spec.range is not None or spec.power_of_two:
            continue
        empty = float(q.scale) == 1.0 and int(q.zero_point) == (0 if spec.symmetric and spec.signed else q.qmin)
        empty = empty or not set(zero).isdisjoint(members)
        if empty and not any(_is_given(graph[name], q, target) for name in members):
            dead.append(members[0])
    return sorted({graph[name].origin or name for name in dead})


def _settings(gradient: str, training: Training, elements: int, q: Grid) -> Mapping[str, Any]:
    if gradient == "ste":
        return {}
    levels = max(q.qmax - int(np.max(q.zero_point)), 1)
    return {"gradient": gradient, "rate": training.rate, "elements": elements, "levels": levels}


def _symmetric(gradient: str, spec: QuantSpec | None) -> str:
    """The gradient of a grid whose zero point stays: its scale is all that can learn."""
    if spec is not None and spec.power_of_two and gradient != "ste":
        return "tqt"
    return {"lsq+": "lsq", "min_max": "symmetric"}.get(gradient, gradient)


def _asymmetric(gradient: str, node: Node, q: Grid | None, spec: QuantSpec | None) -> str:
    """The gradient of an activation's grid; the zero point of one that starts or ends at zero stays."""
    if q is None or spec is None or spec.symmetric:
        return _symmetric(gradient, spec)
    moves = q.qmin < int(q.zero_point) < q.qmax and "clip" not in node.attrs
    return "lsq" if gradient == "lsq+" and not moves else gradient


def _is_given(node: Node, q: Grid | None, target: Target) -> bool:
    """Whether the grid of a tensor is dictated: by the target, or by values that do not train."""
    return q is None or op_of(node).given or target.fixed_output(node.op, q.container) is not None


def _shares(node: Node, target: Target) -> bool:
    return node.op in target.same_scale | target.inputs_share_output


def _groups(qgraph: QuantizedGraph, target: Target) -> list[tuple[str, ...]]:
    """The tensors that have one grid, in the order of the graph."""
    integer = {name for name, q in qgraph.activations.items() if q is not None}
    members: dict[str, list[str]] = {}
    for name, leader in share_grids(qgraph.graph, integer, target).items():
        members.setdefault(leader, []).append(name)
    return [tuple(names) for names in members.values()]


def _shared_weights(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """Nodes that are calls of one layer of the user's: the same origin, operation and weights."""
    groups: dict[Any, list[Node]] = {}
    for node in graph:
        if node.weights and node.op != "const":
            groups.setdefault((node.origin, node.op, node.attrs.get("part"), *_shapes(node)), []).append(node)
    return tuple(names for nodes in groups.values() for names in _equal(nodes))


def _shapes(node: Node) -> Iterable[Any]:
    return ((name, np.shape(value)) for name, value in sorted(node.weights.items()))


def _equal(nodes: list[Node]) -> Iterable[tuple[str, ...]]:
    """The nodes whose weights are equal, as groups of more than one."""
    rest = list(nodes)
    while rest:
        first, *rest = rest
        same = [n for n in rest if all(np.array_equal(w, n.weights[k]) for k, w in first.weights.items())]
        if same:
            yield first.name, *(n.name for n in same)
        rest = [n for n in rest if n not in same]
