"""The immutable graph on which every transformation works.

A `Graph` is a float network in a small vocabulary of primitive operations (`graph/ops` lists
them with their attributes and weights). A Keras model of any shape is traced into it
(`graph/tracing`), equivalence transforms map a `Graph` to a `Graph`, and the simulation and the
TFLite writer are both built from it. Weights are float32 numpy arrays inside the nodes, so a
transform never touches the user's model.

A node has exactly one output tensor and the tensor carries the node's name. Layout is NHWC; every
shape starts with the batch dimension, which is None. Where it counts parts of samples, such as frames or windows, the
node's `batch` says how many a sample has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from kquant.graph.training import UserWeight

Shape = tuple[int | None, ...]
_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False, kw_only=True)
class Node:
    """One primitive operation and its output tensor.

    Attributes:
        name: unique in the graph; also the name of the output tensor.
        op: key of `graph.ops.OPS`.
        inputs: names of the nodes whose outputs are read, in order.
        shape: shape of the output, batch first and None (constants have no batch).
        batch: entries of the first axis for every sample of the model's inputs.
        dtype: "float32", or "int32" for ids and other integers, which are never quantized.
        attrs: JSON-able settings of the operation.
        weights: float32 arrays, e.g. kernel and bias.
        stats: statistics of the output that are known without data, e.g. the mean and std of the
            pre-activation that a folded batch normalization leaves behind.
        origin: name of the user's layer (or operation) that this node came from.
        origin_type: its class name.
        call: for op "float" and "train_only", how to run the user's own operation (see `trace.FloatCall`).
        user: weight -> what it is in the user's layer; empty unless the graph was made for training.
        learns: False for a node of a layer that the user froze.
        between: "train_only" nodes that act between the operation and its fused activation.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    shape: Shape = ()
    batch: int = 1
    dtype: str = "float32"
    attrs: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    stats: Mapping[str, np.ndarray] = field(default_factory=dict)
    origin: str = ""
    origin_type: str = ""
    call: Any = None
    user: Mapping[str, UserWeight] = field(default_factory=dict)
    learns: bool = True
    between: tuple[Node, ...] = ()

    def with_(self, **changes: Any) -> Node:
        """A copy with some fields replaced."""
        return replace(self, **changes)

    def with_attrs(self, **changes: Any) -> Node:
        """A copy with some attributes replaced or added."""
        return replace(self, attrs={**self.attrs, **changes})

    def with_weights(self, **changes: np.ndarray) -> Node:
        """A copy with some weights replaced or added."""
        return replace(self, weights={**self.weights, **changes})


def sample_size(node: Node) -> int:
    """Elements of a node's output for one sample."""
    return node.batch * math.prod(d or 1 for d in node.shape)


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in topological order, with the names of the graph's inputs and outputs.

    Attributes:
        nodes: name -> node, each after the nodes that it reads.
        inputs: names of the "input" nodes in the order of the model's inputs.
        outputs: names of the nodes that the model returns (a name may repeat).
        input_names: the names by which a user feeds the inputs.
        output_names: the names of the outputs in signatures.
        name: the model's name.
        input_structure, output_structure: how the model nests them, see `graph.structure`.
        loss_names: the names of the outputs by which Keras finds losses and metrics, where it has any.
    """

    nodes: Mapping[str, Node]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    name: str = "model"
    input_structure: Any = None
    output_structure: Any = None
    loss_names: tuple[str, ...] = ()
    _consumers: Mapping[str, tuple[Node, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        consumers: dict[str, list[Node]] = {name: [] for name in self.nodes}
        seen: set[str] = set()
        for name, node in self.nodes.items():
            if name != node.name:
                raise AssertionError(f"node {node.name!r} is stored under {name!r}")
            for source in dict.fromkeys(node.inputs):
                if source not in seen:
                    raise AssertionError(f"{name!r} reads {source!r} before it is computed")
                consumers[source].append(node)
            seen.add(name)
        object.__setattr__(self, "_consumers", {k: tuple(v) for k, v in consumers.items()})

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def consumers(self, name: str) -> tuple[Node, ...]:
        """The nodes that read `name`, each once."""
        return self._consumers[name]

    def sole_consumer(self, name: str) -> Node | None:
        """The only reader of `name`, or None if several nodes or a model output read it."""
        readers = self._consumers[name]
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def rebuild(self, nodes: Iterable[Node], rename: Mapping[str, str] = _EMPTY) -> Graph:
        """A graph of `nodes`, in topological order, in which readers of a key of `rename` read its value.

        Nodes that no output depends on are dropped, except the graph's inputs.
        """

        def resolve(name: str) -> str:
            while name in rename:
                name = rename[name]
            return name

        def rewired(node: Node) -> Node:
            inputs = tuple(resolve(i) for i in node.inputs)
            return node if inputs == node.inputs else node.with_(inputs=inputs)

        table = {n.name: rewired(n) for n in nodes}
        outputs = tuple(resolve(o) for o in self.outputs)
        needed = set(outputs) | set(self.inputs)
        for name in reversed(table):
            if name in needed:
                needed.update(table[name].inputs)
        return replace(self, nodes={k: v for k, v in table.items() if k in needed}, outputs=outputs)

    def unique_name(self, name: str) -> str:
        """`name`, with a number appended where a node or a weight ("<node>/<key>") has it already."""
        taken = names_of(self)
        if name not in taken:
            return name
        k = 1
        while f"{name}_{k}" in taken:
            k += 1
        return f"{name}_{k}"


def names_of(nodes: Iterable[Node]) -> set[str]:
    """The names that a file has for nodes and for their weights, "<node>/<key>"."""
    return {name for node in nodes for name in (node.name, *(f"{node.name}/{key}" for key in node.weights))}
