"""The arguments of a call: as a signature orders them, as Keras takes them, and on symbolic tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.tracing.builder import NotLowered
from kquant.graph.tracing.keras_graph import inlined, loses_sizes, recorded_calls, variables_meet_tensors
from kquant.graph.tracing.tensorflow_calls import tensorflow_on_symbols


def bind(operation: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments in the order of the signature, without `training` and empty masks."""
    # layers take `training` whether their call does or not
    bound = inspect.signature(operation.call).bind(*args, **{k: v for k, v in kwargs.items() if k != "training"})
    bound.arguments.pop("training", None)
    if bound.arguments.get("mask", 0) is None:
        del bound.arguments["mask"]
    return bound.args, bound.kwargs


def named(operation: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments as Keras takes them: by position only tensors that come first, all others by name."""
    bound = inspect.signature(operation.call).bind(*args, **kwargs)
    order = list(bound.signature.parameters)
    first: list[Any] = []
    by_name: dict[str, Any] = {}
    for position, (name, value) in enumerate(bound.arguments.items()):
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            first += value
        elif kind is inspect.Parameter.VAR_KEYWORD:
            by_name |= value
        elif position == len(first) and name == order[position] and nodes_in(value):
            first.append(value)
        else:
            by_name[name] = value
    return tuple(first), by_name


def nodes_in(*values: Any) -> list[Node]:
    """The nodes somewhere in some arguments."""
    return [v for v in keras.tree.flatten(values) if isinstance(v, Node)]


def is_constant(value: Any) -> bool:
    """Whether an argument is a tensor that depends on no input."""
    return isinstance(value, np.ndarray)


def symbolic(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], owner: Any = None
) -> tuple[Any, list[Any]]:
    """A function on symbolic tensors in place of nodes: (keras.Function of these, results).

    What computes with the size of the batch, or loses other sizes where that is open, runs with one sample; where Keras
    cannot record the calls of custom layers inside of `owner`, these run in place. Results that depend on no input are
    no part of the function, which is None where there is no other.

    Raises:
        NotLowered: it computes other constants each time: random numbers.
    """
    nodes = nodes_in(list(args), kwargs)

    def traced(batch: int | None) -> tuple[Any, list[Any]]:
        shapes = {n.name: (batch and batch * n.batch, *n.shape[1:]) for n in nodes}
        inputs = {n.name: keras.Input(batch_shape=shapes[n.name], dtype=n.dtype) for n in nodes}
        symbolic_args, symbolic_kwargs = keras.tree.map_structure(
            lambda a: inputs[a.name] if isinstance(a, Node) else a, (list(args), dict(kwargs))
        )
        with variables_meet_tensors(), tensorflow_on_symbols():
            results = keras.tree.flatten(function(*symbolic_args, **symbolic_kwargs))
        computed = [r for r in results if isinstance(r, keras.KerasTensor)]
        return keras.Function(list(inputs.values()), computed) if computed else None, results

    def attempt(batch: int | None) -> tuple[Any, list[Any]]:
        found = traced(batch)
        if arrays := _constants(*found):
            others = _constants(*traced(batch))
            if len(arrays) != len(others) or not all(map(np.array_equal, arrays, others)):
                raise NotLowered("it computes with random numbers")
        return found

    try:
        first = attempt(None)
        if first[0] is None or not loses_sizes(first[0]):
            return first
    except NotLowered:
        raise
    except Exception as error:
        for setting in (nullcontext(), inlined(owner)):
            try:
                with setting:
                    return attempt(1)
            except NotLowered:
                raise
            except Exception:
                continue
        raise error
    try:
        return attempt(1)
    except Exception:
        return first


def _constants(function: Any, results: Sequence[Any]) -> list[np.ndarray]:
    """The arrays and numbers that a traced function reads or returns."""
    calls = [] if function is None else recorded_calls(function)
    read = [value for _, args, kwargs, _ in calls for value in keras.tree.flatten((args, kwargs))]
    kinds = np.ndarray, np.generic, tf.Tensor, float
    return [np.asarray(v) for v in (*read, *results) if isinstance(v, kinds)]
