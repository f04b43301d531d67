"""What the operators that only write out constants make: DECODE of TensorFlow Lite Micro, DENSIFY."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kquant.errors import ExportError
from kquant.targets.storage import decode_operator, sparse

_DTYPES: Mapping[int, np.dtype] = {
    schema.TensorType.INT8: np.dtype(np.int8),
    schema.TensorType.INT16: np.dtype(np.int16),
    schema.TensorType.INT32: np.dtype(np.int32),
    schema.TensorType.FLOAT32: np.dtype(np.float32),
}
_DECODE = decode_operator.CUSTOM_CODE.encode()


def is_decode(code: Any) -> bool:
    """Whether an operator code is that of DECODE."""
    custom = code.customCode
    return custom is not None and (custom if isinstance(custom, bytes) else custom.encode()) == _DECODE


def written_out(model: Any) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """The constants that operators of a file write out.

    Args:
        model: a schema.ModelT.

    Returns:
        Index of a tensor -> its values, in its shape; and index of an operator that makes such -> its name.

    Raises:
        ExportError: one cannot be read.
    """
    graph, found, operators = model.subgraphs[0], {}, {}
    for position, op in enumerate(graph.operators or ()):
        code = model.operatorCodes[op.opcodeIndex]
        if is_decode(code):
            pairs = zip(op.inputs[::2], op.inputs[1::2], op.outputs, strict=True)
            for values, ancillary, made in pairs:
                found[int(made)] = _decoded(model, graph.tensors[values], graph.tensors[ancillary], graph.tensors[made])
            operators[position] = decode_operator.CUSTOM_CODE
        elif code.builtinCode == schema.BuiltinOperator.DENSIFY:
            source = graph.tensors[op.inputs[0]]
            if source.sparsity is not None:
                shape = tuple(map(int, source.shape))
                found[int(op.outputs[0])] = sparse.decode(_array(model, source), shape, source.sparsity)
                operators[position] = "DENSIFY"
    return found, operators


def _decoded(model: Any, values: Any, ancillary: Any, made: Any) -> np.ndarray:
    shape = tuple(map(int, made.shape))
    q = made.quantization
    channels = 1 if q is None or q.scale is None else len(q.scale)
    last = q is not None and channels > 1 and q.quantizedDimension == len(shape) - 1
    stored, described = (bytes(model.buffers[t.buffer].data) for t in (values, ancillary))
    count = int(np.prod(shape))
    found = decode_operator.decode(stored, described, count, channels, last, _dtype(made))
    return found.reshape(shape)


def _array(model: Any, tensor: Any) -> np.ndarray:
    return np.frombuffer(bytes(model.buffers[tensor.buffer].data), _dtype(tensor))


def _dtype(tensor: Any) -> np.dtype:
    if tensor.type not in _DTYPES:
        raise ExportError(f"a compressed tensor has the type {tensor.type}, which is not read here")
    return _DTYPES[tensor.type]


def without_decode(model: Any) -> bool:
    """Make constants of what DECODE writes out, for runtimes that do not have it.

    Args:
        model: a schema.ModelT, changed in place.

    Returns:
        Whether there was one.
    """
    graph = model.subgraphs[0]
    found, operators = written_out(model)
    decoders = {k for k, name in operators.items() if name == decode_operator.CUSTOM_CODE}
    if not decoders:
        return False
    made = {int(index) for k in decoders for index in graph.operators[k].outputs}
    for index in made:
        buffer = schema.BufferT()
        buffer.data = found[index].tobytes()
        graph.tensors[index].buffer = len(model.buffers)
        model.buffers.append(buffer)
    graph.operators = [op for k, op in enumerate(graph.operators) if k not in decoders]
    return True
