"""Magnitudes of the weights between every input and output channel, in one form for all linear operations.

A block array is [groups, inputs, outputs] float64: the largest |w| between an input and an output channel of a group.
A depthwise convolution has a group per channel, everything but a grouped convolution else has one.
"""

from __future__ import annotations

import numpy as np

from kquant.graph.ir import Node


def magnitudes(node: Node) -> np.ndarray:
    """The block array of a linear operation."""
    if node.op == "affine":
        return np.abs(node.weights["scale"].astype(np.float64))[:, None, None]
    kernel = np.abs(node.weights["kernel"].astype(np.float64))
    if node.op == "dense":
        return kernel[None]
    kernel = kernel.max((0, 1))
    if node.op == "depthwise_conv2d":  # [c, m]
        return kernel[:, None, :]
    if node.op == "conv2d_transpose":  # [cout, cin]
        return kernel.T[None]
    groups = node.attrs["groups"]  # [cin / groups, cout]
    return kernel.reshape(len(kernel), groups, -1).transpose(1, 0, 2)


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
