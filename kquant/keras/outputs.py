"""`select_outputs`: a quantized model without some of its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from kquant.errors import ModelError
from kquant.graph.ir import Graph
from kquant.graph.quantized import QuantizedGraph
from kquant.keras.model import QuantizedModel, extract, insert
from kquant.quantize.record import Quantization

T = TypeVar("T")


def select_outputs(model: QuantizedModel, outputs: str | Sequence[str]) -> QuantizedModel:
    """The quantized model that returns some outputs only, and computes nothing else.

    For models that return more in training than when deployed: logits that a loss reads beside a mask, auxiliary heads,
    states. Grids and integers are those of `model`, which is not modified; what `prepare_qat` made trains no further.

    Args:
        model: the result of `quantize_model` or `prepare_qat`.
        outputs: a name or names; the new model returns one as a tensor, several as a dict by these names. Names are the
            keys of a model that returns a dict, or `model.output_names`.

    Raises:
        ModelError: there is no output of that name, or none is asked for.
    """
    qgraph = extract(model)
    graph, names = qgraph.graph, [outputs] if isinstance(outputs, str) else list(outputs)
    at = {**{n: k for k, n in enumerate(model.output_names)}, **{n: k for k, n in enumerate(graph.output_names)}}
    if not names or len(set(names)) < len(names) or any(name not in at for name in names):
        known = ", ".join(map(repr, graph.output_names))
        raise ModelError(f"Cannot select the outputs {names} of {model.name!r}: name each of {known} at most once.")
    kept = _only(graph, names, [at[name] for name in names])
    return insert(_part(qgraph, kept), _restricted(model.quantization, kept))


def _only(graph: Graph, names: Sequence[str], positions: Sequence[int]) -> Graph:
    """The part of a graph that some outputs depend on."""
    fewer = replace(
        graph,
        outputs=tuple(graph.outputs[k] for k in positions),
        output_names=tuple(names),
        output_structure=None if len(names) == 1 else {name: k for k, name in enumerate(names)},
        loss_names=(),
    )
    return fewer.rebuild(fewer)


def _part(qgraph: QuantizedGraph, graph: Graph) -> QuantizedGraph:
    """What a quantized graph holds of a part of its nodes."""

    def of(table: Mapping[str, T]) -> dict[str, T]:
        return {name: value for name, value in table.items() if name in graph.nodes}

    return QuantizedGraph(graph, of(qgraph.activations), of(qgraph.weights), of(qgraph.integers))


def _restricted(quantization: Quantization, graph: Graph) -> Quantization:
    """What is remembered of the nodes of a graph; their integers are decided."""
    nodes = graph.nodes
    first: dict[str, str] = {}  # of the tensors that share a grid, where the one that they were named by is gone
    shared: dict[str, str] = {}
    for name, owner in quantization.shared.items():
        if name in nodes:
            leader = owner if owner in nodes else first.setdefault(owner, name)
            shared |= {name: leader} if leader != name else {}
    return replace(
        quantization,
        skipped=tuple(s for s in quantization.skipped if s.node in nodes),
        shared=shared,
        fixed=tuple(n for n in quantization.fixed if n in nodes),
        zero=tuple(n for n in quantization.zero if n in nodes),
        damage=tuple(d for d in quantization.damage if d.tensor in nodes),
    )
