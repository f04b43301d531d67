"""Quantization operations with their straight-through gradients, forward and gradient side by side.

Everything here is float32 arithmetic on integer-valued tensors, so it is the same in eager, graph
and XLA execution.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

Tensor = Any


@tf.custom_gradient
def round_ste(x: Tensor) -> Tensor:
    """round(x), half to even; d/dx = 1 (straight-through estimator, Bengio et al. 2013)."""
    return tf.round(x), lambda dy: dy


def exact(ideal: Tensor, computed: Tensor) -> Tensor:
    """The value of `computed` with the gradient of `ideal`.

    For kernels whose integer arithmetic has no useful gradient: `ideal` is the real-valued function
    and `computed` is what the target computes, within a rounding of it.
    """

    @tf.custom_gradient
    def pick(i: Tensor, c: Tensor) -> Tensor:
        return tf.identity(c), lambda dy: (dy, None)

    return pick(ideal, tf.stop_gradient(computed))
