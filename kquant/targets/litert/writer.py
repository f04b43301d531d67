"""`write_tflite`: a quantized graph as a TFLite file.

Every node becomes one tensor of the node's name (helpers are called "<node>/<what>"), holding the
very integers, scales and zero points of the graph. The kernels' records say how an operation is written,
`legality` what is refused, `clamps` how bounds are enforced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kquant.errors import ExportError
from kquant.graph.ir import Node
from kquant.graph.ops import op_of
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.targets.litert.clamps import (
    Clamp,
    container_range,
    float_clamp,
    integer_bounds,
    integer_clamp,
)
from kquant.targets.litert.emitter import MODES, Emitter, Sink
from kquant.targets.litert.flatbuffer import FileGrid
from kquant.targets.litert.interface import structure_metadata
from kquant.targets.litert.islands import splice_island
from kquant.targets.litert.legality import check, same_grid
from kquant.targets.litert.serialize import serialize
from kquant.targets.litert.target import LITERT
from kquant.targets.storage.constants import Stored
from kquant.targets.target import Storage, Target

IO_TYPES = ("int8", "uint8", "int16", "float32")


@dataclass(frozen=True)
class Row:
    """What one node became.

    Attributes:
        node: its name.
        op: its operation.
        operators: TFLite operators, in order.
        dtype: type of its tensor.
        weights: type of its weights, "" if it has none.
        bytes: size of its constants.
        in_float: whether it returns floats or reads them, as an argmax of what has no integer kernel does.
    """

    node: str
    op: str
    operators: tuple[str, ...]
    dtype: str
    weights: str
    bytes: int
    in_float: bool = False


@dataclass(frozen=True)
class WriteReport:
    """What a file contains.

    Attributes:
        rows: one per node.
        op_counts: TFLite operator -> count, without those that write out constants.
        float_nodes: node that computes in float -> the reason, as far as the caller gave one.
        total_bytes: size of the file.
        stored: how the weights are stored, where `compress` says so.
    """

    rows: tuple[Row, ...]
    op_counts: Mapping[str, int]
    float_nodes: Mapping[str, str]
    total_bytes: int
    stored: tuple[Stored, ...] = ()


def write_tflite(
    qgraph: QuantizedGraph,
    *,
    target: Target = LITERT,
    mode: str = "integer",
    input_type: str | None = None,
    output_type: str | None = None,
    batch: int | None = None,
    description: str = "kquant",
    float_reasons: Mapping[str, str] | None = None,
    compress: str | None = None,
) -> tuple[bytes, WriteReport]:
    """Write a quantized graph as a TFLite file.

    Args:
        qgraph: the graph, its grids and weights.
        target: rules for containers and tied grids.
        mode: "integer", or with float activations: "float32", "float16" (weights), "dynamic_range"
            (int8 weights, inputs quantized at run time), "weight_only" (integers, dequantized).
        input_type: "int8", "uint8", "int16" or "float32"; the graph's own type by default.
        output_type: likewise.
        batch: a fixed batch size; by default 1, which a user may resize unless the target fixes it.
        description: free text in the file.
        float_reasons: node -> why it stays float, for the report.
        compress: how to store the weights, a key of `target.storage`; None for as they are.

    Returns:
        The file's bytes and a report.

    Raises:
        ExportError: something would not run, or would silently compute something else.
    """
    _check_options(mode, input_type, output_type)
    store = None if compress is None else _storage(target, compress, mode)
    if batch is None and target.fixed_batch:
        batch = 1
    writer = _Writer(Emitter(qgraph, target, mode, batch))
    graph = qgraph.graph
    fed: dict[str, int] = {}
    rows = []
    for node in graph:
        check(writer.emitter, node)
        if node.op == "input":
            fed[node.name] = writer.write_input(node, input_type)
        else:
            rows.append(writer.write(node))
    outputs = [writer.write_output(graph[name], output_type) for name in graph.outputs]
    model = writer.emitter.builder.model(
        _named(graph.input_names, graph.inputs, [fed[name] for name in graph.inputs]),
        _named(graph.output_names, graph.outputs, outputs),
        description,
        metadata=structure_metadata(graph.input_structure, graph.output_structure),
    )
    stored = () if store is None else store(model)
    content = serialize(model)
    operators = Counter(writer.emitter.builder.operator_names)
    reasons = float_reasons or {}
    floats = {r.node: reasons.get(r.node, "") for r in rows if r.in_float}
    return content, WriteReport(tuple(rows), dict(operators), floats, len(content), stored)


def _check_options(mode: str, input_type: str | None, output_type: str | None) -> None:
    if mode not in MODES:
        raise ExportError(f"Unknown mode {mode!r}; known are {', '.join(MODES)}.")
    for what, value in (("input_type", input_type), ("output_type", output_type)):
        if value not in (None, *IO_TYPES):
            raise ExportError(f"Unknown {what} {value!r}; known are {', '.join(IO_TYPES)}.")


def _storage(target: Target, compress: str, mode: str) -> Storage:
    """The way of storing weights that a name says."""
    if compress not in target.storage:
        ways = " or ".join(f"compress={name!r}" for name in target.storage)
        raise ExportError(
            f"{target.name} has no weights of compress={compress!r}: it takes {ways or 'weights as they are only'}; "
            "'tflm' is for models of target 'tflm', 'densify' for those of target 'litert'."
        )
    if mode != "integer":
        raise ExportError(f"compress={compress!r} stores integer weights of integer files; found mode={mode!r}.")
    return target.storage[compress]


def _named(names: tuple[str, ...], nodes: tuple[str, ...], tensors: list[int]) -> dict[str, int]:
    named: dict[str, int] = {}
    for name, tensor in zip(names or nodes, tensors, strict=True):
        unique, k = name, 1
        while unique in named:  # a model may return a tensor twice
            unique, k = f"{name}_{k}", k + 1
        named[unique] = tensor
    return named


class _Writer:
    """Writes nodes in topological order; the emitter holds the state."""

    def __init__(self, emitter: Emitter) -> None:
        self.emitter = emitter
        self.reads_float: set[str] = set()

    def write_input(self, node: Node, io_type: str | None) -> int:
        """The input's tensor, and behind it the change to the node's own grid. Returns what the user feeds."""
        e, q = self.emitter, self.emitter.grid(node.name)
        shape = e.shape(node)
        out = e.new_tensor(node, node.name, shape, q, node.dtype.upper())
        e.tensors[node.name] = out
        if q is None:
            _require_float(node, io_type, "input_type")
            return out
        clamp = integer_clamp(q, (None, None), ("NONE",))
        clamps = clamp != Clamp()
        wanted = io_type or f"int{q.container}"
        if wanted == f"int{q.container}":
            if not clamps:
                return out
            source = fed = e.helper(node, "input", shape, q)
        else:
            fed = self._converted(node, q, wanted, "input")
            source = e.helper(node, "unclamped", shape, q) if clamps else out
            e.op("QUANTIZE", [fed], [source])
        if clamps:
            e.clamp(node, clamp, source, Sink(out, q))
        return fed

    def write_output(self, node: Node, io_type: str | None) -> int:
        """The tensor that the user reads: the node's own, or a conversion of it."""
        e, q = self.emitter, self.emitter.grid(node.name)
        if q is None:
            _require_float(node, io_type, "output_type")
            return e.tensors[node.name]
        if io_type in (None, f"int{q.container}"):
            return e.tensors[node.name]
        if io_type == "float32":
            return e.read(node.name, integer=False)
        source = e.tensors[node.name]
        if io_type == "uint8" and q.container == 16:  # QUANTIZE has no int16 -> uint8
            middle = self._converted(node, q, "int8", "int8")
            e.op("QUANTIZE", [source], [middle])
            source = middle
        result = self._converted(node, q, str(io_type), "output")
        e.op("QUANTIZE", [source], [result])
        return result

    def _converted(self, node: Node, q: Grid, io_type: str, suffix: str) -> int:
        """A tensor of another type at the edge of the graph."""
        name, shape = f"{node.name}/{suffix}", self.emitter.shape(node)
        if io_type == "float32":
            return self.emitter.builder.tensor(name, shape, "FLOAT32", batch=node.batch)
        return self.emitter.builder.tensor(name, shape, io_type.upper(), _edge_grid(q, io_type), batch=node.batch)

    def write(self, node: Node) -> Row:
        """Write one node behind those that it reads."""
        e = self.emitter
        start, constants = len(e.builder.operator_names), e.constant_bytes
        if node.op == "const":
            e.tensors[node.name] = e.real_constant(node.name, node.weights["value"], e.grid(node.name))
        elif node.op == "float":
            splice_island(e, node)
        elif node.op == "requantize" and e.grid(node.name) is None:
            e.tensors[node.name] = e.read(node.inputs[0], integer=False)
        else:
            self._write_operation(node)
        return Row(
            node=node.name,
            op=node.op,
            operators=tuple(e.builder.operator_names[start:]),
            dtype=e.builder.dtype(e.tensors[node.name]),
            weights=e.weight_types.get(node.name, ""),
            bytes=e.constant_bytes - constants,
            in_float=node.op != "const" and self._in_float(node),
        )

    def _in_float(self, node: Node) -> bool:
        e = self.emitter
        return node.name in self.reads_float or e.builder.dtype(e.tensors[node.name]).startswith("FLOAT")

    def _write_operation(self, node: Node) -> None:
        e, q = self.emitter, self.emitter.grid(node.name)
        inputs = [e.read(name, q is not None or self._reads_integers(node, name)) for name in node.inputs]
        if q is None and any(e.builder.dtype(x) == "FLOAT32" for x in inputs):
            self.reads_float.add(node.name)
        clamp = self._clamp(node, q)
        out = e.new_tensor(node, node.name, e.shape(node), q, node.dtype.upper())
        e.tensors[node.name] = out
        bounded = (clamp.lower, clamp.upper) != (None, None)
        if node.op == "clip" and clamp.fused == "NONE" and (q is None or same_grid(self._source_grid(node), q)):
            e.clamp(node, clamp if bounded else _bound_anyway(clamp, q), inputs[0], Sink(out, q))
            return
        result = e.helper(node, "unclamped", q=q) if bounded else out
        e.kernel(node).write(e, node, inputs, Sink(result, q, clamp.fused))
        if bounded:
            e.clamp(node, clamp, result, Sink(out, q))

    def _reads_integers(self, node: Node, source: str) -> bool:
        """Whether an operation that makes places or truth values reads its input as the integers that it is."""
        e, q = self.emitter, self.emitter.grid(source)
        return node.dtype != "float32" and q is not None and q.container in e.kernel(node).discrete

    def _clamp(self, node: Node, q: Grid | None) -> Clamp:
        """What bounds the output of a node."""
        attrs, fuses = node.attrs, self.emitter.kernel(node).fuses
        clip = (attrs["lo"], attrs["hi"]) if node.op == "clip" else tuple(attrs.get("clip", (None, None)))
        if q is None:
            return float_clamp(clip, fuses) if node.dtype == "float32" else Clamp()
        e = self.emitter
        given = None
        if node.op in e.target.same_scale | e.target.inputs_share_output:
            # Integers only move: what comes out lies where the inputs lie.
            bounds = [integer_bounds(g) for g in (e.grid(i) for i in node.inputs) if g is not None]
            given = min(b[0] for b in bounds), max(b[1] for b in bounds)
        elif op_of(node).lookup or e.kernel(node).saturates:
            given = integer_bounds(q)
        return integer_clamp(q, clip, fuses, given)

    def _source_grid(self, node: Node) -> Grid:
        q = self.emitter.grid(node.inputs[0])
        assert q is not None, "checked before"
        return q


def _bound_anyway(clamp: Clamp, q: Grid | None) -> Clamp:
    """A clip that changes nothing still makes a tensor of its own name."""
    return Clamp("NONE", float(np.finfo(np.float32).min) if q is None else container_range(q.container)[0])


def _require_float(node: Node, io_type: str | None, what: str) -> None:
    if io_type not in (None, "float32") and node.dtype == "float32":
        raise ExportError(f"{node.name!r} is float in this file and has no grid for {what}={io_type!r}; use 'float32'.")


def _edge_grid(q: Grid, io_type: str) -> FileGrid:
    """The grid of an input or output in another integer type, covering the same range."""
    bits = 16 if io_type == "int16" else 8
    if bits == q.container:  # int8 as uint8: the same grid, moved
        return FileGrid(q.scale, int(q.zero_point) + 128)
    scale, zero_point = np.float64(q.scale), int(q.zero_point)
    if bits == 16:
        reach = max(q.qmax - zero_point, zero_point - q.qmin)
        return FileGrid(np.float32(scale * reach / 32767), 0)
    return FileGrid(np.float32(scale * max(q.qmax, -q.qmin) / 127), 128 if io_type == "uint8" else 0)
