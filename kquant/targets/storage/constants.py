"""The weights of a file that is about to be written, for those who store them in another way.

A file is a schema.ModelT, collected but not yet serialized: what is stored otherwise is decided when all of it is
known (equal tables are shared), and before anything has a place in the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kquant.targets.litert.arithmetic import unpack

_INT8, _INT4 = schema.TensorType.INT8, schema.TensorType.INT4
# operator -> the input that holds its weights, which its kernels also take from another operator
WEIGHTS: Mapping[int, int] = {
    schema.BuiltinOperator.CONV_2D: 1,
    schema.BuiltinOperator.DEPTHWISE_CONV_2D: 1,
    schema.BuiltinOperator.FULLY_CONNECTED: 1,
    schema.BuiltinOperator.TRANSPOSE_CONV: 1,
}


@dataclass(frozen=True)
class Stored:
    """How the weights of one tensor are stored.

    Attributes:
        tensor: its name.
        how: such as "Huffman"; "plain" for as they are.
        plain: bytes as they are.
        bytes: bytes as they are stored, with what they share with others counted in one of these.
    """

    tensor: str
    how: str
    plain: int
    bytes: int


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant tensor of weights.

    Attributes:
        tensor: index in the subgraph.
        name: of the tensor.
        values: int8, in its shape.
        plain: bytes that it takes as it is.
        readers: indices of the operators that read it.
        channels: how many scales it has.
        axis: that these run along; 0 for one scale.
        sharers: how many tensors share its bytes.
    """

    tensor: int
    name: str
    values: np.ndarray
    plain: int
    readers: tuple[int, ...]
    channels: int
    axis: int
    sharers: int

    @property
    def last(self) -> bool:
        """Whether the channels are its last axis."""
        return self.channels > 1 and self.axis == self.values.ndim - 1


def weights(model: Any) -> list[Weight]:
    """The int8 and int4 weights of the operators in `WEIGHTS`, in the order of their first reader."""
    graph = model.subgraphs[0]
    readers: dict[int, list[int]] = {}
    others: set[int] = set(map(int, graph.outputs))
    for position, op in enumerate(graph.operators):
        place = WEIGHTS.get(model.operatorCodes[op.opcodeIndex].builtinCode)
        for k, index in enumerate(map(int, op.inputs)):
            if k == place:
                readers.setdefault(index, []).append(position)
            else:
                others.add(index)
    sharers = Counter(t.buffer for t in graph.tensors)
    found = []
    for index, at in readers.items():
        tensor = graph.tensors[index]
        values = None if index in others else _values(model, tensor)
        if values is not None:
            plain, channels = len(model.buffers[tensor.buffer].data), len(tensor.quantization.scale)
            axis = int(tensor.quantization.quantizedDimension) if channels > 1 else 0
            found.append(Weight(index, tensor.name, values, plain, tuple(at), channels, axis, sharers[tensor.buffer]))
    return found


def _values(model: Any, tensor: Any) -> np.ndarray | None:
    data = model.buffers[tensor.buffer].data
    q = tensor.quantization
    if data is None or not len(data) or tensor.type not in (_INT8, _INT4) or tensor.sparsity is not None:
        return None
    if q is None or q.scale is None:
        return None
    raw = np.frombuffer(bytes(data), np.uint8)
    shape = tuple(map(int, tensor.shape))
    flat = raw.view(np.int8) if tensor.type == _INT8 else unpack(raw, 4, int(np.prod(shape)))
    return np.asarray(flat, np.int8).reshape(shape)


def add_buffer(model: Any, content: bytes) -> int:
    """Index of a buffer of this content, added where there is none."""
    for index, buffer in enumerate(model.buffers):
        if index and buffer.data is not None and bytes(buffer.data) == content:
            return index
    made = schema.BufferT()
    made.data = content
    model.buffers.append(made)
    return len(model.buffers) - 1


def add_code(model: Any, code: int, version: int = 1, custom: str | None = None) -> int:
    """Index of an operator code, added where there is none."""
    for index, entry in enumerate(model.operatorCodes):
        if (entry.builtinCode, entry.version, entry.customCode) == (code, version, custom):
            return index
    made = schema.OperatorCodeT()
    made.deprecatedBuiltinCode = min(code, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
    made.builtinCode, made.version, made.customCode = code, version, custom
    model.operatorCodes.append(made)
    return len(model.operatorCodes) - 1


def insert(model: Any, before: Mapping[int, Iterable[Any]]) -> None:
    """Put operators in front of others.

    Args:
        model: changed in place.
        before: index of an operator -> what to put there.
    """
    graph = model.subgraphs[0]
    graph.operators = [o for k, op in enumerate(graph.operators) for o in (*before.get(k, ()), op)]


def drop_unused_buffers(model: Any) -> None:
    """Leave out buffers that nothing names; the first one, empty, stays."""
    used = sorted({0, *(owner.buffer for owner in _owners(model))})
    place = {index: k for k, index in enumerate(used)}
    model.buffers = [model.buffers[index] for index in used]
    for owner in _owners(model):
        owner.buffer = place[owner.buffer]


def _owners(model: Any) -> Iterator[Any]:
    for graph in model.subgraphs:
        yield from graph.tensors
    yield from model.metadata or ()
