"""Running a TFLite file on TensorFlow Lite Micro: a class over the interpreter of the package tflite-micro.

It runs its reference kernels, which are those that a microcontroller without an optimized library has, one sample at
a time.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kquant.errors import ExportError, MissingPackageError
from kquant.targets.litert.interface import read_interface
from kquant.targets.litert.reader import Program, file_content, read
from kquant.targets.litert.runtime import as_stored, dequantized

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Arena:
    """Memory that the interpreter takes from its arena, in bytes, on a machine with 64-bit pointers.

    Attributes:
        total: all of it.
        activations: of that, for tensors and scratch, which layers share ("head").
        persistent: of that, for structures that stay ("tail").
    """

    total: int
    activations: int
    persistent: int


class MicroModel:
    """A TFLite file, ready to run on TensorFlow Lite Micro.

    Args:
        source: the file's path or its bytes.
        keep_tensors: keep every intermediate tensor readable after a run.

    Raises:
        ExportError: the file does not exist, is truncated or corrupt, or has an operator that the interpreter refuses,
            with its reason.
        MissingPackageError: the package is not installed.
    """

    def __init__(self, source: bytes | str | os.PathLike[str], keep_tensors: bool = False) -> None:
        self.content = file_content(source)
        self._program = read(self.content)
        self._interpreter = _open(self.content, self._program, keep_tensors)
        self.interface = read_interface(self.content)
        self.inputs: list[Mapping[str, Any]] = [t.detail for t in self._program.inputs]
        self.outputs: list[Mapping[str, Any]] = [t.detail for t in self._program.outputs]
        self._kept: list[dict[str, np.ndarray]] | None = [] if keep_tensors else None
        self._sampled = _sampled(self.content, self._program) if keep_tensors else {}
        self._unpacked = _unpacked(self._program) if keep_tensors else {}

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One run on a batch, sample by sample (by as many samples as the file's own batch).

        Args:
            inputs: one array per input, as stored in the file, or float32, which is quantized.

        Returns:
            The outputs as stored in the file.

        Raises:
            ExportError: an operator fails while it runs, or the batch is no multiple of the file's.
        """
        values = [as_stored(x, d) for x, d in zip(inputs, self.inputs, strict=True)]
        step = int(self.inputs[0]["shape"][0]) if len(self.inputs[0]["shape"]) else 1
        if len(values[0]) % step:
            raise ExportError(f"The file takes {step} samples at a time, found {len(values[0])}; give a multiple.")
        if self._kept is not None:
            self._kept = []
        rows = [self._run_one([v[k : k + step] for v in values]) for k in range(0, len(values[0]), step)]
        return [np.concatenate(column) for column in zip(*rows, strict=True)]

    def predict(self, inputs: Any) -> Any:
        """Real-valued outputs for all samples; arguments and result as those of `TFLiteModel.predict`."""
        return self.interface.nested(self.predict_batches([self.interface.arrays(inputs)]))

    def predict_batches(self, batches: Iterable[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Real-valued outputs for a stream of batches."""
        results = [[dequantized(y, d) for y, d in zip(self.run(b), self.outputs, strict=True)] for b in batches]
        return [np.concatenate(column) for column in zip(*results, strict=True)]

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors of the last run that hold samples, by name, as stored; and the constants.

        Raises:
            ExportError: it was opened without `keep_tensors`.
        """
        if self._kept is None:
            raise ExportError("The tensors are not kept: open the file with keep_tensors=True.")
        constants = {t.name: t.data for t in self._program.tensors if t.data is not None}
        constants |= self._read(self._unpacked)
        samples = {name: np.concatenate([k[name] for k in self._kept]) for name in (self._kept or [{}])[0]}
        return {**constants, **samples}

    def _run_one(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        def invoke() -> None:
            for k, value in enumerate(values):
                self._interpreter.set_input(np.ascontiguousarray(value), k)
            self._interpreter.invoke()

        _listen(invoke, "cannot run", self._program)
        if self._kept is not None:
            read_back = self._read(self._sampled)
            fed = zip((t.name for t in self._program.inputs), values, strict=True)
            self._kept.append({**read_back, **dict(fed)})
        return [np.array(self._interpreter.get_output(k)) for k in range(len(self.outputs))]

    def _read(self, tensors: Mapping[int, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
        """What the interpreter has in tensors: index -> (name, shape)."""
        return {
            name: np.array(self._interpreter.GetTensor(k, 0)["tensor_data"]).reshape(shape)
            for k, (name, shape) in tensors.items()
        }


def arena(source: bytes | str | os.PathLike[str]) -> Arena:
    """The arena that a file needs, as the interpreter's recording allocator counts it.

    Raises:
        ExportError, MissingPackageError: as `MicroModel`.
    """
    content = file_content(source)
    program = read(content)
    interpreter = _open(content, program, keep_tensors=False)
    _, said = _listen(interpreter.print_allocations, "cannot measure", program)
    found = dict(re.findall(r"Arena allocation (\w+) (\d+) bytes", said))
    return Arena(total=int(found["total"]), activations=int(found["head"]), persistent=int(found["tail"]))


def _open(content: bytes, program: Program, keep_tensors: bool) -> Any:
    try:
        from tflite_micro import runtime
    except ImportError as error:
        raise MissingPackageError(
            "TensorFlow Lite Micro is not installed: pip install 'kquant[tflm]' (or pip install --pre tflite-micro)."
        ) from error
    config = runtime.InterpreterConfig
    kind = config.kPreserveAllTensors if keep_tensors else config.kAllocationRecording
    # Enough even if no two tensors shared their memory; some kernels unpack their weights besides.
    size = 4 * sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in program.tensors) + 2**20
    opened, _ = _listen(
        lambda: runtime.Interpreter.from_bytes(content, arena_size=size, intrepreter_config=kind),
        "does not accept",
        program,
    )
    return opened


def _sampled(content: bytes, program: Program) -> dict[int, tuple[str, tuple[int, ...]]]:
    """Index -> (name, shape) of the tensors that hold samples: the first axis is the batch."""
    graph = schema.ModelT.InitFromPackedBuf(content, 0).subgraphs[0]
    resizable = {k for k, t in enumerate(graph.tensors) if t.shapeSignature is not None and t.shapeSignature[0] == -1}
    batch = program.inputs[0].shape[:1]
    return {
        k: (t.name, t.shape)
        for k, t in enumerate(program.tensors)
        if t.data is None and (k in resizable if resizable else batch and t.shape[:1] == batch)
    }


def _unpacked(program: Program) -> dict[int, tuple[str, tuple[int, ...]]]:
    """Index -> (name, shape) of the constants that an operator writes out."""
    return {k: (t.name, t.shape) for k, t in enumerate(program.tensors) if t.unpacked}


def _listen(call: Callable[[], T], problem: str, program: Program) -> tuple[T, str]:
    """Call the library.

    Returns:
        Its result, and what it wrote to the standard error stream of the process, which nobody else sees.

    Raises:
        ExportError: it failed; what it wrote says where and why.
    """
    sys.stderr.flush()
    failure, result = None, None
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            result = call()
        except (RuntimeError, ValueError) as error:
            failure = error
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        said = file.read().decode(errors="replace")
    if failure is not None:
        lines = [line.strip(" .") for line in said.splitlines() if line.strip()] or [str(failure)]
        where = ", ".join(_culprits(said, program)) or "the file"
        raise ExportError(
            f"TensorFlow Lite Micro {problem} {where}: {'; '.join(lines)}. "
            'Quantize and export with config={"target": "tflm"}, or take the operation out of the model.'
        ) from failure
    return cast(T, result), said


def _culprits(said: str, program: Program) -> list[str]:
    """The operators that messages speak of: by their number where it fits, else all of their type."""
    operators = (*program.operators, *program.unpacking)
    numbered = [(code, int(k)) for code, k in re.findall(r"Node (\w+) \(number (\d+)\) failed to prepare", said)]
    exact = [str(op) for code, k in numbered for op in operators if (op.index, op.code) == (k, code)]
    codes = set(re.findall(r"Node (\w+) \(number \d+\) failed to invoke|opcode '(\w+)'", said))
    named = {code for pair in codes for code in pair if code}
    return exact or [str(op) for op in operators if op.code in named]
