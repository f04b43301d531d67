"""Masks that Keras passes along with tensors: an Embedding with `mask_zero` hides the places of id 0.

They are no arguments of the calls that Keras records, so they are followed here, by the names of nodes, to the
attention layers that read them.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras

from kquant.errors import ModelError
from kquant.graph.ir import Node
from kquant.graph.tracing.builder import Builder
from kquant.graph.tracing.choices import ids_compared

L = keras.layers
_ATTENTION = (L.MultiHeadAttention, L.GroupQueryAttention)
_OF_A_LIST = (L.Attention, L.AdditiveAttention)  # query, value and key are one argument, and so are their masks


class ImplicitMasks:
    """What hides places of a tensor, by the name of its node: the zeros of ids, or a mask that a layer was given.

    None for a mask of another kind.
    """

    def __init__(self) -> None:
        self._ids: dict[str, Node | None] = {}
        self._seen: dict[str, Node] = {}

    def follow(self, operation: Any, args: Any, kwargs: Any, results: Any) -> None:
        """Note the masks of what a layer returns: a mask that it was given takes the place of that of its input."""
        tensors = [a for a in keras.tree.flatten(args) if isinstance(a, Node)]
        if not isinstance(operation, L.Layer) or not results or not tensors:
            return
        name = results[0].name
        if isinstance(operation, L.Embedding):
            if operation.mask_zero:
                self._ids[name] = tensors[0]
        elif isinstance(operation, L.Masking):
            self._ids[name] = None
        elif (given := _given(operation, args, kwargs)) is not None:
            query = given[0] if isinstance(operation, _OF_A_LIST) else given
            if query is not None and (isinstance(operation, _OF_A_LIST) or _passes_on(operation)):
                self._ids[name] = query if isinstance(query, Node) and query.dtype == "bool" else None
        elif isinstance(operation, _ATTENTION + _OF_A_LIST) or _passes_on(operation):
            read = [t.name for t in (tensors[:1] if isinstance(operation, _ATTENTION + _OF_A_LIST) else tensors)]
            masks = {id(self._ids.get(n)) for n in read}
            if all(n in self._ids for n in read) and len(masks) == 1:
                self._ids[name] = self._ids[read[0]]

    def arguments(self, b: Builder, operation: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        """The masks that an attention layer finds with its tensors.

        Raises:
            ModelError: such a mask is not one of ids.
        """
        if isinstance(operation, _OF_A_LIST) and _given(operation, args, kwargs) is None:
            masks = [self._mask(b, self._ids[t.name]) if t.name in self._ids else None for t in args[0][:2]]
            return {"mask": masks} if any(m is not None for m in masks) else {}
        if not isinstance(operation, _ATTENTION):
            return {}
        named = dict(zip(("query", "value", "key"), args, strict=False))
        if isinstance(kwargs.get("key"), Node):
            named["key"] = kwargs["key"]
        found = {}
        for name, tensor in named.items():
            if isinstance(tensor, Node) and tensor.name in self._ids and kwargs.get(f"{name}_mask") is None:
                found[f"{name}_mask"] = self._mask(b, self._ids[tensor.name])
        return found

    def _mask(self, b: Builder, ids: Node | None) -> Node:
        """True where the ids are not 0; computed once. A mask that was given is itself."""
        if ids is not None and ids.dtype == "bool":
            return ids
        if ids is None or ids.op != "input":
            raise ModelError(
                f"Layer {b.scope.origin!r} ({b.scope.origin_type}) reads a mask that Keras passes along with a tensor, "
                "and that is not of a model's input of ids: give it the mask as attention_mask."
            )
        if ids.name not in self._seen:
            self._seen[ids.name] = ids_compared(b, ids, "not_equal", 0.0, "visible")
        return self._seen[ids.name]


def _given(layer: Any, args: Any, kwargs: Any) -> Any:
    """The argument `mask` of a call, if there is one."""
    names = inspect.signature(layer.call).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}.get("mask")


def _passes_on(layer: Any) -> bool:
    """Whether a layer's output has the mask of its input, or of all its inputs."""
    plain = type(layer).compute_mask is L.Layer.compute_mask
    return bool(layer.supports_masking) and (plain or isinstance(layer, (L.Add, L.Subtract, L.Multiply, L.Average)))
