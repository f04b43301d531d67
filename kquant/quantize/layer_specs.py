"""What a config says of every node of a graph."""

from __future__ import annotations

from dataclasses import replace

from kquant.config.quant_config import QuantConfig
from kquant.config.specs import LayerSpec
from kquant.graph.decisions import at_outputs
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import linear_of, op_of, weight_view
from kquant.targets.target import Target, get_target

_SMALL = 0.1  # a last layer with less than this share of the weights is small


def resolve(graph: Graph, config: QuantConfig) -> dict[str, LayerSpec]:
    """The config's word on every node; model inputs have a spec of their own."""
    linear = [n.origin for n in graph if op_of(n).matrix]
    first, last = (linear[0], linear[-1]) if linear else (None, None)
    cautious = any(op_of(n).products for n in graph)
    outputs = at_outputs(graph)
    small = _share_of(graph, last) < _SMALL
    specs: dict[str, LayerSpec] = {}
    matched: set[int] = set()
    for node in graph:
        spec = config.resolve(
            node.origin or node.name,
            node.origin_type,
            first=node.origin == first,
            last=node.origin == last,
            small_last=small and node.origin == last,
            depthwise=op_of(node).matrix and linear_of(node).channelwise,
            outputs=node.name in outputs,
        )
        matched.update(spec.matched)
        if node.op == "input":
            spec = replace(spec, activations=spec.activations and config.input_spec)
        spec = _with_method(spec, cautious or node.op == "input")
        specs[node.name] = _widened(spec, node, get_target(config.target))
    origins = {n.origin or n.name: n.origin_type for n in graph}
    config.check_matched(matched, sorted(origins), sorted(set(origins.values())))
    return specs


def _share_of(graph: Graph, origin: str | None) -> float:
    """The share of a layer of the user's in the weights of all matrix products."""
    sizes = [(n.origin, weight_view(n).size) for n in graph if op_of(n).matrix]
    own, total = sum(size for name, size in sizes if name == origin), sum(size for _, size in sizes)
    return own / total if total else 0.0


def _widened(spec: LayerSpec, node: Node, target: Target) -> LayerSpec:
    """16 bits for what adds up over many steps, where the target has them and the config asks for at least 8."""
    wanted = spec.activations
    if not node.attrs.get("wide") or wanted is None or wanted.bits != 8 or 16 not in target.mixed_activation_bits:
        return spec
    if node.op != "input" and target.float_only(node.op, 16):
        return spec
    return replace(spec, activations=replace(wanted, bits=16, symmetric=True, signed=True))


def _with_method(spec: LayerSpec, cautious: bool) -> LayerSpec:
    """The spec, with a range method for "auto".

    Ranges of least squared error cut off what is rare. That is best inside of convolutional networks; those that
    multiply tensors with one another (attention, normalizations) are better off with all of the range, and inputs have
    that of the data (`cautious`).
    """
    own = spec.activations
    if own is None or own.method != "auto":
        return spec
    return replace(spec, activations=replace(own, method="min_max" if cautious or own.bits > 8 else "mse"))
