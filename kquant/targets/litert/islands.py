"""Float islands: an operation that kquant does not know, converted alone by TensorFlow and spliced in.

The operation runs on symbolic tensors in a model of its own; TensorFlow's converter makes a file of
it, without optimizations, whose tensors and operators are copied into ours. Some of its patterns compute something
else (it takes a norm over two axes for one over the last), so each file is run beside the operation first.
"""

from __future__ import annotations

import contextlib
import io
import logging
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema

from kquant.errors import ExportError
from kquant.graph.ir import Node, Shape
from kquant.graph.tracing.float_call import FloatCall
from kquant.targets.litert.emitter import Emitter
from kquant.targets.litert.flatbuffer import BUILTIN_NAMES
from kquant.targets.litert.runtime import TFLiteModel

TOLERANCE = 1e-3
_EXAMPLES = 4

_REFUSED = frozenset(
    {"CUSTOM", "DELEGATE", "VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "CALL_ONCE", "IF", "WHILE"}
)


def splice_island(e: Emitter, node: Node) -> None:
    """Write a node of op "float" into the file.

    Raises:
        ExportError: the converter cannot convert the operation, or needs more than plain operators.
    """
    sources = [e.read(name, integer=False) for name in node.inputs]
    shapes = [e.builder.shape(s) for s in sources]
    content = convert_island(node, shapes, [e.graph[i].dtype for i in node.inputs])
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    _refuse(node, model)
    check_island(node, content, [_example(e, name) for name in node.inputs])
    graph = model.subgraphs[0]
    inputs, output = _ends(node, model)
    tensors = {int(i): s for i, s in zip(inputs, sources, strict=True)}
    for index, tensor in enumerate(graph.tensors):
        if index in tensors:
            continue
        data = model.buffers[tensor.buffer].data
        tensor.buffer = 0 if data is None else e.builder.buffer(bytes(data))
        e.constant_bytes += 0 if data is None else len(data)
        # not the converter's own names: they hold counters of the process
        name = node.name if index == output else f"{node.name}/{index}"
        tensor.name, tensor.quantization = name, None
        tensors[index] = e.builder.add_tensor(tensor)
    for op in graph.operators or []:
        code = model.operatorCodes[op.opcodeIndex]
        op.inputs = [tensors.get(int(i), -1) for i in _indices(op.inputs)]
        op.outputs = [tensors[int(i)] for i in _indices(op.outputs)]
        op.intermediates = None
        e.builder.add_operator(op, max(code.builtinCode, code.deprecatedBuiltinCode), code.version)
    e.tensors[node.name] = tensors[output]


def convert_island(node: Node, shapes: Sequence[Shape], dtypes: Sequence[str]) -> bytes:
    """The operation alone as a TFLite file.

    Args:
        node: of op "float".
        shapes: of its inputs, None for a batch that may be resized.
        dtypes: of its inputs.
    """
    inputs = [
        keras.Input(batch_shape=shape, dtype=dtype, name=f"island_input_{k:03d}")
        for k, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    # a copy, since a call leaves its trace in the operation
    call = node.call.deployed() if isinstance(node.call, FloatCall) else node.call
    for layer in _layers(call):
        if isinstance(layer, keras.layers.RNN):
            _unroll(layer)
    try:
        with _quiet():
            converter = tf.lite.TFLiteConverter.from_keras_model(keras.Model(inputs, [call(inputs)]))
            return bytes(converter.convert())
    except Exception as error:  # the converter raises whatever its passes raise
        raise ExportError(
            f"{node.name!r} ({node.origin_type}) stays float and TensorFlow cannot convert it: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}; "
            "replace the operation by one that TFLite has."
        ) from error


def check_island(node: Node, content: bytes, inputs: Sequence[np.ndarray]) -> None:
    """Refuse a converted operation that computes something else than the operation itself.

    Args:
        node: of op "float".
        content: its file.
        inputs: to compare on.

    Raises:
        ExportError: the largest difference is more than `TOLERANCE` of the largest output.
    """
    try:
        expected = np.asarray(node.call([tf.convert_to_tensor(x) for x in inputs]))
    except Exception:  # such inputs mean nothing to it: ids outside a table, say
        return
    runner = TFLiteModel(content, threads=1)
    order, _ = _ends(node, schema.ModelT.InitFromPackedBuf(content, 0))
    indices = [d["index"] for d in runner.inputs]
    fed: list[np.ndarray] = [inputs[0]] * len(indices)
    for x, tensor in zip(inputs, order, strict=True):
        fed[indices.index(tensor)] = x
    found = runner.run(fed)[0]
    if expected.dtype.kind != "f":
        wrong = float(np.mean(found != expected))
    else:
        size = max(1e-12, float(np.max(np.abs(expected), initial=0.0)))
        wrong = float(np.max(np.abs(found - expected), initial=0.0)) / size
    if not wrong <= TOLERANCE:
        raise ExportError(
            f"{node.origin or node.name!r} ({node.origin_type}) stays float, and TensorFlow's converter writes what "
            f"computes something else (off by {wrong:.1g} of the largest output): write it with other operations, or "
            "register an integer form with kquant.register_layer."
        )


def _example(e: Emitter, name: str) -> np.ndarray:
    """Values as an input of an island may have: within its grid, or of unit variance; small ids, either truth."""
    node, q = e.graph[name], e.grid(name)
    rng = np.random.default_rng(zlib.crc32(name.encode()))  # other values for every input
    if node.op == "const":
        return np.asarray(node.weights["value"], np.float32)
    shape = (_EXAMPLES * node.batch, *(int(d or 1) for d in node.shape[1:]))
    if node.dtype != "float32":
        return rng.integers(0, 2, shape).astype(node.dtype)
    if q is None:
        return rng.normal(size=shape).astype(np.float32)
    low, high = (float(q.scale) * (edge - int(q.zero_point)) for edge in (q.qmin, q.qmax))
    return rng.uniform(low, high, shape).astype(np.float32)


def _unroll(layer: Any) -> None:
    """Let a recurrent layer of a copy be unrolled: a loop would need subgraphs of its own.

    Unrolled, reversed, and with zeros at the masked steps, Keras puts the zeros where the mask has them in its first
    order (RNN._unroll in its backend), so they are put here.
    """
    layer.unroll = True
    if not (layer.go_backwards and getattr(layer, "zero_output_for_mask", False) and layer.return_sequences):
        return
    layer.zero_output_for_mask = False
    compute = layer.call

    def call(sequences: Any, initial_state: Any = None, mask: Any = None, training: bool = False) -> Any:
        result = compute(sequences, initial_state=initial_state, mask=mask, training=training)
        if mask is None:
            return result
        y, *states = result if isinstance(result, list | tuple) else [result]
        y *= keras.ops.cast(keras.ops.expand_dims(keras.ops.flip(mask, 1), -1), y.dtype)
        return [y, *states] if states else y

    layer.call = call


def _layers(call: Any) -> list[Any]:
    operation = getattr(call, "operation", None)
    return list(operation._flatten_layers()) if isinstance(operation, keras.layers.Layer) else []


def _refuse(node: Node, model: Any) -> None:
    codes = [max(c.builtinCode, c.deprecatedBuiltinCode) for c in model.operatorCodes or []]
    found = {BUILTIN_NAMES.get(code, "CUSTOM") for code in codes}
    refused = sorted(found & _REFUSED)
    if len(model.subgraphs) > 1 or refused:
        what = ", ".join(refused) or f"{len(model.subgraphs)} subgraphs"
        raise ExportError(
            f"{node.name!r} ({node.origin_type}) needs {what}, which cannot be embedded in another file; "
            "replace the operation by one without control flow, state or custom operators."
        )


def _ends(node: Node, model: Any) -> tuple[list[int], int]:
    """Indices of the input tensors, in the order of the node's inputs, and of the output."""
    graph = model.subgraphs[0]
    if model.signatureDefs:
        named = {_text(m.name): int(m.tensorIndex) for m in model.signatureDefs[0].inputs or []}
        order = [named[k] for k in sorted(named)]
    else:
        order = sorted((int(i) for i in graph.inputs), key=lambda i: _text(graph.tensors[i].name))
    if len(order) != len(node.inputs) or len(graph.outputs) != 1:
        raise ExportError(
            f"{node.name!r} ({node.origin_type}) has {len(graph.outputs)} outputs and reads {len(order)} of its "
            f"{len(node.inputs)} inputs after conversion; kquant embeds operations with one output."
        )
    return order, int(graph.outputs[0])


def _indices(values: Any) -> list[int]:
    return [] if values is None else [int(v) for v in values]


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name or "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The converter's chatter about signatures and functions is of no use to a user."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
