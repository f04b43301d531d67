"""How long a file takes on LiteRT's default kernels, and each of its operators alone.

An operator alone is a file of its own, with the tensors, constants and options that it has in the whole file. Two
operators of equal `signature` take equally long: values of weights do not matter to dense kernels.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from kquant.errors import ExportError
from kquant.targets.litert.flatbuffer import FileGrid, FlatbufferBuilder
from kquant.targets.litert.reader import Operator, Tensor

CHUNK = 0.001  # seconds of a chunk of runs, short enough to fall between what else the machine does
CHUNKS = 9  # of which the fastest counts: anything else only adds time
_VALUES = 32  # a constant of at most so many integers is part of the signature: shapes, axes


def seconds(content: bytes, threads: int = 1) -> float:
    """Time of one inference of one sample, the least that was seen.

    Args:
        content: the file.
        threads: number of threads.

    Raises:
        ExportError: LiteRT does not accept the file.
    """
    try:
        interpreter = Interpreter(model_content=content, num_threads=threads)
        interpreter.allocate_tensors()
        for detail in interpreter.get_input_details():
            interpreter.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
        interpreter.invoke()
        once = max(_run(interpreter, 1), 1e-7)
        runs = max(1, int(CHUNK / once))
        return min(_run(interpreter, runs) for _ in range(CHUNKS))
    except (ValueError, RuntimeError) as error:
        raise ExportError(f"LiteRT does not run the file: {error}") from error


def _run(interpreter: Any, runs: int) -> float:
    start = time.perf_counter()
    for _ in range(runs):
        interpreter.invoke()
    return (time.perf_counter() - start) / runs


def signature(op: Operator) -> str:
    """What decides how long an operator takes: readable, the same in every file and process."""
    parts = [f"{op.code}.{op.version}"]
    parts += [_tensor_signature(t) for t in op.inputs]
    parts += ["->", *(_tensor_signature(t) for t in op.outputs)]
    if op.options is not None:
        parts.append(json.dumps(vars(op.options), sort_keys=True, default=str))
    return " ".join(parts)


def _tensor_signature(t: Tensor | None) -> str:
    if t is None:
        return "-"
    scales = "" if t.scale.size < 2 else "*"
    if t.data is None:
        return f"{t.type}{scales}{list(t.shape)}"
    values = ""
    if t.type in ("INT32", "INT64") and t.data.size <= _VALUES and not t.scale.size:
        values = f"={t.data.reshape(-1).tolist()}"
    elif t.type == "BOOL":
        values = "=" + hashlib.blake2b(t.data.tobytes(), digest_size=8).hexdigest()
    return f"const {t.type}{scales}{list(t.shape)}{values}"


def alone(op: Operator) -> bytes:
    """A file of this operator; its inputs that are no constants are those of the file.

    Raises:
        ExportError: it has no input or output, or is no builtin operator.
    """
    builder = FlatbufferBuilder()
    indices: dict[str, int] = {}

    def add(t: Tensor | None) -> int:
        if t is None:
            return -1
        if t.name not in indices:
            grid = FileGrid(t.scale, t.zero_point, t.axis) if t.scale.size else None
            values = _values(op, t)
            if values is None:
                indices[t.name] = builder.tensor(t.name, t.shape, t.type, grid)
            else:
                indices[t.name] = builder.constant(t.name, values, t.type, grid)
        return indices[t.name]

    inputs, outputs = [add(t) for t in op.inputs], [add(t) for t in op.outputs]
    fed = {t.name: indices[t.name] for t in op.inputs if t is not None and _values(op, t) is None}
    if not fed or not outputs:
        raise ExportError(f"{op} has no input or output, and cannot run alone.")
    options = None if op.options is None else type(op.options).__name__.removesuffix("T")
    try:
        builder.operator(op.code, inputs, outputs, op.version, options, {} if options is None else vars(op.options))
    except KeyError as error:
        raise ExportError(f"{op} is no builtin operator, and cannot run alone.") from error
    return builder.finish(fed, {t.name: indices[t.name] for t in op.outputs})


def _values(op: Operator, t: Tensor) -> np.ndarray | None:
    """The values of a constant, or of an input that is the output's shape, which the file computes."""
    if t.data is None and op.code == "TRANSPOSE_CONV" and t is op.inputs[0]:
        return np.asarray(op.outputs[0].shape, np.int32)
    return t.data


def overhead(threads: int = 1) -> float:
    """Time of an inference that does next to nothing: the addition of two numbers."""
    builder = FlatbufferBuilder()
    x, y = (builder.tensor(name, (1, 8), "INT8", FileGrid(np.float32(0.1), 0)) for name in "xy")
    out = builder.tensor("sum", (1, 8), "INT8", FileGrid(np.float32(0.2), 0))
    builder.operator("ADD", [x, y], [out], 2, "AddOptions")
    return seconds(builder.finish({"x": x, "y": y}, {"sum": out}), threads)
