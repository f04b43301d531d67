"""The unit in which a weight trains."""

from __future__ import annotations

import math

import numpy as np

from kquant.graph.ops import OPS


def weight_unit(op: str, weight: np.ndarray) -> np.ndarray:
    """Powers of two that divide a weight to the deviation of a fresh one, sqrt(2 / fan in), in each output channel.

    Folding a batch normalization leaves each channel in a size of its own, and the input's range the first layer (small
    for images of 0 to 255), while an optimizer such as Adam moves all values by one amount.

    Args:
        op: one whose weights add up (`Op.matrix`).
        weight: of that operation, in its own shape.

    Returns:
        float32, broadcastable to `weight`; a channel of (nearly) zeros has 2^-6 of the largest unit.
    """
    facts = OPS[op].weight
    axes = () if facts is None else facts.fan_in
    size = np.sqrt(np.mean(np.square(weight, dtype=np.float64), axes, keepdims=True))
    if not (largest := size.max(initial=0.0)) > 0:
        return np.ones(size.shape, np.float32)
    fan_in = math.prod(weight.shape[axis] for axis in axes)
    fresh = math.sqrt(2 / fan_in)
    return np.exp2(np.rint(np.log2(np.maximum(size, largest * 2.0**-6) / fresh))).astype(np.float32)
