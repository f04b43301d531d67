"""What a `QuantizedModel` is beyond its layers: one record, with its (de)serialization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kquant.config.text import plain
from kquant.graph.ir import Node
from kquant.quantize.record import Quantization

_STRUCTURE = ("name", "op", "inputs", "shape", "batch", "dtype", "attrs", "origin", "origin_type")
Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """How a model was quantized, and how its layers make up the graph.

    Attributes:
        quantization: how it was quantized.
        inputs, outputs, input_names, output_names: see `graph.ir.Graph`.
        order: names of all nodes, in topological order.
        float_nodes: node that runs the user's own operation -> the node, and the operation's name in the model.
        plain_inputs: inputs that are not quantized -> the node.
        tied_weights: groups of nodes that have one weight: calls of one layer.
        tied_grids: groups of nodes (and constants) that have one grid while they learn.
        input_structure, output_structure, loss_names: see `graph.ir.Graph`.
    """

    quantization: Quantization
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    order: tuple[str, ...]
    float_nodes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    plain_inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tied_weights: Groups = ()
    tied_grids: Groups = ()
    input_structure: Any = None
    output_structure: Any = None
    loss_names: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers: `from_dict` gives the same record back."""
        structure = {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name != "quantization"}
        return {**self.quantization.to_dict(), "structure": structure}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelRecord:
        """The inverse of `to_dict`; reads what version 0.1.0 wrote, too."""
        structure = dict(values["structure"])
        tied = values.get("tied", {})  # version 0.1.0
        for kind in ("weights", "grids"):
            structure[f"tied_{kind}"] = tuple(map(tuple, structure.get(f"tied_{kind}", tied.get(kind, ()))))
        for name in ("inputs", "outputs", "input_names", "output_names", "order", "loss_names"):
            structure[name] = tuple(structure.get(name, ()))
        return cls(quantization=Quantization.from_dict(values), **structure)


def node_to_dict(node: Node) -> dict[str, Any]:
    """The node as JSON, with the shapes of its weights in place of their values."""
    structure = {k: getattr(node, k) for k in _STRUCTURE}
    shapes = {k: list(getattr(v, "shape", v)) for k, v in node.weights.items()}
    return {**structure, "attrs": dict(node.attrs), "weights": shapes}


def node_from_dict(config: Mapping[str, Any]) -> Node:
    """The inverse of `node_to_dict`."""
    tuples = {k: tuple(config[k]) for k in ("inputs", "shape")}
    return Node(**{**config, **tuples})
