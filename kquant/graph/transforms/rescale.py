"""Linear operations whose output or input is scaled, and moved, channel by channel."""

from __future__ import annotations

import numpy as np

from kquant.graph.ir import Node, Shape
from kquant.graph.ops import bias_of, linear_of, weight_of
from kquant.graph.scaling import Scaling


def sees_offset(node: Node, source: Shape, s: Scaling) -> bool:
    """Whether every tap of a linear operation reads a real element of its input, of shape `source`, or the offset is
    zero."""
    return not s.offset.any() or linear_of(node).sees_all(node, source, node.weights[weight_of(node).name])


def scale_output(node: Node, s: Scaling) -> Node:
    """The linear node whose output is scaled: W' = scale * W, b' = scale * b + offset."""
    key, bias, linear = weight_of(node).name, bias_of(node), linear_of(node)
    blocks = linear.blocks(node, node.weights[key])
    scaled = blocks * s.scale.reshape(len(blocks), 1, 1, -1)
    weights = {
        key: linear.from_blocks(scaled, node.weights[key].shape),
        bias: node.weights[bias] * s.scale + s.offset,
    }
    stats = s.stats
    if node.stats and not stats:
        stats = {"mean": node.stats["mean"] * s.scale + s.offset, "std": node.stats["std"] * np.abs(s.scale)}
    return node.with_(weights={k: v.astype(np.float32) for k, v in weights.items()}, stats=stats)


def scale_input(node: Node, s: Scaling) -> Node:
    """The linear node whose input was scaled: W' = W * scale, b' = b + W offset, summed over the taps."""
    key, bias, linear = weight_of(node).name, bias_of(node), linear_of(node)
    weight = node.weights[key]
    blocks = linear.blocks(node, weight.astype(np.float64))
    scaled = linear.from_blocks(blocks * s.scale.reshape(len(blocks), 1, -1, 1), weight.shape)
    shifted = node.weights[bias] + linear.contract(node, weight, s.offset)
    return node.with_weights(**{key: scaled.astype(np.float32), bias: shifted.astype(np.float32)})
