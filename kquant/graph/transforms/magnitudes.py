"""Magnitudes of the weights between every input and output channel, in one form for all linear operations.

A block array is [groups, inputs, outputs] float64: the largest |w| between an input and an output channel of a group.
A depthwise convolution has a group per channel, everything but a grouped convolution else has one.
"""

from __future__ import annotations

import numpy as np

from kquant.graph.ir import Node
from kquant.graph.ops import linear_of, weight_of


def magnitudes(node: Node) -> np.ndarray:
    """The block array of a linear operation."""
    weight = node.weights[weight_of(node).name].astype(np.float64)
    return np.abs(linear_of(node).blocks(node, weight)).max(1)


def input_ranges(block: np.ndarray) -> np.ndarray:
    """Largest |w| that reads each input channel [groups * inputs]."""
    return block.max(2).reshape(-1)


def output_ranges(block: np.ndarray) -> np.ndarray:
    """Largest |w| that makes each output channel [groups * outputs]."""
    return block.max(1).reshape(-1)


def scale_magnitudes(
    block: np.ndarray, inputs: np.ndarray | None = None, outputs: np.ndarray | None = None
) -> np.ndarray:
    """The block array of weights multiplied by positive factors per input or output channel."""
    groups, width, height = block.shape
    if inputs is not None:
        block = block * inputs.reshape(groups, width, 1)
    if outputs is not None:
        block = block * outputs.reshape(groups, 1, height)
    return block
