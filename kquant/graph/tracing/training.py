"""What the user's layers do in training: which of them train, and which act in training only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from kquant.graph.ir import Node
from kquant.graph.tracing.builder import Builder, Scope
from kquant.graph.tracing.float_call import FloatCall, Slot
from kquant.graph.tracing.keras_graph import functional_form

_L = keras.layers
_DROP = (_L.Dropout, _L.SpatialDropout1D, _L.SpatialDropout2D, _L.SpatialDropout3D)


def variables_of(layer: Any) -> dict[str, Any]:
    """The variables of a layer with a kernel and perhaps a bias."""
    return {"kernel": layer.kernel, "bias": layer.bias if layer.use_bias else None}


def constant_kernel(kernel: Any) -> dict[str, Any]:
    """`variables` of an operation without a bias whose kernel is a constant, perhaps a variable of the user's."""
    return {"bias": None, **({"kernel": kernel} if isinstance(kernel, keras.Variable) else {})}


def of_call(operation: Any, args: Any, kwargs: Any, around: Scope) -> tuple[bool, bool]:
    """Whether a call learns (nothing around it is frozen), and whether it has a weight that trains.

    Args:
        operation: layer or operation.
        args, kwargs: of the call.
        around: the scope of the layer whose call it is part of.
    """
    if isinstance(operation, keras.layers.Layer):
        learns = around.learns and bool(operation.trainable)
        return learns, learns and functional_form(operation) is None and bool(operation.trainable_variables)
    operands = [v for v in keras.tree.flatten((args, kwargs)) if not isinstance(v, Node)]
    variables = [v for v in operands if isinstance(v, keras.Variable)]
    if variables or not around.trainable:
        return around.learns, around.learns and any(v.trainable for v in variables)
    return around.learns, around.learns and any(keras.ops.is_tensor(v) for v in operands)  # computed from variables


def acting(
    b: Builder, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: list[Node]
) -> list[Node]:
    """The results of a call that was lowered, behind what it does in training only.

    That is the layer itself where it returned its input as it is, and in training may do otherwise; and the penalty of
    its `activity_regularizer`.
    """
    if not b.training or not isinstance(operation, keras.layers.Layer):
        return result
    slots = [a for a in keras.tree.flatten((list(args), dict(kwargs))) if isinstance(a, Node)]
    identity = len(result) == len(slots) == 1 and result[0] is slots[0] and functional_form(operation) is None
    if identity and operation._call_has_training_arg:
        template = keras.tree.map_structure(_slot, (tuple(args), dict(kwargs)))
        result = [_train_only(b, FloatCall(operation, *template), result[0])]
    elif (regularizer := operation.activity_regularizer) is not None:
        result = [_train_only(b, _penalty(regularizer, node), node) for node in result]
    return result


def _train_only(b: Builder, call: FloatCall, x: Node) -> Node:
    drops = isinstance(call.operation, _DROP)
    return b.emit("train_only", x, shape=x.shape, call=call, user_shape=x.shape, scale=None, offset=None, drops=drops)


def _slot(value: Any) -> Any:
    return Slot(0, value.shape, value.dtype) if isinstance(value, Node) else value


def _penalty(regularizer: Any, node: Node) -> FloatCall:
    layer = keras.layers.Activation("linear", activity_regularizer=regularizer, dtype="float32")
    return FloatCall(layer, (_slot(node),), {})
