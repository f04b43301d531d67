"""The weight of a linear operation as blocks, and the places of its input that meet its taps.

Every linear operation is, for each of its groups, y = W^T x + b with a patch x of its input (im2col). Its weight is
arranged as blocks [groups, taps, inputs, outputs]: input g * inputs + i and output g * outputs + o of the layer are
input i and output o of group g. All that depends on the layout of a kernel follows from `blocks` and its inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kquant.graph.ir import Node, Shape

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """The layout of a linear operation.

    Own layouts are [taps..., inputs, groups * outputs], with taps [h, w] or none, and [h, w, outputs, inputs] where it
    is transposed.

    Attributes:
        groups: f(node) -> how many groups of channels it keeps apart.
        window: it has taps: its input is an image, of which an output reads a window.
        transposed: an input writes a window of the output instead.
        channelwise: a group is one input channel: there is no axis of inputs.
    """

    groups: Callable[[Node], int] = lambda node: 1
    window: bool = False
    transposed: bool = False
    channelwise: bool = False

    def blocks(self, node: Node, weight: Array) -> Array:
        """A weight in the operation's own layout as blocks [groups, taps, inputs, outputs]; no copy is made."""
        taps = weight.shape[0] * weight.shape[1] if self.window else 1
        if self.transposed:
            return weight.reshape(1, taps, *weight.shape[2:]).transpose(0, 1, 3, 2)
        inputs = 1 if self.channelwise else weight.shape[-2]
        return weight.reshape(taps, inputs, self.groups(node), -1).transpose(2, 0, 1, 3)

    def from_blocks(self, blocks: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `blocks`: a weight of this shape, contiguous."""
        order = (0, 1, 3, 2) if self.transposed else (1, 2, 0, 3)
        return np.ascontiguousarray(blocks.transpose(order)).reshape(shape)

    def matrices(self, node: Node, weight: Array) -> Array:
        """A weight as [groups, inputs of the patch, outputs]."""
        groups, taps, inputs, outputs = (b := self.blocks(node, weight)).shape
        return b.reshape(groups, taps * inputs, outputs)

    def from_matrices(self, matrices: Array, shape: tuple[int, ...]) -> Array:
        """The inverse of `matrices`."""
        taps = shape[0] * shape[1] if self.window else 1
        groups, rows, outputs = matrices.shape
        return self.from_blocks(matrices.reshape(groups, taps, rows // taps, outputs), shape)

    def line(self, node: Node, axis: int, size: int, taps: int) -> Array:
        """Which inputs an output reads along a spatial axis.

        Args:
            node: the operation, with a window.
            axis: 0 for the height, 1 for the width.
            size: of the input.
            taps: of the kernel.

        Returns:
            [output positions, taps] -> index of the input that meets the tap, or -1 for none.
        """
        out = int(node.shape[axis + 1] or 0)
        stride, dilation = node.attrs["strides"][axis], node.attrs.get("dilation", (1, 1))[axis]
        long, short = (out, size) if self.transposed else (size, out)
        reach = (short - 1) * stride + (taps - 1) * dilation + 1 - long
        pad = max(reach, 0) // 2 if node.attrs["padding"] == "same" else 0
        o, k = np.arange(out)[:, None], np.arange(taps)[None] * dilation
        index = (o + pad - k) if self.transposed else o * stride + k - pad
        if self.transposed:
            index = np.where(index % stride == 0, index // stride, -1)
        return np.where((index >= 0) & (index < size), index, -1)

    def lines(self, node: Node, source: Shape, weight: Array) -> tuple[Array, Array]:
        """`line` of both axes, from the shape of the input and the weight."""
        rows, columns = (self.line(node, a, int(source[a + 1] or 1), weight.shape[a]) for a in (0, 1))
        return rows, columns

    def shares(self, node: Node, source: Shape, weight: Array) -> Array | None:
        """Share of the output's places where each tap reads an element, not a zero [h, w]; None without taps."""
        if not self.window:
            return None
        return np.outer(*((line >= 0).mean(0) for line in self.lines(node, source, weight)))

    def sees_all(self, node: Node, source: Shape, weight: Array) -> bool:
        """Whether every tap reads an element at every place, so that an offset of the input is one of the output."""
        if not self.window:
            return True
        if self.transposed:
            return False  # its border outputs see only some of the taps
        return all(bool((line >= 0).all()) for line in self.lines(node, source, weight))

    def contract(self, node: Node, weight: Array, x: Array, shares: Array | None = None) -> Array:
        """Sum over taps and inputs of weight * x [output channels].

        Args:
            node: the operation.
            weight: in its own layout; the sum is in float64.
            x: [input channels].
            shares: weigh the taps, see `shares`.
        """
        w = weight.astype(np.float64)
        if self.window:
            w = (w.sum((0, 1)) if shares is None else np.tensordot(shares, w, 2))[None, None]
        blocks = self.blocks(node, w)[:, 0]
        return np.asarray((x.reshape(len(blocks), 1, -1) @ blocks).reshape(-1))
