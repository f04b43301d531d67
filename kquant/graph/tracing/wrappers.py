"""Layers around layers, and layers in another layout: what they compute at inference is what is inside them."""

from __future__ import annotations

from typing import Any

import keras

from kquant.graph.ir import Node
from kquant.graph.tracing.builder import Builder, Lowering, NotLowered, lowers_layer, reshape, transpose

L = keras.layers


@lowers_layer(L.TimeDistributed)
def time_distributed(b: Builder, layer: Any, inputs: Node, mask: Any = None) -> Node:
    """The inner layer on [batch * frames, ...]."""
    if mask is not None:
        raise NotLowered("frames with a mask")
    frames = inputs.shape[1]
    x = reshape(b, inputs, (None, *inputs.shape[2:]), "frames")
    results = b.trace_function(b, layer.layer, [x], owner=layer.layer)
    if len(results) != 1:
        raise NotLowered(f"a layer with {len(results)} outputs on every frame")
    return reshape(b, results[0], (None, frames, *results[0].shape[1:]), "clip")


def channels_first(lowering: Lowering) -> Lowering:
    """A lowering for channels behind the places, between transposes that bring them there and back."""

    def lowered(b: Builder, layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Node) or len(x.shape) < 3:
            return lowering(b, layer, x, *args, **kwargs)
        rank = len(x.shape)
        there, back = (0, *range(2, rank), 1), (0, rank - 1, *range(1, rank - 1))
        declared = b.scope.shapes
        if len(declared[0]) == rank:
            b.scope.shapes = tuple((s[0], *s[2:], s[1]) for s in declared)
        y = lowering(b, layer, transpose(b, x, there, "channels_last"), *args, **kwargs)
        b.scope.shapes = declared
        return transpose(b, y, back, "channels_first") if len(y.shape) == rank == len(declared[0]) else y

    return lowered
