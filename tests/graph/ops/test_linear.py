"""Layouts of linear operations against the operations themselves."""

from __future__ import annotations

import numpy as np
import pytest

from kquant.graph.ops import bias_of, compute, linear_of, op_of, weight_of, weight_view
from tests.support.nodes import CLOSE, LINEAR, normal

NAMES = list(LINEAR)


def plain(name: str) -> tuple:  # type: ignore[type-arg]
    """The node without its bias, its input and its weight."""
    node, (x,) = LINEAR[name]
    key, bias = weight_of(node).name, bias_of(node)
    return node.with_weights(**{bias: np.zeros_like(node.weights[bias])}), x, node.weights[key]


@pytest.mark.parametrize("name", NAMES)
def test_blocks_and_matrices_keep_every_weight(name: str) -> None:
    node, _, weight = plain(name)
    linear = linear_of(node)
    blocks, matrices = linear.blocks(node, weight), linear.matrices(node, weight)
    groups, taps, inputs, outputs = blocks.shape
    assert matrices.shape == (groups, taps * inputs, outputs) and groups * outputs == node.shape[-1]
    for again in (linear.from_blocks(blocks, weight.shape), linear.from_matrices(matrices, weight.shape)):
        np.testing.assert_array_equal(again, weight)
        assert again.flags.c_contiguous


@pytest.mark.parametrize("name", NAMES)
def test_a_block_connects_its_input_to_its_output(name: str) -> None:
    """With one weight left, of group g from input i to output o, the layer reads that input for that output alone."""
    node, x, weight = plain(name)
    linear, key = linear_of(node), weight_of(node).name
    shape = linear.blocks(node, weight).shape
    for g, t, i, o in {tuple(d - 1 for d in shape), (0, 0, 0, 0), tuple(d // 2 for d in shape)}:
        only = np.zeros(shape, np.float32)
        only[g, t, i, o] = 1
        lone = node.with_weights(**{key: linear.from_blocks(only, weight.shape)})
        y = np.asarray(compute(lone, [x]))
        assert not np.delete(y, g * shape[3] + o, axis=-1).any() and y.any()
        other = x.copy()
        other[..., np.arange(x.shape[-1]) != g * shape[2] + i] = 0
        np.testing.assert_array_equal(compute(lone, [other]), y)


@pytest.mark.parametrize("name", NAMES)
def test_output_channels_of_the_view_and_the_fan_in(name: str) -> None:
    node, _, weight = plain(name)
    facts, blocks = weight_of(node), linear_of(node).blocks(node, weight)
    view = np.moveaxis(weight_view(node), facts.channels, -1).reshape(-1, node.shape[-1])
    expected = blocks.transpose(1, 2, 0, 3).reshape(view.shape[0], -1)
    np.testing.assert_array_equal(np.sort(view, 0), np.sort(expected, 0))
    assert op_of(node).matrix == bool(facts.fan_in)
    sums = np.sum(weight, axis=facts.fan_in, dtype=np.float64).reshape(-1)
    np.testing.assert_allclose(sums, blocks.sum((1, 2), dtype=np.float64).reshape(-1), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_contraction_is_the_operation_on_an_image_of_one_colour(name: str) -> None:
    node, x, weight = plain(name)
    linear, colour = linear_of(node), normal(x.shape[-1])
    y = np.asarray(compute(node, [np.broadcast_to(colour, x.shape)]), np.float64).reshape(-1, node.shape[-1])
    found = linear.contract(node, weight, colour, linear.shares(node, x.shape, weight))
    np.testing.assert_allclose(found, y.mean(0), **CLOSE)
    if linear.sees_all(node, x.shape, weight):
        np.testing.assert_allclose(np.broadcast_to(linear.contract(node, weight, colour), y.shape), y, **CLOSE)
    assert linear.sees_all(node, x.shape, weight) == (not name.endswith("same") and node.op != "conv2d_transpose")


@pytest.mark.parametrize("name", [n for n in NAMES if linear_of(LINEAR[n][0]).window])
def test_lines_say_which_input_meets_a_tap(name: str) -> None:
    """An operation with a single tap copies the inputs that its lines name."""
    node, x, weight = plain(name)
    linear = linear_of(node)
    rows, columns = linear.lines(node, x.shape, weight)
    assert rows.shape == (node.shape[1], weight.shape[0]) and columns.shape == (node.shape[2], weight.shape[1])
    blocks = np.zeros(linear.blocks(node, weight).shape, np.float32)
    tap = (weight.shape[0] - 1, weight.shape[1] - 1)
    blocks[0, tap[0] * weight.shape[1] + tap[1], 0, 0] = 1
    y = np.asarray(compute(node.with_weights(kernel=linear.from_blocks(blocks, weight.shape)), [x]))[..., 0]
    r, c = rows[:, tap[0], None], columns[None, :, tap[1]]
    np.testing.assert_array_equal(y, np.where((r >= 0) & (c >= 0), x[:, r, c, 0], 0))
