"""A collected model as the bytes of a file."""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

_ALIGNMENT = 16


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


def serialize(model: Any) -> bytes:
    """The file of a schema.ModelT; the data of every buffer starts on a multiple of 16 bytes, as the schema demands."""
    model.buffers = [_aligned(b) for b in model.buffers]
    builder = _Builder(1024 + sum(len(b.data) + 64 for b in model.buffers if b.data is not None))
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _aligned(buffer: Any) -> _Buffer:
    made = _Buffer()
    made.data = buffer.data
    return made
