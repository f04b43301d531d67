"""What every operation needs to write itself: tensors of nodes, constants, conversions, operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kquant.errors import ExportError
from kquant.graph.ir import Node, Shape
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid, quantize
from kquant.targets.builtin import Use
from kquant.targets.kernel import Kernel
from kquant.targets.litert.arithmetic import Activation
from kquant.targets.litert.clamps import Clamp
from kquant.targets.litert.flatbuffer import FileGrid, FlatbufferBuilder
from kquant.targets.target import Target

MODES = ("integer", "float32", "float16", "dynamic_range", "weight_only")

PADDING = {"same": 0, "valid": 1}


@dataclass(frozen=True, eq=False)
class Sink:
    """Where an operation writes.

    Attributes:
        tensor: index of the output tensor.
        q: its grid, None where the node runs in float.
        fused: the activation to fuse.
    """

    tensor: int
    q: Grid | None
    fused: str = "NONE"

    @property
    def activation(self) -> int:
        """The activation to fuse, as the schema numbers it."""
        return int(Activation[self.fused])


class Emitter:
    """Writes the nodes of a quantized graph, one after the other, into a builder.

    Args:
        qgraph: what to write.
        target: its kernels, and rules for the containers of weights.
        mode: one of `MODES`; in all but "integer" every node runs in float.
        batch: fixed batch size, or None for a batch that a user may resize.
    """

    def __init__(self, qgraph: QuantizedGraph, target: Target, mode: str, batch: int | None) -> None:
        self.graph, self.target, self.mode, self.batch = qgraph.graph, target, mode, batch
        self.builder = FlatbufferBuilder()
        self.tensors: dict[str, int] = {}
        self.constant_bytes = 0
        self.weight_types: dict[str, str] = {}
        self._qgraph = qgraph
        self._floats: dict[str, int] = {}
        self._operators = target.operators

    def grid(self, name: str) -> Grid | None:
        """Grid of a node's output as it is written; None where it is float (or integer ids)."""
        return self._qgraph.activations.get(name) if self.mode == "integer" else None

    def weight_grid(self, name: str) -> Grid | None:
        """Grid of a node's weights as they are written; None where they are not integers."""
        return None if self.mode in ("float32", "float16") else self._qgraph.weights.get(name)

    def kernel(self, node: Node) -> Kernel:
        """What writes a node; variants are for integers."""
        return self.target.kernels[node.op] if self.grid(node.name) is None else self.target.kernel(node)

    def integers(self, name: str) -> np.ndarray:
        """The integers of a node's weights, in the shape of their `weight_view`."""
        return self._qgraph.integers[name]

    def shape(self, node: Node) -> Shape:
        """A node's shape with the batch that the writer was asked for."""
        shape = tuple(node.shape)
        if None in shape[1:]:
            raise ExportError(
                f"{node.name!r}: TFLite needs fixed sizes, found shape {shape}; "
                "build the model with a fixed input shape."
            )
        batch = None if self.batch is None else self.batch * node.batch
        return (batch, *shape[1:]) if shape and shape[0] is None else shape

    def new_tensor(self, node: Node, name: str, shape: Shape, q: Grid | None, dtype: str = "FLOAT32") -> int:
        """An activation tensor of a node: integer where it has a grid, else of type `dtype`."""
        if q is None:
            return self.builder.tensor(name, shape, dtype, batch=node.batch)
        return self.builder.tensor(name, shape, f"INT{q.container}", FileGrid(q.scale, q.zero_point), batch=node.batch)

    def helper(self, node: Node, suffix: str, shape: Shape | None = None, q: Grid | None = None) -> int:
        """An intermediate tensor of a node, "<node>/<suffix>"."""
        shape = self.shape(node) if shape is None else shape
        return self.new_tensor(node, f"{node.name}/{suffix}", shape, q, _dtype(node))

    def constant(self, name: str, values: np.ndarray, dtype: str, grid: FileGrid | None = None) -> int:
        """A constant tensor, whose bytes are counted."""
        index = self.builder.constant(name, values, dtype, grid)
        bits = {"INT4": 4, "INT2": 2, "INT8": 8, "FLOAT16": 16, "INT16": 16, "INT64": 64}.get(dtype, 32)
        self.constant_bytes += (np.asarray(values).size * bits + 7) // 8
        return index

    def indices(self, node: Node, suffix: str, values: Any) -> int:
        """A constant int32 tensor, such as a shape or axes."""
        return self.constant(f"{node.name}/{suffix}", np.asarray(values, np.int32), "INT32")

    def real_constant(self, name: str, values: Any, q: Grid | None) -> int:
        """Real numbers as a constant: quantized on a per-tensor grid, or float32."""
        values = np.asarray(values, np.float32)
        if q is None:
            return self.constant(name, values, "FLOAT32")
        return self.constant(name, quantize(values, q), f"INT{q.container}", FileGrid(q.scale, q.zero_point))

    def read(self, name: str, integer: bool) -> int:
        """The tensor in which a reader finds a node's output: as it is, or dequantized (once) for float readers."""
        if integer or self.graph[name].dtype != "float32" or self.grid(name) is None:
            return self.tensors[name]
        if name not in self._floats:
            node = self.graph[name]
            if node.op == "const":
                self._floats[name] = self.real_constant(f"{name}/float", node.weights["value"], None)
            else:
                self._floats[name] = self.helper(node, "float")
                self.op("DEQUANTIZE", [self.tensors[name]], [self._floats[name]])
        return self._floats[name]

    def op(
        self,
        builtin: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        weights: int | None = None,
        per_channel: bool = False,
        **fields: Any,
    ) -> None:
        """Add an operator, with the version that the types of its tensors ask for.

        Args:
            builtin: the schema's name.
            inputs: tensor indices.
            outputs: tensor indices.
            weights: index of its weights, if it has any.
            per_channel: whether these have a scale per channel.
            **fields: of its options table.

        Raises:
            ExportError: no kernel of the target is written with such an operator.
        """
        b = self.builder
        if builtin not in self._operators:
            name = b.name(outputs[0])
            raise ExportError(f"{name!r} needs the operator {builtin}, which {self.target.name} does not have.")
        record = self._operators[builtin]
        typed = outputs[0] if record.typed_by < 0 else inputs[record.typed_by]
        use = Use(
            dtype=b.dtype(typed),
            weight_dtype="" if weights is None else b.dtype(weights),
            per_channel=per_channel,
            rank=len(b.shape(typed)),
            fields=fields,
        )
        b.operator(builtin, inputs, outputs, record.version(use), record.options, fields)

    def clamp(self, node: Node, clamp: Clamp, source: int, out: Sink) -> None:
        """MAXIMUM and MINIMUM with scalars, or a number per channel, between `source` and the node's own tensor."""
        steps = [("MAXIMUM", "floor", clamp.lower), ("MINIMUM", "ceiling", clamp.upper)]
        steps = [s for s in steps if s[2] is not None]
        for k, (builtin, suffix, bound) in enumerate(steps):
            limit = self._bound(f"{node.name}/{suffix}", bound, out.q)
            last = k == len(steps) - 1
            result = out.tensor if last else self.helper(node, "floored", q=out.q)
            self.op(builtin, [source, limit], [result])
            source = result

    def _bound(self, name: str, value: Any, q: Grid | None) -> int:
        if q is None:
            return self.constant(name, np.asarray(value), "FLOAT32")
        return self.constant(name, np.asarray(value), f"INT{q.container}", FileGrid(q.scale, q.zero_point))


def _dtype(node: Node) -> str:
    return node.dtype.upper()
