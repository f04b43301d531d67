"""Random choices of one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Tensor = Any
Step = Callable[["Drawer", Tensor], Tensor]


class Drawer:
    """Random choices for one model, and what its steps may read beside the tensor before them.

    Attributes:
        seen: [batch, steps] of zeros and ones, an input that tells which steps of a sequence are not padding, or None.
        heavy: how many of the few steps are left that become dozens of operations.
    """

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.seen: Tensor = None
        self.heavy = 2

    def pick(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def size(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def activation(self) -> str | None:
        return self.pick(None, None, "relu", "relu", "relu6", "sigmoid", "tanh", "swish", "hard_swish", "elu", "gelu")
