"""Linear operations whose output or input is scaled, and moved, channel by channel."""

from __future__ import annotations

import numpy as np

from kquant.graph.ir import Node, Shape
from kquant.graph.ops import bias_of, linear_of, op_of, weight_of
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
    shape = node.weights[key].shape
    weights = {
        key: linear.from_blocks(scaled, shape),
        bias: node.weights[bias] * s.scale + s.offset,
    }
    user = dict(node.user)
    if user:
        factor = linear.from_blocks(linear.blocks(node, np.ones(shape)) * s.scale.reshape(len(blocks), 1, 1, -1), shape)
        user |= {key: user[key].scaled(factor), bias: user[bias].scaled(s.scale, s.offset)}
    stats = s.stats
    if node.stats and not stats:
        stats = {"mean": node.stats["mean"] * s.scale + s.offset, "std": node.stats["std"] * np.abs(s.scale)}
    between = tuple(op_of(n).reframed(n, s) for n in node.between)
    arrays = {k: v.astype(np.float32) for k, v in weights.items()}
    return node.with_(weights=arrays, stats=stats, user=user, between=between)


def scale_input(node: Node, s: Scaling) -> Node:
    """The linear node whose input was scaled: W' = W * scale, b' = b + W offset, summed over the taps."""
    key, bias, linear = weight_of(node).name, bias_of(node), linear_of(node)
    weight = node.weights[key]
    blocks = linear.blocks(node, weight.astype(np.float64))
    scaled = linear.from_blocks(blocks * s.scale.reshape(len(blocks), 1, -1, 1), weight.shape)
    shifted = node.weights[bias] + linear.contract(node, weight, s.offset)
    user = dict(node.user)
    if user:
        ones = linear.blocks(node, np.ones(weight.shape))
        factor = linear.from_blocks(ones * s.scale.reshape(len(blocks), 1, -1, 1), weight.shape)
        moved = user[bias].scaled(np.ones_like(shifted), shifted - node.weights[bias])
        user |= {key: user[key].scaled(factor), bias: moved}
    arrays = {key: scaled.astype(np.float32), bias: shifted.astype(np.float32)}
    return node.with_weights(**arrays).with_(user=user)
