"""Running a TFLite file: one small class over LiteRT's interpreter."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from kquant.errors import ExportError
from kquant.targets.litert.interface import read_interface
from kquant.targets.litert.reader import file_content
from kquant.targets.litert.serialize import serialize
from kquant.targets.storage.decode_operator import CUSTOM_CODE
from kquant.targets.storage.expand import without_decode

# name -> the interpreter's kernels: XNNPACK where it can, the optimized kernels, the reference kernels
KERNELS = {
    "default": OpResolverType.AUTO,
    "builtin": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    "reference": OpResolverType.BUILTIN_REF,
}


class TFLiteModel:
    """A TFLite file, ready to run on batches.

    Weights that a file stores for TensorFlow Lite Micro's operator DECODE are written out first: LiteRT does not have
    that operator.

    Args:
        source: the file's path or its bytes.
        kernels: "default" (XNNPACK), "builtin" (optimized, no delegate) or "reference".
        threads: number of threads.
        keep_tensors: keep every intermediate tensor readable after a run (not under "default",
            whose delegate never materializes them).

    Raises:
        ExportError: the file does not exist, is truncated, corrupt, or not accepted by the kernels.
    """

    def __init__(
        self,
        source: bytes | str | os.PathLike[str],
        kernels: str = "default",
        threads: int = 2,
        keep_tensors: bool = False,
    ):
        self.content = file_content(source)
        self._options: dict[str, Any] = {
            "experimental_op_resolver_type": KERNELS[kernels],
            "experimental_preserve_all_tensors": keep_tensors,
            "num_threads": threads,
        }
        try:
            self._interpreter = Interpreter(model_content=_without_decode(self.content), **self._options)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ExportError(f"LiteRT does not accept the file ({kernels} kernels): {error}") from error
        self.interface = read_interface(self.content)
        self.inputs: list[Mapping[str, Any]] = self._interpreter.get_input_details()
        self.outputs: list[Mapping[str, Any]] = self._interpreter.get_output_details()
        self._batch = int(self.inputs[0]["shape"][0]) if len(self.inputs[0]["shape"]) else 1
        self._fixed = all(-1 not in d["shape_signature"] for d in self.inputs)
        self._fed: Sequence[np.ndarray] = ()

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One run on a batch; in steps of the file's own batch where that cannot be resized.

        Args:
            inputs: one array per input, as stored in the file, or float32, which is quantized.

        Returns:
            The outputs as stored in the file.

        Raises:
            ExportError: samples of another shape than the file takes, or numbers that it cannot compute, such as ids
                beyond a table.
        """
        for x, detail in zip(inputs, self.inputs, strict=True):
            check_shape(x, detail)
        values = [as_stored(x, d) for x, d in zip(inputs, self.inputs, strict=True)]
        step = max(1, self._batch if self._fixed else len(values[0]))
        rows = [self._run([v[k : k + step] for v in values]) for k in range(0, max(1, len(values[0])), step)]
        self._fed = values
        return rows[0] if len(rows) == 1 else [np.concatenate(column) for column in zip(*rows, strict=True)]

    def _run(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        batch = len(values[0])
        if batch != self._batch:
            for value, detail in zip(values, self.inputs, strict=True):
                self._interpreter.resize_tensor_input(detail["index"], value.shape)
            self._interpreter.allocate_tensors()
            self._batch = batch
        for value, detail in zip(values, self.inputs, strict=True):
            self._interpreter.set_tensor(detail["index"], value)
        try:
            self._interpreter.invoke()
        except RuntimeError as error:
            given = _spans(values, self.inputs)
            raise ExportError(f"LiteRT cannot compute this batch{given}: {error}") from error
        return [self._interpreter.get_tensor(d["index"]) for d in self.outputs]

    def predict(self, inputs: Any, batch_size: int = 32) -> Any:
        """Real-valued outputs for all samples.

        Args:
            inputs: an array, one array per input in the order of the file, a dict of arrays by the names of the inputs,
                or arrays nested as the model's inputs are; real values or as stored.
            batch_size: samples per run; the last batch may be smaller.

        Returns:
            A list with an array per output, or, where the model's outputs are a dict or nested, that structure.

        Raises:
            ValueError: the inputs do not fit.
        """
        arrays = self.interface.arrays(inputs)
        starts = range(0, len(arrays[0]), batch_size)
        return self.interface.nested(self.predict_batches([a[k : k + batch_size] for a in arrays] for k in starts))

    def predict_batches(self, batches: Iterable[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Real-valued outputs for a stream of batches."""
        results = [[dequantized(y, d) for y, d in zip(self.run(b), self.outputs, strict=True)] for b in batches]
        return [np.concatenate(column) for column in zip(*results, strict=True)]

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors of the last run (of its last step, inputs apart) that are readable, by name."""
        found = {}
        for detail in self._interpreter.get_tensor_details():
            try:
                found[detail["name"]] = self._interpreter.get_tensor(detail["index"])
            except ValueError:  # released, or inside a delegate
                continue
        return {**found, **{d["name"]: x for d, x in zip(self.inputs, self._fed, strict=False)}}


def _without_decode(content: bytes) -> bytes:
    if CUSTOM_CODE.encode() not in content:
        return content
    try:
        model = schema.ModelT.InitFromPackedBuf(content, 0)
        return serialize(model) if without_decode(model) else content
    except (struct.error, IndexError, ValueError, TypeError, AttributeError) as error:
        raise ExportError(f"the .tflite file is corrupt or truncated ({error!r}); export the model again") from error


def check_shape(x: np.ndarray, detail: Mapping[str, Any]) -> None:
    """Refuse samples of another shape than an input takes.

    Raises:
        ExportError: they do not fit.
    """
    found, known = np.shape(x), detail.get("shape_signature", detail["shape"])
    shape = tuple(int(n) for n in known[1:])
    if len(found) != len(known) or any(n not in (-1, m) for n, m in zip(shape, found[1:], strict=True)):
        raise ExportError(
            f"input {detail['name']!r} of the file takes samples of shape {shape}, found {found[1:]}: "
            "cut or pad them, or quantize the model with samples of that shape."
        )


def as_stored(x: np.ndarray, detail: Mapping[str, Any]) -> np.ndarray:
    """The values of an input as its tensor stores them: what has another type is real values, quantized on its grid.

    Raises:
        ExportError: the tensor has no grid, and its type cannot hold the values.
    """
    dtype, (scale, zero_point) = detail["dtype"], detail["quantization"]
    x = np.asarray(x)
    if x.dtype == dtype:
        return x
    if scale:
        limits = np.iinfo(dtype)
        q = np.rint(x.astype(np.float32) / np.float32(scale)) + zero_point
        return np.clip(q, limits.min, limits.max).astype(dtype)
    with np.errstate(invalid="ignore"):
        stored = x.astype(dtype)
    if np.dtype(dtype).kind in "iub" and not np.array_equal(stored, x):
        raise ExportError(f"input {detail['name']!r} of the file is {np.dtype(dtype)} and cannot hold these {x.dtype}.")
    return stored


def _spans(values: Sequence[np.ndarray], details: Sequence[Mapping[str, Any]]) -> str:
    """What integers a batch holds, for a message: ids beyond a table are what kernels refuse."""
    integers = [(d["name"], v) for v, d in zip(values, details, strict=True) if not d["quantization"][0] and v.size]
    spans = [f"{name!r} from {v.min()} to {v.max()}" for name, v in integers if v.dtype.kind in "iu"]
    return f" ({', '.join(spans)})" if spans else ""


def dequantized(y: np.ndarray, detail: Mapping[str, Any]) -> np.ndarray:
    """The real values of an output; float and integer outputs without a grid stay as they are."""
    scale, zero_point = detail["quantization"]
    return (y.astype(np.float32) - np.float32(zero_point)) * np.float32(scale) if scale else y
