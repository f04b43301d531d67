"""Pruned weights as sparse tensors, which the operator DENSIFY writes out."""

from __future__ import annotations

import copy
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from kquant.targets.storage import constants, sparse
from kquant.targets.storage.constants import Stored

_OPERATOR = 256  # what else a file needs, about: DENSIFY, its tensor, the tables that describe it


def densify(model: Any) -> tuple[Stored, ...]:
    """Store int8 weights as sparse tensors in front of DENSIFY where that is shorter, all that it needs counted.

    XNNPACK, LiteRT's default, writes them out once, when the file is loaded, and runs at full speed. The kernels
    without a delegate compute the same from what DENSIFY leaves in memory, but cannot prepare such weights ahead: a
    single convolution was seen to take many times as long there, a whole ResNet8 the same time.

    Args:
        model: a schema.ModelT, changed in place.

    Returns:
        How each tensor of weights is stored.
    """
    graph, report, before = model.subgraphs[0], [], {}
    for weight in constants.weights(model):
        tensor = graph.tensors[weight.tensor]
        values, sparsity, size = sparse.encode(weight.values)
        if tensor.type != schema.TensorType.INT8 or size + _OPERATOR >= weight.plain / weight.sharers:
            report.append(Stored(weight.name, "plain", weight.plain, weight.plain))
            continue
        stored = copy.copy(tensor)
        stored.name, stored.sparsity = None, sparsity
        stored.buffer, tensor.buffer = constants.add_buffer(model, values.tobytes()), 0
        graph.tensors.append(stored)
        op = schema.OperatorT()
        op.opcodeIndex = constants.add_code(model, schema.BuiltinOperator.DENSIFY)
        op.builtinOptionsType, op.builtinOptions = schema.BuiltinOptions.DensifyOptions, schema.DensifyOptionsT()
        op.inputs, op.outputs = [len(graph.tensors) - 1], [weight.tensor]
        before[weight.readers[0]] = [op]
        report.append(Stored(weight.name, "sparse", weight.plain, size))
    constants.insert(model, before)
    constants.drop_unused_buffers(model)
    return tuple(report)
