"""How a "float" node runs the user's own operation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from kquant.errors import ModelError
from kquant.graph.ir import Node
from kquant.graph.tracing.borrowed import Borrowed, Loan, NotCopied
from kquant.graph.tracing.builder import Builder
from kquant.graph.tracing.keras_graph import INTEGERS

_SAME = 1e-3  # how far a copy may be off, relative to the largest output
_HALVES = ("float16", "bfloat16")


def _unchanged(config: Any) -> Any:
    return config


@dataclass(frozen=True)
class Slot:
    """Stands for the tensor `inputs[index]` in the template of a call."""

    index: int
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class FloatCall:
    """A call of a Keras layer or operation, with the places of its tensors marked.

    Attributes:
        operation: the user's own layer or operation; `clone` before using it in a new model.
        args: positional arguments, with a `Slot` where a tensor goes.
        kwargs: keyword arguments, likewise.
        output: which of several results it is, nested ones in order.
    """

    operation: keras.Operation
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    output: int | None = None

    @classmethod
    def of(cls, operation: keras.Operation, output: int | None = None) -> FloatCall:
        """The last symbolic call of an operation in a functional model.

        Args:
            operation: of the model.
            output: which of several results.
        """
        arguments = operation._inbound_nodes[-1].arguments
        counter = iter(range(len(arguments.keras_tensors)))

        def slot(value: Any) -> Any:
            if not isinstance(value, keras.KerasTensor):
                return value
            return Slot(next(counter), tuple(value.shape), str(value.dtype))

        args, kwargs = arguments.convert(slot)
        return cls(operation, args, kwargs, output)

    def of_output(self, output: int | None) -> FloatCall:
        """The same call for another of its results."""
        return replace(self, output=output)

    def __call__(self, inputs: Sequence[Any]) -> Any:
        """Run the operation on tensors or KerasTensors, one per slot.

        Raises:
            ModelError: Keras does not take the call with the constants that were found in it.
        """
        args, kwargs = self._filled(lambda s: inputs[s.index])
        try:
            result = self.operation(*args, **kwargs)
        except ValueError as error:
            if "mix tensors and non-tensors" not in str(error):
                raise
            raise ModelError(
                f"Layer {self.operation.name!r} ({type(self.operation).__name__}) stays in float, and Keras does not "
                "call it with constants among its keyword arguments: give it these as settings, or tell "
                "kquant.register_layer what it computes."
            ) from error
        return result if self.output is None else keras.tree.flatten(result)[self.output]

    def parts(self, batches: Sequence[int]) -> int | None:
        """`Node.batch` of the result: how many entries of its first axis one sample has; None if that cannot be told.

        Args:
            batches: that of every slot's tensor.
        """
        expected = max(batches, default=1)
        samples = 2
        try:
            args, kwargs = self._filled(
                lambda s: keras.KerasTensor((samples * batches[s.index], *s.shape[1:]), dtype=s.dtype)
            )
            specs = keras.tree.flatten(self.operation.compute_output_spec(*args, **kwargs))
            first = specs[self.output or 0].shape[0]
        except Exception:  # it wants no such sizes
            return None
        return first // samples if isinstance(first, int) and first % samples == 0 and first else expected

    def in_float32(self) -> FloatCall:
        """The same call in single precision, of a copy where the operation computes in half precision.

        Raises:
            NotCopied: the operation cannot be serialized.
        """
        op = self.operation
        layers = op._flatten_layers() if isinstance(op, keras.layers.Layer) else []
        if all(layer.compute_dtype not in _HALVES for layer in layers):
            return self
        return self.clone(change=_in_float32)

    def clone(self, name: str | None = None, change: Callable[[Any], Any] = _unchanged) -> FloatCall:
        """The same call of a copy of the operation that shares nothing with the user's model.

        Args:
            name: name of the copy; the operation's own by default.
            change: f(the operation's serialized form) -> that of the copy.

        Raises:
            NotCopied: the operation cannot be serialized, or not all of it is.
        """
        op = self.operation
        if isinstance(op, Borrowed):
            raise NotCopied(op.loan)
        try:
            config = change(keras.saving.serialize_keras_object(op))
            json.dumps(config)
            if name is not None:
                config["config"]["name"] = name
            copy = keras.saving.deserialize_keras_object(
                config, custom_objects={type(op).__name__: type(op)}, safe_mode=False
            )
        except Exception as error:
            raise NotCopied(Loan(op, _paragraph(error))) from error
        if isinstance(op, keras.layers.Lambda):
            copy.function = op.function  # a deserialized lambda has lost the globals that it refers to
        if isinstance(op, keras.layers.Layer) and op.weights:
            args, kwargs = self._filled(lambda s: keras.Input(batch_shape=s.shape, dtype=s.dtype))
            copy(*args, **kwargs)  # creates the variables
            copy._inbound_nodes.clear()
            if [w.shape for w in copy.weights] != [w.shape for w in op.weights]:
                raise NotCopied(Loan(op, "a layer made from its get_config() has other weights"))
            copy.set_weights(op.get_weights())
            for ours, theirs in zip(copy.weights, op.weights, strict=True):
                ours.trainable = theirs.trainable
        call = replace(self, operation=copy)
        if change is _unchanged and not self._random() and not self._equals(call):
            raise NotCopied(Loan(op, "a layer made from its get_config() computes something else"))
        return call

    def deployed(self, name: str | None = None) -> FloatCall:
        """The same call for inference: of a copy, or of a layer that runs the user's own where a copy is none.

        Such a layer can be neither saved nor trained, and says so then.

        Args:
            name: of the copy.
        """
        op = self.operation
        if isinstance(op, Borrowed):
            loan = op.loan
        else:
            try:
                return self.clone(name)
            except NotCopied as error:
                loan = error.loan
        return replace(self, operation=Borrowed(loan, name or op.name))

    def _random(self) -> bool:
        """Whether it draws at random: to run it would draw from the user's own generator."""
        op = self.operation
        layers = op._flatten_layers() if isinstance(op, keras.layers.Layer) else []
        return bool(self.kwargs.get("training")) or any(
            isinstance(value, keras.random.SeedGenerator) for layer in layers for value in vars(layer).values()
        )

    def _equals(self, copy: FloatCall) -> bool:
        """Whether a copy computes the same, as far as some inputs tell."""
        rng = np.random.default_rng(0)

        def example(slot: Slot) -> Any:
            shape = (2, *(d or 1 for d in slot.shape[1:]))
            return keras.ops.cast(
                rng.normal(size=shape) if "float" in slot.dtype else rng.integers(0, 2, shape), slot.dtype
            )

        slots = {s.index: s for s in keras.tree.flatten((self.args, self.kwargs)) if isinstance(s, Slot)}
        inputs = [example(slots[k]) for k in sorted(slots)]
        try:
            expected, again = self(inputs), self(inputs)
        except Exception:  # such inputs mean nothing to it
            return True
        return _close(expected, copy(inputs)) or not _close(expected, again)  # (random at inference, too)

    def _filled(self, tensor: Any) -> tuple[Any, Any]:
        def fill(value: Any) -> Any:
            return tensor(value) if isinstance(value, Slot) else value

        return keras.tree.map_structure(fill, (self.args, self.kwargs))


def counted(b: Builder, truth: Node) -> Node:
    """A tensor for an operation of the user's: zeros and ones where the model has these in place of truth values."""
    if truth.name not in b.counts:
        return truth
    call, why = FloatCall(INTEGERS, (Slot(0, truth.shape, "bool"),), {}), "the layer behind it counts truth values"
    return b.emit(
        "float", truth, suffix="counted", shape=truth.shape, batch=truth.batch, dtype="int32", call=call, reason=why
    )


def _close(results: Any, others: Any) -> bool:
    """Whether two (nests of) tensors are equal up to rounding."""
    for a, b in zip(keras.tree.flatten(results), keras.tree.flatten(others), strict=True):
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if x.shape != y.shape or not np.array_equal(np.isfinite(x), np.isfinite(y)):
            return False
        known = np.isfinite(x)
        size = np.max(np.abs(x[known]), initial=1e-12)
        if np.max(np.abs(x[known] - y[known]), initial=0.0) > _SAME * size:
            return False
    return True


def _paragraph(error: Exception) -> str:
    """The first paragraph of an error's message, in one line."""
    return " ".join(str(error).strip().split("\n\n")[0].split()) or type(error).__name__


def _in_float32(config: Any) -> Any:
    """A serialized layer with every dtype and policy of half precision in it, also of inner layers, float32."""
    if isinstance(config, Mapping):
        return {k: "float32" if k == "dtype" and _is_half(v) else _in_float32(v) for k, v in config.items()}
    return [_in_float32(v) for v in config] if isinstance(config, list | tuple) else config


def _is_half(dtype: Any) -> bool:
    if isinstance(dtype, Mapping):
        dtype = dtype.get("config", {}).get("name", "")
    return any(half in str(dtype) for half in _HALVES)
