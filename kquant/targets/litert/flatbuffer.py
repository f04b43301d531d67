"""TFLite flatbuffers: a builder over the schema's object API, and what a file says about itself.

The builder knows tensors, buffers and operators and nothing of quantization rules. Constants of
equal content share one buffer, buffer 0 is empty, and the data of every buffer starts on a multiple
of 16 bytes, as the schema demands.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kquant.targets.litert import reader
from kquant.targets.litert.reader import Program, Tensor

DTYPES: Mapping[str, Any] = {
    "FLOAT32": np.float32, "FLOAT16": np.float16, "INT8": np.int8, "UINT8": np.uint8, "INT16": np.int16,
    "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_,
}  # fmt: skip
_PACKED = {"INT4": 4, "INT2": 2}
_ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class FileGrid:
    """Quantization parameters as the file has them: real = scale * (q - zero_point).

    Attributes:
        scale: float32, () or (channels,).
        zero_point: integer, () or the shape of `scale`.
        axis: the axis of the stored tensor that several scales run along.
    """

    scale: np.ndarray | np.floating
    zero_point: np.ndarray | int = 0
    axis: int = 0


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Signed integers of 4 or 2 bits as bytes, the first value in the lowest bits.

    Args:
        values: integers in [-2^(bits-1), 2^(bits-1) - 1], any shape.
        bits: 4 or 2.
    """
    per_byte = 8 // bits
    flat = np.asarray(values).reshape(-1).astype(np.uint8) & np.uint8((1 << bits) - 1)
    flat = np.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(flat << shifts, axis=1)


class _Buffer(schema.BufferT):
    """A buffer whose data is aligned; the generated code ignores the schema's force_align."""

    def Pack(self, builder: Any) -> Any:
        if self.data is None:
            return super().Pack(builder)
        size = len(self.data)
        builder.StartVector(1, size, _ALIGNMENT)
        builder.head -= size
        builder.Bytes[builder.head : builder.head + size] = bytes(self.data)
        vector = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


class _Builder(flatbuffers.Builder):  # type: ignore[misc]
    """Writes equal vectors once: zero points of all channels of all layers are the same zeros.

    Other zero points than those of symmetric grids and of ReLUs are equal by chance, and written each: the size of a
    file is known before its ranges are.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._vectors: dict[tuple[str, bytes], int] = {}

    def CreateNumpyVector(self, x: np.ndarray) -> int:  # noqa: N802  its name there
        if x.dtype == np.int64 and not np.isin(x, (0, -128)).all():
            return int(super().CreateNumpyVector(x))
        key = (x.dtype.str, x.tobytes())
        if key not in self._vectors:
            self._vectors[key] = super().CreateNumpyVector(x)
        return self._vectors[key]


def _numbers(enum: type) -> dict[str, int]:
    return {name: value for name, value in vars(enum).items() if isinstance(value, int)}


_TYPES, _BUILTINS, _OPTIONS = (_numbers(e) for e in (schema.TensorType, schema.BuiltinOperator, schema.BuiltinOptions))
_TYPE_NAMES = {v: k for k, v in _TYPES.items()}
BUILTIN_NAMES: Mapping[int, str] = {v: k for k, v in _BUILTINS.items()}


class FlatbufferBuilder:
    """Collects one subgraph and serializes it."""

    def __init__(self) -> None:
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._codes: dict[tuple[int, int], int] = {}
        self._buffers: list[Any] = [schema.BufferT()]
        self._by_content: dict[bytes, int] = {}
        self._names: set[str] = set()

    def tensor(
        self,
        name: str,
        shape: Sequence[int | None],
        dtype: str,
        grid: FileGrid | None = None,
        data: bytes | None = None,
        batch: int = 1,
    ) -> int:
        """Add a tensor.

        Args:
            name: a number is appended where it is taken.
            shape: None for a dimension that a user may resize: `batch` in the file, -1 in its signature.
            dtype: the schema's name, such as "INT8".
            grid: quantization parameters.
            data: content of a constant, as stored.
            batch: see `shape`.

        Returns:
            Its index.
        """
        t = schema.TensorT()
        t.name, t.type = self._fresh(name), _TYPES[dtype]
        t.shape = [batch if d is None else int(d) for d in shape]
        if None in shape:
            t.shapeSignature = [-1 if d is None else int(d) for d in shape]
        if grid is not None:
            q = schema.QuantizationParametersT()
            q.scale = np.atleast_1d(np.asarray(grid.scale, np.float32))
            q.zeroPoint = np.broadcast_to(np.asarray(grid.zero_point, np.int64), q.scale.shape).copy()
            q.quantizedDimension = grid.axis if q.scale.size > 1 else 0
            t.quantization = q
        if data is not None:
            t.buffer = self.buffer(data)
        return self.add_tensor(t)

    def constant(self, name: str, values: np.ndarray, dtype: str, grid: FileGrid | None = None) -> int:
        """Add a constant tensor, its values converted to (or packed into) `dtype`."""
        values = np.asarray(values)
        stored = pack(values, _PACKED[dtype]) if dtype in _PACKED else values.astype(DTYPES[dtype])
        return self.tensor(name, values.shape, dtype, grid, stored.tobytes())

    def buffer(self, data: bytes) -> int:
        """Index of a buffer with this content; 0, the empty one, for no bytes."""
        if not data:
            return 0
        if data not in self._by_content:
            buffer = _Buffer()
            buffer.data = data
            self._by_content[data] = len(self._buffers)
            self._buffers.append(buffer)
        return self._by_content[data]

    def add_tensor(self, tensor: Any) -> int:
        """Add a schema.TensorT as it is."""
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def operator(
        self,
        builtin: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        version: int = 1,
        options: str | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        """Add an operator.

        Args:
            builtin: the schema's name, such as "CONV_2D".
            inputs: tensor indices, -1 where an optional one is absent.
            outputs: tensor indices.
            version: of the operator, see `versions.py`.
            options: name of the options table, such as "Conv2DOptions".
            fields: its entries; absent ones have the schema's defaults.
        """
        op = schema.OperatorT()
        op.inputs, op.outputs = list(inputs), list(outputs)
        if options is not None:
            op.builtinOptionsType = _OPTIONS[options]
            op.builtinOptions = getattr(schema, options + "T")()
            for key, value in (fields or {}).items():
                if not hasattr(op.builtinOptions, key):
                    raise AssertionError(f"{options} has no field {key!r}")
                setattr(op.builtinOptions, key, value)
        self.add_operator(op, _BUILTINS[builtin], version)

    def add_operator(self, op: Any, code: int, version: int) -> None:
        """Add a schema.OperatorT as it is, but for its operator code."""
        op.opcodeIndex = self._codes.setdefault((code, version), len(self._codes))
        self._operators.append(op)

    def shape(self, index: int) -> tuple[int | None, ...]:
        """Shape of a tensor, None where it can be resized."""
        t = self._tensors[index]
        signature = t.shape if t.shapeSignature is None else t.shapeSignature
        return tuple(None if d == -1 else int(d) for d in signature)

    def dtype(self, index: int) -> str:
        """The schema's name of a tensor's type."""
        return _TYPE_NAMES[self._tensors[index].type]

    def name(self, index: int) -> str:
        """Name of a tensor."""
        return self._tensors[index].name

    @property
    def operator_names(self) -> list[str]:
        """Builtin names of the operators so far, in order."""
        by_index = {index: BUILTIN_NAMES[code] for (code, _), index in self._codes.items()}
        return [by_index[op.opcodeIndex] for op in self._operators]

    def finish(
        self,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        description: str = "",
        signature: str = "serving_default",
        metadata: Mapping[str, bytes] = MappingProxyType({}),
    ) -> bytes:
        """The file.

        Args:
            inputs: signature name -> tensor, in the order of the subgraph's inputs.
            outputs: likewise.
            description: free text in the file.
            signature: key of the signature.
            metadata: name -> content of entries that runtimes ignore.
        """
        model_metadata = [_metadata(name, self.buffer(content)) for name, content in metadata.items()]
        graph, model = schema.SubGraphT(), schema.ModelT()
        graph.name = "main"
        graph.tensors, graph.operators = self._tensors, self._operators
        graph.inputs, graph.outputs = list(inputs.values()), list(outputs.values())
        model.version, model.subgraphs, model.buffers = 3, [graph], self._buffers
        model.description = description or None
        model.operatorCodes = [_operator_code(code, version) for code, version in self._codes]
        definition = schema.SignatureDefT()
        definition.signatureKey, definition.subgraphIndex = signature, 0
        definition.inputs, definition.outputs = _tensor_maps(inputs), _tensor_maps(outputs)
        model.signatureDefs = [definition]
        model.metadata = model_metadata or None
        builder = _Builder(1024 + sum(len(b.data) + 64 for b in self._buffers if b.data is not None))
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def _fresh(self, name: str) -> str:
        unique, k = name, 1
        while unique in self._names:
            unique, k = f"{name}_{k}", k + 1
        self._names.add(unique)
        return unique


def _operator_code(code: int, version: int) -> Any:
    entry = schema.OperatorCodeT()
    # Codes above 127 do not fit the old one-byte field, which then holds this placeholder.
    entry.deprecatedBuiltinCode = min(code, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
    entry.builtinCode, entry.version = code, version
    return entry


def _metadata(name: str, buffer: int) -> Any:
    entry = schema.MetadataT()
    entry.name, entry.buffer = name, buffer
    return entry


def _tensor_maps(tensors: Mapping[str, int]) -> list[Any]:
    maps = []
    for name, index in tensors.items():
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name, index
        maps.append(entry)
    return maps


@dataclass(frozen=True)
class Summary:
    """What a file contains.

    Attributes:
        op_counts: operator type -> count.
        activation_types: tensor type -> count, constants left out.
        constant_bytes: tensor type -> bytes of its constants (a shared buffer counts every time).
        inputs: name -> (type, shape) of the inputs.
        outputs: likewise.
        total_bytes: size of the file.
        float_ops: "TYPE (tensor)" of the operators on floats, but for conversions at the ends.
    """

    op_counts: dict[str, int]
    activation_types: dict[str, int]
    constant_bytes: dict[str, int]
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    outputs: Mapping[str, tuple[str, tuple[int, ...]]]
    total_bytes: int
    float_ops: tuple[str, ...] = field(default=())


def summary(source: bytes | str | os.PathLike[str]) -> Summary:
    """What a .tflite file (its bytes or path) contains.

    Raises:
        ExportError: it does not exist, is no .tflite file, or is truncated or corrupt.
    """
    content = reader.file_content(source)
    program = reader.read(content)
    constant_bytes: Counter[str] = Counter()
    for t in program.tensors:
        if t.data is not None:
            constant_bytes[t.type] += (t.data.size * _PACKED.get(t.type, 8 * t.dtype.itemsize) + 7) // 8
    return Summary(
        op_counts=dict(Counter(op.code for op in program.operators)),
        activation_types=dict(Counter(t.type for t in program.tensors if t.data is None)),
        constant_bytes=dict(constant_bytes),
        inputs={t.name: (t.type, t.shape) for t in program.inputs},
        outputs={t.name: (t.type, t.shape) for t in program.outputs},
        total_bytes=len(content),
        float_ops=_float_ops(program),
    )


def only_integer_ops(source: bytes | str | os.PathLike[str]) -> bool:
    """Whether no operator computes on float tensors, but for QUANTIZE at the inputs and DEQUANTIZE at the outputs.

    Raises:
        ExportError: as `summary`.
    """
    return not summary(source).float_ops


def for_reference_kernels(content: bytes) -> bytes:
    """The file with DEPTHWISE_CONV_2D of version 7 (int4 weights) labelled 3.

    LiteRT's reference kernels compute it, but are registered for earlier versions only.
    """
    patched = bytearray(content)
    model = schema.Model.GetRootAs(patched, 0)
    for k in range(model.OperatorCodesLength()):
        code = model.OperatorCodes(k)
        if code.BuiltinCode() == schema.BuiltinOperator.DEPTHWISE_CONV_2D and code.Version() == 7:
            place = code._tab.Pos + code._tab.Offset(8)  # the third field of the table: version, int32
            patched[place : place + 4] = (3).to_bytes(4, "little")
    return bytes(patched)


def read_tensors(source: bytes | str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .tflite file by name.

    Raises:
        ExportError: as `summary`.
    """
    return {t.name: t for t in reader.read(source).tensors}


def _float_ops(program: Program) -> tuple[str, ...]:
    """ "TYPE (tensor)" of the operators that touch floats beyond the conversions at the ends."""
    inputs, outputs = ({t.name for t in ends} for ends in (program.inputs, program.outputs))
    found = []
    for op in program.operators:
        sources = [t for t in op.inputs if t is not None]
        if not any(t.type.startswith(("FLOAT", "BFLOAT")) for t in (*sources, *op.outputs)):
            continue
        at_start = op.code == "QUANTIZE" and sources[0].name in inputs
        at_end = op.code == "DEQUANTIZE" and op.outputs[0].name in outputs
        if not (at_start or at_end):
            found.append(f"{op.code} ({op.outputs[0].name if op.outputs else ''})")
    return tuple(found)
