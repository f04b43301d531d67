"""What the integer reference reads from a .tflite file: tensors, operators, and their order."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kquant.errors import ExportError
from kquant.targets.litert.arithmetic import unpack
from kquant.targets.storage.expand import written_out

_DTYPES: dict[str, Any] = {
    "FLOAT32": np.float32, "FLOAT16": np.float16, "FLOAT64": np.float64, "BOOL": np.bool_,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT4": np.int8, "INT2": np.int8,
}  # fmt: skip
_PACKED_BITS = {"INT4": 4, "INT2": 2}


def _names(enum: type) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if isinstance(value, int)}


_TYPE_NAMES = _names(schema.TensorType)
_OP_NAMES = _names(schema.BuiltinOperator)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of the file: real value = scale * (q - zero_point).

    Attributes:
        name: unique in the file (a repeated name gets "#index" appended).
        shape: as stored; the batch may differ at run time.
        type: the schema's name, such as "INT4".
        dtype: numpy type that holds the values (int8 for packed types).
        scale: float32, shape (channels,); empty where the tensor is not quantized.
        zero_point: int64, shape of `scale`.
        axis: what `scale` runs along when it has more than one entry.
        data: the constant's values, unpacked; None for an activation.
        unpacked: an operator writes the constant out, from one that is stored in another way.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    dtype: np.dtype
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int
    data: np.ndarray | None
    unpacked: bool = False

    @property
    def s(self) -> np.float32:
        """The per-tensor scale."""
        if self.scale.size == 0:
            raise ExportError(f"tensor '{self.name}' has no quantization parameters, but an integer kernel needs them")
        return np.float32(self.scale[0])

    @property
    def z(self) -> int:
        """The per-tensor zero point; 0 where the tensor is not quantized."""
        return int(self.zero_point[0]) if self.zero_point.size else 0

    @property
    def detail(self) -> dict[str, Any]:
        """It, as LiteRT's interpreter describes an input or output."""
        quantization = (float(self.scale[0]), self.z) if self.scale.size else (0.0, 0)
        return {"name": self.name, "shape": self.shape, "dtype": self.dtype.type, "quantization": quantization}


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator: `inputs` holds None where an optional tensor is absent."""

    index: int
    code: str
    version: int
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    options: Any

    def option(self, name: str, default: Any = 0) -> Any:
        """A field of the options table, or the default where the file has no such table."""
        value = getattr(self.options, name, None)
        return default if value is None else value

    def given(self, position: int) -> Tensor:
        """The input at a position that must not be absent."""
        tensor = self.inputs[position] if position < len(self.inputs) else None
        if tensor is None:
            raise ExportError(f"{self}: input {position} is absent; write the file again")
        return tensor

    def __str__(self) -> str:
        made = self.outputs[0].name if self.outputs else "nothing"
        return f"operator {self.index} {self.code} (making '{made}')"


@dataclass(frozen=True, eq=False)
class Program:
    """The first subgraph of a file.

    Attributes:
        tensors: all of them, in order.
        operators: those that compute, in order.
        inputs, outputs: of the file.
        unpacking: operators that only write out constants, which their outputs hold already.
    """

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    unpacking: tuple[Operator, ...] = ()


def file_content(source: bytes | str | os.PathLike[str]) -> bytes:
    """The bytes of a .tflite file, given as they are or by its path.

    Raises:
        ExportError: there is no such file, or it is no .tflite file.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        blob = bytes(source)
    elif Path(source).is_file():
        blob = Path(source).read_bytes()
    else:
        raise ExportError(f"There is no file {os.fspath(source)!r}.")
    if blob[4:8] != b"TFL3":
        raise ExportError(f"not a .tflite file: {len(blob)} bytes without the identifier TFL3; export the model again")
    return blob


def read(model: bytes | str | os.PathLike[str]) -> Program:
    """Read a .tflite file.

    Args:
        model: the file's bytes, or its path.

    Raises:
        ExportError: it does not exist, is no .tflite file, or is truncated or inconsistent.
    """
    blob = file_content(model)
    try:
        parsed = schema.ModelT.InitFromPackedBuf(blob, 0)
        return _program(parsed)
    except ExportError:
        raise
    except Exception as error:  # a corrupt flatbuffer fails in any way: struct.error, IndexError, UnicodeDecodeError
        raise ExportError(f"the .tflite file is corrupt or truncated ({error!r}); export the model again") from error


def _program(model: Any) -> Program:
    graph = model.subgraphs[0]
    constants, unpacking = written_out(model)
    seen: set[str] = set()
    tensors = []
    for index, tensor in enumerate(graph.tensors):
        name = (tensor.name or b"").decode() if isinstance(tensor.name, bytes | None) else tensor.name
        name = name if name and name not in seen else f"{name}#{index}"
        seen.add(name)
        tensors.append(_tensor(name, tensor, model.buffers[tensor.buffer], constants.get(index)))

    def pick(indices: Sequence[int] | None) -> list[Tensor | None]:
        chosen = [] if indices is None else [int(i) for i in indices]
        if any(not -1 <= i < len(tensors) for i in chosen):
            raise ExportError("the .tflite file is corrupt: an operator names a tensor that is not there")
        return [None if i == -1 else tensors[i] for i in chosen]

    def present(indices: Sequence[int] | None) -> tuple[Tensor, ...]:
        return tuple(t for t in pick(indices) if t is not None)

    operators = []
    for index, op in enumerate(graph.operators or []):
        code = model.operatorCodes[op.opcodeIndex]
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        operators.append(
            Operator(
                index=index,
                code=unpacking.get(index) or _OP_NAMES.get(number, f"builtin {number}"),
                version=code.version,
                inputs=tuple(pick(op.inputs)),
                outputs=present(op.outputs),
                options=op.builtinOptions,
            )
        )
    return Program(
        tensors=tuple(tensors),
        operators=tuple(op for op in operators if op.index not in unpacking),
        inputs=present(graph.inputs),
        outputs=present(graph.outputs),
        unpacking=tuple(op for op in operators if op.index in unpacking),
    )


def _tensor(name: str, tensor: Any, buffer: Any, written_out: np.ndarray | None) -> Tensor:
    kind = _TYPE_NAMES.get(tensor.type, str(tensor.type))
    dtype = np.dtype(_DTYPES.get(kind, np.void))
    shape = tuple(int(d) for d in ([] if tensor.shape is None else tensor.shape))
    q = tensor.quantization
    scale = np.asarray([] if q is None or q.scale is None else q.scale, np.float32)
    zero_point = np.asarray([] if q is None or q.zeroPoint is None else q.zeroPoint, np.int64)
    if zero_point.size != scale.size:
        zero_point = np.resize(zero_point if zero_point.size else np.zeros(1, np.int64), scale.size)
    data = written_out
    if buffer.data is not None and len(buffer.data) and tensor.sparsity is None:
        data = _constant(name, kind, dtype, shape, np.asarray(buffer.data, np.uint8))
    return Tensor(
        name,
        shape,
        kind,
        dtype,
        scale,
        zero_point,
        0 if q is None else q.quantizedDimension,
        data,
        written_out is not None,
    )


def _constant(name: str, kind: str, dtype: np.dtype, shape: tuple[int, ...], raw: np.ndarray) -> np.ndarray | None:
    if dtype == np.void:
        return None  # strings and resources: only an operator that is refused could read them
    count = math.prod(shape)
    bits = _PACKED_BITS.get(kind, 8 * dtype.itemsize)
    if len(raw) != (count * bits + 7) // 8:
        raise ExportError(f"tensor '{name}': {len(raw)} bytes for {count} {kind} values; export the model again")
    values = unpack(raw, bits, count) if kind in _PACKED_BITS else np.frombuffer(raw.tobytes(), dtype)
    return values.reshape(shape)
