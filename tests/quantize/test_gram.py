"""Patches and moments against the operations themselves and against least squares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.ops import compute, linear_of
from kquant.quantize import gram
from kquant.quantize.gram import (
    Moments,
    from_matrices,
    moments,
    patches,
    positions_of,
    sampled_rows,
    to_matrices,
)

RNG = np.random.default_rng(0)


def f(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def spatial(op: str, kernel: tuple[int, ...], outputs: int, **attrs: Any) -> tuple[Node, np.ndarray]:
    """A node with the shape that the operation has on its input, and the input."""
    settings = {"strides": [1, 1], "padding": "same", "dilation": [1, 1], "groups": 1} | attrs
    channels = {"conv2d": kernel[2] * settings["groups"], "depthwise_conv2d": kernel[2]}.get(op, kernel[3])
    x = f(3, 9, 8, channels)
    shape = settings.pop("shape", None)
    node = Node(
        name="n",
        op=op,
        inputs=("x",),
        shape=shape or (),
        attrs=settings,
        weights={"kernel": f(*kernel), "bias": f(outputs)},
    )
    return (node if shape else node.with_(shape=(None, *compute(node, [x]).shape[1:]))), x


CASES = {
    "conv": spatial("conv2d", (3, 2, 4, 5), 5),
    "conv_valid_strides": spatial("conv2d", (3, 4, 4, 5), 5, padding="valid", strides=[2, 3]),
    "conv_same_strides": spatial("conv2d", (3, 3, 4, 5), 5, strides=[2, 2]),
    "conv_dilation": spatial("conv2d", (3, 3, 4, 5), 5, dilation=[2, 1]),
    "conv_groups": spatial("conv2d", (3, 3, 2, 6), 6, groups=3),
    "conv_wide": spatial("conv2d", (1, 1, 4, 9), 9),
    "conv_groups_wide": spatial("conv2d", (1, 1, 2, 9), 9, groups=3),
    "depthwise": spatial("depthwise_conv2d", (3, 3, 4, 1), 4, strides=[2, 2]),
    "depthwise_multiplier": spatial("depthwise_conv2d", (3, 5, 4, 2), 8, padding="valid"),
    "transposed": spatial("conv2d_transpose", (3, 3, 5, 4), 5, strides=[2, 2], shape=(None, 18, 16, 5)),
    "transposed_odd": spatial("conv2d_transpose", (3, 2, 5, 4), 5, strides=[2, 2], shape=(None, 17, 15, 5)),
    "transposed_valid": spatial(
        "conv2d_transpose", (3, 4, 5, 4), 5, strides=[2, 3], padding="valid", shape=(None, 20, 25, 5)
    ),
    "dense": (Node(name="n", op="dense", shape=(None, 5), weights={"kernel": f(6, 5), "bias": f(5)}), f(7, 6)),
    "dense_rank_4": (
        Node(name="n", op="dense", shape=(None, 2, 3, 5), weights={"kernel": f(6, 5), "bias": f(5)}),
        f(7, 2, 3, 6),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_patches_times_matrices_is_the_operation(case: str) -> None:
    node, x = CASES[case]
    positions = np.tile(np.arange(positions_of(node)), (len(x), 1))
    w = to_matrices(node, node.weights["kernel"])
    y = tf.matmul(patches(node, x, positions), w).numpy()  # [groups, rows, outputs]
    y = y.transpose(1, 0, 2).reshape(len(x), *node.shape[1:]) + node.weights["bias"]
    np.testing.assert_allclose(y, compute(node, [x]), atol=1e-4)
    np.testing.assert_array_equal(from_matrices(node, w), node.weights["kernel"])
    assert len(w) == linear_of(node).groups(node)


def gather(node: Node, batches: Any, positions: int) -> list[np.ndarray]:
    return [
        np.concatenate([t.numpy() for t in part], 1)
        for part in zip(*sampled_rows(node, batches, positions, 0), strict=True)
    ]


def test_the_draw_does_not_depend_on_the_batches() -> None:
    node, x = CASES["conv"]
    whole, cut = gather(node, [(x, x)], 11), gather(node, [(x[:1], x[:1]), (x[1:], x[1:])], 11)
    np.testing.assert_array_equal(whole[0], cut[0])
    assert whole[0].shape == (1, 33, 24)


MOMENTS = ["conv", "conv_wide", "conv_groups", "conv_groups_wide", "depthwise_multiplier", "dense_rank_4", "transposed"]


@pytest.mark.parametrize("case", ["conv", "conv_groups", "depthwise_multiplier", "transposed", "dense_rank_4"])
def test_patches_are_held_in_parts(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    node, x = CASES[case]
    whole = gather(node, [(x, x + 1)], 5)
    sizes = []
    patches = gram.patches
    monkeypatch.setattr(gram, "patches", lambda *a: sizes.append(patches(*a)) or sizes[-1])
    for limit in (4 * whole[0].size // len(x), 1):
        monkeypatch.setattr(gram, "_PATCHES", limit)
        for found, expected in zip(gather(node, [(x, x + 1)], 5), whole, strict=True):
            np.testing.assert_array_equal(found, expected)
    assert max(s.shape.num_elements() for s in sizes) == whole[0].size // len(x)


@pytest.mark.parametrize("case", MOMENTS)
def test_moments_are_those_of_all_rows(case: str) -> None:
    node, x = CASES[case]
    x = x + 3
    x_hat = x + 0.1 * f(*x.shape)
    batches = [(x[:1], x_hat[:1]), (x[1:], x_hat[1:])]
    m = moments(node, batches, positions=1000)
    rows, rows_hat = gather(node, batches, 1000)
    w = to_matrices(node, node.weights["kernel"])
    y = rows @ w + node.weights["bias"].reshape(len(w), 1, -1)
    for g in range(len(w)):
        joint = np.cov(rows_hat[g], y[g], rowvar=False, bias=True)
        k = w.shape[1]
        np.testing.assert_allclose(m.gram[g], joint[:k, :k], atol=1e-4)
        np.testing.assert_allclose(m.cross[g], joint[:k, k:], atol=1e-3)
        np.testing.assert_allclose(m.power[g, 0], np.diagonal(joint)[k:], rtol=1e-4)
    # the loss is the squared error at the best bias, which is m.bias
    other = w + 0.1 * f(*w.shape)
    error = y - rows_hat @ other - m.bias(other).reshape(len(w), 1, -1)
    np.testing.assert_allclose(error.mean(axis=1), 0, atol=1e-3)
    np.testing.assert_allclose(m.loss(other)[:, 0], np.square(error).mean(axis=1), rtol=1e-3)


def test_the_target_is_least_squares_and_keeps_dead_inputs() -> None:
    x = f(400, 5)
    x[:, 3] = 2.0  # constant: it says nothing about its weight
    x_hat = x @ (np.eye(5) + 0.1 * RNG.normal(size=(5, 5))) * [1, 1, 1, 0, 1]
    node = Node(name="n", op="dense", shape=(None, 2), weights={"kernel": f(5, 2), "bias": f(2)})
    m = moments(node, [(x, x_hat.astype(np.float32))])
    w = to_matrices(node, node.weights["kernel"])
    target, metric = m.target(w, 0.0)
    design = np.concatenate([x_hat[:, [0, 1, 2, 4]], np.ones((400, 1))], 1)
    y = x @ node.weights["kernel"] + node.weights["bias"]
    np.testing.assert_allclose(target[0, [0, 1, 2, 4]], np.linalg.lstsq(design, y, rcond=None)[0][:4], atol=0.02)
    np.testing.assert_allclose(target[0, 3], w[0, 3], atol=1e-6)
    assert np.linalg.eigvalsh(metric).min() > 0


def test_inputs_without_variance_keep_the_weights() -> None:
    zero = np.zeros((1, 4, 4))
    m = Moments(8, np.zeros((1, 1, 4)), np.zeros((1, 1, 3)), zero, np.zeros((1, 4, 3)), np.zeros((1, 1, 3)))
    w = f(1, 4, 3)
    target, metric = m.target(w, 0.01)
    np.testing.assert_allclose(target, w, rtol=1e-6)
    assert np.linalg.eigvalsh(metric).min() > 0
