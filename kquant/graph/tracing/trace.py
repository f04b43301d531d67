"""Tracing a Keras model of any shape into a `Graph`.

The calls recorded in a functional model are visited in topological order and each is lowered to
primitive nodes by the tables of `graph.lower`. Nested models are inlined, a shared layer is lowered
once per call, and what is not in the tables is handled in this order: a custom layer is traced by
calling its `call` on symbolic tensors; whatever cannot be traced or has no primitive becomes one
"float" node, whose attribute `reason` says why. The user's model is left as it was.

Half- and double-precision models are traced as float32 (their weights are cast).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import keras
import numpy as np

from kquant.config.text import first_line, snake
from kquant.errors import ModelError
from kquant.graph.backend import check_backend
from kquant.graph.ir import Graph, Node, Shape
from kquant.graph.tracing import (  # noqa: F401  they fill the tables
    activations,
    attention,
    choices,
    fourier,
    layers,
    linear,
    maps,
    normalization,
    operations,
    products,
    recurrent,
    selection,
    statistics,
    training,
    volumes,
)
from kquant.graph.tracing.arguments import bind, is_constant, named, nodes_in, symbolic
from kquant.graph.tracing.builder import Builder, NotLowered, Scope, find_lowering, is_builtin, without_batch
from kquant.graph.tracing.choices import COMPARISONS
from kquant.graph.tracing.float_call import FloatCall, Slot, counted
from kquant.graph.tracing.implicit_masks import ImplicitMasks
from kquant.graph.tracing.inputs import RANGES, settle_inputs, types_of
from kquant.graph.tracing.keras_graph import (
    dtype_of,
    fixed_batch,
    functional_form,
    match_inputs,
    output_shapes,
    recorded_calls,
    signature,
    untouched,
)
from kquant.graph.tracing.operations import check_moved
from kquant.graph.tracing.registry import registered_lowering
from kquant.graph.tracing.wrappers import channels_first

# They read masks
_ATTENTION = {"MultiHeadAttention", "GroupedQueryAttention", "Attention", "AdditiveAttention", "DotProductAttention"}
# They declare the shape of an input, whatever they make of it
_DECLARE_THEIR_INPUT = {"Activation", "DotProductAttention"}
# They read integers: ids, or pixels that they turn into numbers
_READS_IDS = {"Embedding", "ReversibleEmbedding", "TakeAlongAxis", "OneHot"}
_COUNTS = {"Minimum", "Maximum", "Multiply"}
_LOGICAL = {"LogicalAnd", "LogicalOr", "LogicalNot"} | COMPARISONS
_READS_INTEGERS = {"Rescaling", "Normalization", "Cast", "Softmax"} | _COUNTS | _READS_IDS | _ATTENTION | _LOGICAL
# or truth values
_MASKED = {"LSTM", "GRU", "SimpleRNN", "RNN", "Bidirectional", "GlobalAveragePooling1D"} | _ATTENTION
_READS_TRUTHS = {"Cast", "Where", "Softmax", "Any", "All"} | _LOGICAL | _COUNTS | _MASKED
# or values of any type that was computed, which they move, or whose shape alone they want
_MOVES = {"Reshape", "Squeeze", "ExpandDims", "Transpose", "Swapaxes", "Moveaxis", "GetItem", "Slice", "Flatten"}
_MOVES |= {"ZerosLike", "OnesLike", "FullLike", "BroadcastTo", "ConvertToTensor"}


def trace_model(
    model: keras.Model, for_training: bool = False, shapes: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> Graph:
    """The float graph of a Keras model in inference mode.

    Args:
        model: Functional, Sequential, or subclassed (built) Keras model; it is not modified.
        for_training: keep what matters in training only: layers such as Dropout as "train_only" nodes, and in every
            node what its weights are in the user's layer (`Node.user`).
        shapes: input -> its shape without the batch, where the model leaves sizes open.

    Returns:
        A graph with `evaluate(graph, inputs) == model(inputs)`. An integer input that is only read as
        numbers (by a Rescaling layer, say) is a float32 input of the graph, and a float input that is
        only read as ids (by an Embedding) is an int32 input.

    Raises:
        BackendError: Keras does not run on TensorFlow.
        ModelError: the model is not built, cannot be traced, has open sizes besides the batch that `shapes` does not
            tell, or has weights that are not finite.
    """
    check_backend()
    if not isinstance(model, keras.Model):
        raise ModelError(f"expected a keras.Model, got {type(model).__name__}")
    function, generated = _as_function(model, shapes)
    tracer = _Tracer(for_training)
    tracer.builder.scope.learns = bool(model.trainable)
    named = signature(function)
    known = zip(function.inputs, map(shapes.get, named["input_names"]), types_of(function), strict=True)
    inputs = [tracer.input(*one) for one in known]
    try:
        outputs = tracer.walk(function, inputs, "", "", generated)
        check_moved(outputs)
    except NotLowered as reason:  # not even in float
        raise ModelError(str(reason)) from reason
    graph = Graph(
        nodes=tracer.builder.nodes,
        inputs=tuple(i.name for i in inputs),
        outputs=tuple(o.name for o in outputs),
        **named,
        name=model.name,
    )
    return settle_inputs(graph.rebuild(graph))


class _Tracer:
    """Walks functions and lowers their calls into one builder."""

    def __init__(self, for_training: bool = False) -> None:
        self.builder = Builder(self.trace_function, for_training)
        self.masks = ImplicitMasks()

    def input(self, tensor: Any, known: Sequence[int] | None, dtype: str) -> Node:
        """The "input" node of a model input, whose shape without the batch may be known from elsewhere."""
        shape = without_batch(tensor.shape)
        if None in shape[1:] and known is not None:
            shape = (None, *known)
        fits = len(shape) == len(tensor.shape) and all(
            d in (None, s) for d, s in zip(tensor.shape[1:], shape[1:], strict=True)
        )
        if None in shape[1:] or not fits:
            found = "" if fits else f", which {tuple(shape[1:])} does not fit"
            raise ModelError(
                f"Input {tensor.name!r} has shape {tuple(tensor.shape)}{found}: only the batch may be open in a file. "
                "Pass calibration data of one size, or input_shape= with a size for every axis."
            )
        name = tensor._keras_history.operation.name
        self.builder.scope = Scope(self.builder.unique(name), name, "InputLayer", (), self.builder.scope.learns)
        expects = RANGES.get(str(tensor.dtype))
        node = self.builder.emit("input", shape=shape, dtype=dtype)
        return node if expects is None else self.builder.replace(node.with_attrs(expects=expects))

    def walk(self, function: Any, inputs: Sequence[Node], name: str, origin: str, generated: bool) -> list[Node]:
        """Lower every call of a function.

        Args:
            function: keras.Function or functional model.
            inputs: one node per input of the function.
            name: prefix of node names.
            origin: prefix of origins (as `name`, without the numbers of repeated calls).
            generated: the function was made here, so its operations have meaningless automatic names.
        """
        values = {id(t): node for t, node in zip(function.inputs, inputs, strict=True)}
        around = self.builder.scope
        for operation, args, kwargs, outputs in recorded_calls(function):
            if all(id(t) in values for t in outputs):
                continue
            args, kwargs = keras.tree.map_structure(
                lambda a: values[id(a)] if isinstance(a, keras.KerasTensor) else a, (args, kwargs)
            )
            is_layer = isinstance(operation, keras.layers.Layer)
            own = operation.name if is_layer or not generated else snake(type(operation).__name__)
            unique = self.builder.unique(name + own)
            shapes = output_shapes(operation, args, kwargs, outputs)
            trains = training.of_call(operation, args, kwargs, around)
            self.builder.scope = Scope(unique, origin + own, type(operation).__name__, shapes, *trains)
            nodes = self._call(operation, args, kwargs, outputs)
            values.update(zip(map(id, outputs), nodes, strict=True))
        return [values[id(t)] for t in function.outputs]

    def _call(self, operation: Any, args: Any, kwargs: Any, outputs: Sequence[Any]) -> list[Node]:
        """Nodes of one call's outputs, lowered or kept in float."""
        scope, nodes = self.builder.scope, self.builder.nodes
        _check_operation(operation, scope)
        args, kwargs = bind(operation, args, kwargs)
        kwargs |= self.masks.arguments(self.builder, operation, args, kwargs)
        before = len(nodes)
        try:
            result = keras.tree.flatten(self._lower(operation, args, kwargs))
        except NotLowered as reason:
            for name in list(nodes)[before:]:
                del nodes[name]
            self.builder.scope = scope
            kept = self._float(operation, args, kwargs, outputs, str(reason))
            self.masks.follow(operation, args, kwargs, kept)
            return kept
        if not all(isinstance(node, Node) for node in result):
            self.builder.scope = scope
            return result
        self.masks.follow(operation, args, kwargs, result)
        for node, tensor in zip(result, outputs, strict=True):
            declared = None if type(operation).__name__ in _DECLARE_THEIR_INPUT else tuple(tensor.shape[1:])
            if declared is not None and None not in declared and node.shape[1:] != declared:
                kind = AssertionError if is_builtin(operation) else ModelError  # (of its compute_output_shape)
                raise kind(f"Layer {scope.origin!r} declares the shape {tensor.shape}, and computes {node.shape}")
        self.builder.scope = scope
        return training.acting(self.builder, operation, args, kwargs, result)

    def _lower(self, operation: Any, args: Any, kwargs: Any) -> Any:
        scope = self.builder.scope
        is_layer = isinstance(operation, keras.layers.Layer)
        check_moved(nodes_in(args, kwargs), operation)
        constants = any(map(is_constant, keras.tree.flatten((args, kwargs))))
        if constants and not nodes_in(args, kwargs):
            with untouched(operation):
                return keras.tree.map_structure(np.asarray, operation(*args, **kwargs))
        registered = registered_lowering(operation) if is_layer else None
        if registered is not None:
            return self.trace_function(self.builder, registered, [operation, *args], owner=operation, **kwargs)
        function = functional_form(operation)
        if function is not None:
            inputs = match_inputs(function, args[0] if len(args) == 1 else list(args))
            return self.walk(function, inputs, f"{scope.name}/", f"{scope.origin}/", False)
        lowering = find_lowering(operation)
        if lowering is None:
            if is_layer and (not is_builtin(operation) or isinstance(operation, (keras.layers.Lambda, keras.Model))):
                return self._trace_call(operation, args, kwargs)
            raise NotLowered(f"{type(operation).__name__} has no integer form here")
        if constants and is_layer:  # operations take constants, layers do not
            return self._trace_call(operation, args, kwargs)
        tensors = nodes_in(args, kwargs)
        for kind, readers in (("int32", _READS_INTEGERS), ("bool", _READS_TRUTHS)):
            found = [t for t in tensors if t.dtype == kind]
            moves = type(operation).__name__ in _MOVES
            if found and not moves and type(operation).__name__ not in readers:
                raise NotLowered("it computes with integers or truth values")
        if _channels_first(operation):
            lowering = channels_first(lowering)
        return lowering(self.builder, operation, *args, **kwargs)

    def _trace_call(self, layer: Any, args: Any, kwargs: Any) -> list[Node]:
        """Lower what a custom layer's `call` does.

        A layer without sublayers is lowered as a whole or not at all: half of a normalization in
        integers, say, costs accuracy and conversions and gains nothing.
        """
        before = len(self.builder.nodes)
        result = self.trace_function(self.builder, layer.call, args, owner=layer, **kwargs)
        left = [n for n in list(self.builder.nodes.values())[before:] if n.op == "float"]
        if left and len(layer._flatten_layers()) == 1:
            raise NotLowered(f"it computes {left[0].origin_type}: {left[0].attrs['reason']}")
        return result

    def trace_function(
        self, builder: Builder, function: Callable[..., Any], args: Sequence[Any], owner: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Call a Python function on symbolic tensors and lower what it does.

        A result that depends on no input is an array, with one entry for the batch.

        Args:
            builder: this tracer's builder.
            function: takes tensors and returns tensors.
            args: its arguments, with nodes in place of tensors.
            owner: the layer that it belongs to.
            kwargs: more arguments.

        Raises:
            NotLowered: it cannot be called on symbolic tensors.
        """
        scope = builder.scope
        nodes = nodes_in(list(args), kwargs)
        with untouched(owner if owner is not None else function):
            try:
                traced, results = symbolic(function, args, kwargs, owner)
            except Exception as error:
                raise NotLowered(f"its computation cannot be traced: {first_line(error)}") from error
        constant = not all(isinstance(r, keras.KerasTensor) for r in results)
        if constant and builder.scope.trainable and builder.training:
            raise NotLowered("it returns what depends on its weights alone")
        inputs = list({n.name: n for n in nodes}.values())
        inner = [] if traced is None else self.walk(traced, inputs, f"{scope.name}/", f"{scope.origin}/", True)
        walked = iter(inner)
        return [next(walked) if isinstance(r, keras.KerasTensor) else np.asarray(r) for r in results]

    def _float(self, operation: Any, args: Any, kwargs: Any, outputs: Sequence[Any], reason: str) -> list[Node]:
        """A node for each output that runs the user's own operation."""
        scope = self.builder.scope
        if _channels_first(operation):
            raise ModelError(
                f"Layer {scope.origin!r} ({scope.origin_type}) stays in float with data_format='channels_first', which "
                f"the targets do not have ({reason}): rebuild it with channels_last"
            )
        inputs: list[Node] = []

        def slot(value: Any) -> Any:
            if isinstance(value, Node):
                check_moved([value], operation)
                value = counted(self.builder, value)
                inputs.append(value)
                return Slot(len(inputs) - 1, value.shape, value.dtype)
            if isinstance(value, keras.Variable) or hasattr(value, "numpy"):
                return np.asarray(keras.ops.convert_to_numpy(value))
            return value

        args, kwargs = keras.tree.map_structure(slot, named(operation, args, kwargs))
        whole, nodes = FloatCall(operation, args, kwargs).in_float32(), []
        for k, (tensor, shape) in enumerate(zip(outputs, scope.shapes, strict=True)):
            declared = tuple(tensor.shape)
            if not declared or None in shape[1:] or declared[0] not in (None, fixed_batch(operation)):
                raise NotLowered(
                    f"Layer {scope.origin!r} ({scope.origin_type}) returns shape {declared}: every tensor must start "
                    f"with the batch and have known dimensions behind it ({reason})"
                )
            call, dtype = whole.of_output(k if len(outputs) > 1 else None), dtype_of(tensor)
            batches = [i.batch for i in inputs]
            batch = call.parts(batches)
            if batch is None and any(map(is_constant, keras.tree.flatten((args, kwargs)))):
                raise NotLowered(f"{scope.origin_type} with a constant of one sample: {reason}")
            batch = max(batches, default=1) if batch is None else batch
            suffix = f"output_{k}" if k else ""
            node = self.builder.emit(
                "float", *inputs, suffix=suffix, shape=shape, batch=batch, dtype=dtype, call=call, reason=reason
            )
            nodes.append(node)
        return nodes


def open_inputs(model: keras.Model) -> list[tuple[str, Shape, str]]:
    """(name, shape, dtype) of the inputs of a model some of whose sizes are open besides the batch; else nothing."""
    function = functional_form(model)
    tensors = [] if function is None else function.inputs
    specs = (
        []
        if function is None
        else [
            (name, tuple(t.shape), dtype_of(t))
            for name, t in zip(signature(function)["input_names"], tensors, strict=True)
        ]
    )
    return specs if any(None in shape[1:] for _, shape, _ in specs) else []


def _as_function(model: keras.Model, known: Mapping[str, Sequence[int]]) -> tuple[Any, bool]:
    """A functional form of the model, and whether it had to be made by tracing its `call`."""
    function = functional_form(model)
    if function is not None:
        return function, False
    shapes = model._build_shapes_dict
    if not model.built or not shapes:
        raise ModelError(
            f"Model {model.name!r} ({type(model).__name__}) is not built: call it once on a batch of data, or give "
            "it a keras.Input"
        )

    def is_shape(value: Any) -> bool:
        return isinstance(value, (tuple, list)) and all(d is None or isinstance(d, int) for d in value)

    def symbolic(shape: Any) -> Any:
        if is_shape(shape):
            return keras.Input(batch_shape=without_batch(shape))
        if isinstance(shape, dict):
            return {k: symbolic(v) for k, v in shape.items()}
        return [symbolic(v) for v in shape]

    arguments = {k.removesuffix("_shape"): symbolic(v) for k, v in shapes.items()}
    if len(arguments) == 1:
        arguments = {next(iter(inspect.signature(model.call).parameters)): next(iter(arguments.values()))}
    inputs: Any = next(iter(arguments.values())) if len(arguments) == 1 else arguments
    with untouched(model):
        try:
            return keras.Function(inputs, model.call(**arguments)), True
        except Exception as error:
            raise ModelError(
                f"Model {model.name!r} ({type(model).__name__}) cannot be traced: its call() fails on symbolic "
                f"tensors: {first_line(error)}. Write it with Keras layers and keras.ops only, or move what cannot "
                "be traced into a Layer of its own, which is then kept in float."
            ) from error


def _check_operation(operation: Any, scope: Scope) -> None:
    """Refuse what would be silently wrong, with the layer's name."""
    where = f"Layer {scope.origin!r} ({scope.origin_type})"
    if getattr(operation, "quantization_mode", None) is not None:
        raise ModelError(f"{where} has been quantized by Keras already: start from the float model")
    for weight in [] if functional_form(operation) is not None else getattr(operation, "weights", []):
        value = np.asarray(keras.ops.convert_to_numpy(weight))
        if value.dtype.kind in "fV" and not np.isfinite(value.astype(np.float32)).all():
            raise ModelError(
                f"{where}: its weight {weight.name!r} has NaN or infinite values, which no integer grid can hold. "
                "Repair or retrain the layer."
            )


def _channels_first(operation: Any) -> bool:
    return getattr(operation, "data_format", None) == "channels_first"
