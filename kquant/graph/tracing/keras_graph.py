"""How Keras stores the graph of a functional model: the only module that knows.

Keras has no public interface to the recorded calls of a model, so this reads `_nodes_by_depth`,
`_inbound_nodes` and their like, and nothing else does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras
from keras.src.models import Functional, Sequential
from keras.src.ops.core import Cast

from kquant.graph.ir import Node, Shape
from kquant.graph.structure import paths
from kquant.graph.tracing.builder import is_builtin, without_batch

INTEGERS = Cast("int32")  # of truth values


def recorded_calls(function: Any) -> Iterator[tuple[Any, Any, Any, list[Any]]]:
    """(operation, args, kwargs, output tensors) of a function's calls in topological order."""
    for depth in sorted(function._nodes_by_depth, reverse=True):
        for node in function._nodes_by_depth[depth]:
            if node.operation is not None and not node.is_input:
                yield node.operation, node.arguments.args, node.arguments.kwargs, node.outputs


def functional_form(operation: Any) -> Any:
    """The functional model that an operation stands for, or None."""
    if isinstance(operation, Sequential) and type(operation).call is Sequential.call:
        return operation._functional
    if isinstance(operation, Functional) and type(operation).call is Functional.call:
        return operation
    return None


def dtype_of(tensor: Any) -> str:
    """The type that a node has for a tensor of Keras."""
    kind = str(tensor.dtype)
    return "float32" if "float" in kind else "bool" if kind == "bool" else "int32"


def output_shapes(operation: Any, args: Any, kwargs: Any, outputs: Sequence[Any]) -> tuple[Shape, ...]:
    """Shapes of a call's outputs: as Keras declares them, or computed anew where it has lost a dimension.

    (An EinsumDense whose output_shape has a None loses it for everything behind it.)
    """
    declared = tuple(without_batch(t.shape) for t in outputs)
    if not any(None in s[1:] for s in declared) or functional_form(operation) is not None:
        return declared
    args, kwargs = keras.tree.map_structure(
        lambda a: keras.KerasTensor(a.shape, a.dtype) if isinstance(a, Node) else a, (args, kwargs)
    )
    try:
        found = tuple(
            without_batch(t.shape) for t in keras.tree.flatten(operation.compute_output_spec(*args, **kwargs))
        )
        return found if not any(None in s[1:] for s in found) else _computed_shapes(operation, args, kwargs)
    except Exception:
        return declared


def _computed_shapes(operation: Any, args: Any, kwargs: Any) -> tuple[Shape, ...]:
    """Shapes of what an operation makes of zeros; open where a size behind the batch depends on it."""

    def of(samples: int) -> list[Shape]:
        def zeros(value: Any) -> Any:
            if not isinstance(value, keras.KerasTensor):
                return value
            return keras.ops.zeros(tuple(samples if d is None else d for d in value.shape), value.dtype)

        filled_args, filled_kwargs = keras.tree.map_structure(zeros, (args, kwargs))
        return [tuple(t.shape) for t in keras.tree.flatten(operation(*filled_args, **filled_kwargs))]

    two, three = of(2), of(3)
    sizes = [[d if d == e else None for d, e in zip(a, b, strict=True)] for a, b in zip(two, three, strict=True)]
    return tuple(without_batch(s) for s in sizes)


def loses_sizes(function: Any) -> bool:
    """Whether some tensor has unknown sizes, besides the batch where it comes first."""
    outputs = [t for _, _, _, tensors in recorded_calls(function) for t in tensors]
    return any(None in tuple(t.shape)[1:] for t in outputs)


def fixed_batch(operation: Any) -> int | None:
    """The batch size that the model was built with, where it was."""
    tensors = operation._inbound_nodes[-1].input_tensors if operation._inbound_nodes else []
    return next((t.shape[0] for t in tensors if len(t.shape) and t.shape[0] is not None), None)


def match_inputs(function: Any, value: Any) -> list[Node]:
    """The nodes passed to a nested model, in the order of its inputs."""
    if isinstance(value, dict) and not isinstance(function._inputs_struct, dict):
        return [value[t.name] for t in function.inputs]
    return keras.tree.flatten(value)


def signature(function: Any) -> dict[str, Any]:
    """The fields of a `Graph` that name and nest the inputs and outputs of a function."""
    inputs, outputs = (
        keras.tree.pack_sequence_as(nest, list(range(len(tensors))))
        for nest, tensors in ((function._inputs_struct, function.inputs), (function._outputs_struct, function.outputs))
    )
    return {
        "input_names": names_of(function._inputs_struct, function.inputs),
        "output_names": tuple(paths(outputs, names_of(function._outputs_struct, function.outputs))),
        "input_structure": inputs,
        "output_structure": outputs,
        "loss_names": tuple(getattr(function, "output_names", None) or ()),
    }


def names_of(structure: Any, tensors: Sequence[Any]) -> tuple[str, ...]:
    """Names of inputs or outputs: keys of a dict, else the names of the operations that make them."""
    names = {id(t): k for k, t in structure.items()} if isinstance(structure, dict) else {}
    unique: list[str] = []
    for tensor in tensors:
        base = name = str(names.get(id(tensor), tensor._keras_history.operation.name))
        k = 0
        while name in unique:
            k += 1
            name = f"{base}_{k}"
        unique.append(name)
    return tuple(unique)


@contextmanager
def untouched(owner: Any) -> Iterator[None]:
    """Forget the symbolic calls of a layer and its sublayers that are made in the block, where no size gets lost."""
    layers = owner._flatten_layers() if isinstance(owner, keras.layers.Layer) else []
    before = [(layer, len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in layers]
    forgetful = [layer for layer in layers if isinstance(layer, keras.layers.EinsumDense) and layer.built]
    for layer in forgetful:
        object.__setattr__(layer, "compute_output_shape", partial(_shape_of_einsum, layer))
    try:
        yield
    finally:
        for layer in forgetful:
            layer.__dict__.pop("compute_output_shape", None)
        for layer, inbound, outbound in before:
            del layer._inbound_nodes[inbound:]
            del layer._outbound_nodes[outbound:]


@contextmanager
def variables_meet_tensors() -> Iterator[None]:
    """Let `variable * tensor` and its like be computed as `tensor * variable` is, where the tensor is symbolic.

    Operators of Keras' variables pass their value to TensorFlow, which takes no symbolic tensor of Keras.
    """
    owner: Any = next(kind for kind in keras.Variable.__mro__ if "__mul__" in vars(kind))
    kinds = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
    names = [f"__{kind}__" for kind in (*kinds, "lt", "le", "gt", "ge", "and", "or", "xor")]
    before = {name: getattr(owner, name) for name in names}

    def meeting(own: Any) -> Any:
        def operator(self: Any, other: Any) -> Any:
            return NotImplemented if isinstance(other, keras.KerasTensor) else own(self, other)

        return operator

    for name, own in before.items():
        setattr(owner, name, meeting(own))
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(owner, name, own)


@contextmanager
def inlined(owner: Any) -> Iterator[None]:
    """Let custom layers inside of another run their `call` in place, as plain functions.

    Keras records calls of layers whose `compute_output_spec` knows all that `call` takes and returns; some do not:
    subclasses with more arguments, layers that return None beside a tensor, or several tensors where they declare one.
    """
    layers = owner._flatten_layers()[1:] if isinstance(owner, keras.layers.Layer) else []
    kinds = [(layer, type(layer)) for layer in layers if not is_builtin(layer) and functional_form(layer) is None]
    for layer, kind in kinds:
        in_place = type(kind.__name__, (kind,), {"__call__": lambda self, *args, **kwargs: self.call(*args, **kwargs)})
        object.__setattr__(layer, "__class__", in_place)
    names = [layer.name for layer in layers]
    for k, layer in enumerate(layers):  # two inner layers may have one name, which a function does not take
        object.__setattr__(layer, "name", f"{layer.name}_{k}")
    try:
        yield
    finally:
        for layer, name in zip(layers, names, strict=True):
            object.__setattr__(layer, "name", name)
        for layer, kind in kinds:
            object.__setattr__(layer, "__class__", kind)


def _shape_of_einsum(layer: Any, input_shape: Any) -> Any:
    """The shape of what an EinsumDense makes, also where its `output_shape` leaves sizes open."""
    if "." in layer.equation:
        return type(layer).compute_output_shape(layer, input_shape)
    left, kernel, result = re.split(",|->", layer.equation)
    sizes = dict(zip(kernel, layer.kernel.shape, strict=True)) | dict(zip(left, input_shape, strict=True))
    return tuple(sizes[axis] for axis in result)
