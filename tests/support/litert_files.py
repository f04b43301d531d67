"""A tiny builder of .tflite files and a runner of the LiteRT interpreter, for tests of the integer reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import interpreter as litert
from ai_edge_litert import schema_py_generated as schema

Resolver = litert.OpResolverType


@dataclass(frozen=True, eq=False)
class T:
    """A tensor: `dtype` is the schema's name; `data` makes it a constant; scale None means unquantized."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "INT8"
    scale: Any = None
    zero_point: Any = 0
    axis: int = 0
    data: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Op:
    """An operator: names of its tensors (None for an absent one) and the fields of its options table."""

    code: str
    inputs: Sequence[str | None]
    outputs: Sequence[str]
    options: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    version: int = 1


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack integers of 4 or 2 bits, low bits of a byte first."""
    per_byte = 8 // bits
    flat = values.astype(np.int64).reshape(-1) & ((1 << bits) - 1)
    flat = np.concatenate([flat, np.zeros(-len(flat) % per_byte, np.int64)]).reshape(-1, per_byte)
    return (flat << (bits * np.arange(per_byte))).sum(axis=1).astype(np.uint8)


def build(tensors: Sequence[T], ops: Sequence[Op], outputs: Sequence[str]) -> bytes:
    """Serialize one subgraph; tensors without data that no operator makes are its inputs."""
    index = {t.name: i for i, t in enumerate(tensors)}
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.buffers, graph.tensors, graph.operators = 3, [schema.BufferT()], [], []
    for t in tensors:
        tensor, q = schema.TensorT(), schema.QuantizationParametersT()
        tensor.name, tensor.shape, tensor.type = t.name, list(t.shape), getattr(schema.TensorType, t.dtype)
        if t.scale is not None:
            q.scale = np.atleast_1d(np.asarray(t.scale, np.float32)).tolist()
            q.zeroPoint = np.broadcast_to(np.asarray(t.zero_point, np.int64), len(q.scale)).tolist()
            q.quantizedDimension = t.axis
            tensor.quantization = q
        if t.data is not None:
            bits = {"INT4": 4, "INT2": 2}.get(t.dtype)
            blob = t.data if bits is None else pack(t.data, bits)
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(blob).tobytes(), np.uint8)
            tensor.buffer = len(model.buffers)
            model.buffers.append(buffer)
        graph.tensors.append(tensor)
    codes: list[tuple[str, int]] = []
    for op in ops:
        if (op.code, op.version) not in codes:
            codes.append((op.code, op.version))
        operator = schema.OperatorT()
        operator.opcodeIndex = codes.index((op.code, op.version))
        operator.inputs = [-1 if n is None else index[n] for n in op.inputs]
        operator.outputs = [index[n] for n in op.outputs]
        if op.options is not None:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, op.options)
            operator.builtinOptions = getattr(schema, op.options + "T")()
            for key, value in op.fields.items():
                setattr(operator.builtinOptions, key, value)
        graph.operators.append(operator)
    model.operatorCodes = []
    for name, version in codes:
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, name)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), version
        model.operatorCodes.append(code)
    made = {n for op in ops for n in op.outputs}
    graph.inputs = [i for i, t in enumerate(tensors) if t.data is None and t.name not in made]
    graph.outputs = [index[n] for n in outputs]
    model.subgraphs = [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def run(model: bytes, inputs: Sequence[np.ndarray], resolver: Any = Resolver.BUILTIN_REF) -> dict[str, np.ndarray]:
    """Every tensor that the LiteRT interpreter can give after one invocation, by name."""
    reference = resolver != Resolver.AUTO
    interpreter = litert.Interpreter(
        model_content=model,
        experimental_op_resolver_type=resolver,
        experimental_preserve_all_tensors=reference,
        num_threads=1,
    )
    details = interpreter.get_input_details()
    for detail, value in zip(details, inputs, strict=True):
        if tuple(detail["shape"]) != value.shape:
            interpreter.resize_tensor_input(detail["index"], value.shape)
    interpreter.allocate_tensors()
    for detail, value in zip(details, inputs, strict=True):
        interpreter.set_tensor(detail["index"], value)
    interpreter.invoke()
    wanted = interpreter.get_tensor_details() if reference else interpreter.get_output_details()
    found = {}
    for detail in wanted:
        try:
            found[detail["name"]] = interpreter.get_tensor(detail["index"])
        except ValueError:  # temporaries of a kernel
            continue
    return found
