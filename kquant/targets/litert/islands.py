"""Float islands: an operation that kquant does not know, converted alone by TensorFlow and spliced in.

The operation runs on symbolic tensors in a model of its own; TensorFlow's converter makes a file of
it, without optimizations, whose tensors and operators are copied into ours.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema

from kquant.errors import ExportError
from kquant.graph.ir import Node, Shape
from kquant.graph.tracing.float_call import FloatCall
from kquant.targets.litert.emitter import Emitter
from kquant.targets.litert.flatbuffer import BUILTIN_NAMES

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
    model = schema.ModelT.InitFromPackedBuf(convert_island(node, shapes, [e.graph[i].dtype for i in node.inputs]), 0)
    _refuse(node, model)
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
    call = node.call.clone() if isinstance(node.call, FloatCall) else node.call
    for layer in _layers(call):
        if isinstance(layer, keras.layers.RNN):
            layer.unroll = True  # a loop would need subgraphs of its own
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
