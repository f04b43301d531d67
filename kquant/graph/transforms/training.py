"""From a graph that is made for training to the one that is deployed, and to the one that training runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from kquant.graph.ir import Graph, Node
from kquant.graph.ops import clip_of, without_clip

Tensor = Any


def without_train_only(graph: Graph) -> Graph:
    """The graph without "train_only" nodes, which are the identity at inference."""
    gone = {node.name: node.inputs[0] for node in graph if node.op == "train_only"}
    return graph.rebuild([node for node in graph if node.name not in gone], gone) if gone else graph


def in_training(graph: Graph) -> Graph:
    """The graph in which "train_only" nodes do what they do in training: what their readers see is what comes then.

    What they draw at random is the same every time.
    """
    nodes: list[Node] = []
    for node in graph:
        if node.op == "train_only":
            nodes.append(_acting(node, len(nodes)))
        elif node.between:
            bare = without_clip(node).with_(name=graph.unique_name(f"{node.name}/before"), between=())
            nodes.append(bare)
            for inner in node.between:
                nodes.append(_acting(inner, len(nodes)).with_(inputs=(nodes[-1].name,), shape=node.shape))
            lo, hi = clip_of(node)
            last = {"op": "clip", "inputs": (nodes[-1].name,), "attrs": {"lo": lo, "hi": hi}, "weights": {}, "user": {}}
            nodes.append(node.with_(**last, between=()))
        else:
            nodes.append(node)
    return graph.rebuild(nodes)


def act(layer: Any, attrs: Any, x: Tensor, **training: bool) -> Tensor:
    """A layer of the user's on a tensor of the graph, which is x * scale + offset in the user's model.

    Args:
        layer: the layer.
        attrs: of its "train_only" node.
        x: the tensor.
        training: for the call.
    """
    scale, offset = (None if attrs[k] is None else tf.constant(attrs[k], tf.float32) for k in ("scale", "offset"))
    user = x if scale is None else x * scale
    user = user if offset is None else user + offset
    y = layer(tf.reshape(user, [-1, *attrs["user_shape"][1:]]), **training)
    y = tf.cast(tf.reshape(y, tf.shape(x)), x.dtype)
    y = y if offset is None else y - offset
    return y if scale is None else y / scale


def acts(layer: Any) -> bool:
    """Whether a layer does something in training but penalize: its call takes `training`."""
    return bool(layer._call_has_training_arg)


def _seed_of(number: int) -> int:
    """Of the number of a node, so that no two draw the same."""
    return number


def _acting(node: Node, number: int) -> Node:
    layer = node.call.clone().operation
    for generator in _generators(layer):
        generator.state.assign([_seed_of(number), 0])

    def call(xs: Sequence[Tensor]) -> Tensor:
        return act(layer, node.attrs, xs[0], training=True) if acts(layer) else xs[0]

    return node.with_(op="float", call=call)


def _generators(layer: keras.layers.Layer) -> list[Any]:
    return [g for inner in layer._flatten_layers() for g in vars(inner).get("_seed_generators", ())]
