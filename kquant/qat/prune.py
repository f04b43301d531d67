"""`PruneGradually`: weights become zero in training, a few at a time."""

from __future__ import annotations

import re
from typing import Any

import keras
import numpy as np

from kquant.errors import ConfigError, ModelError
from kquant.graph.ops import op_of, weight_of
from kquant.keras.layer import QuantizedLayer
from kquant.keras.model import QuantizedModel
from kquant.qat.distill import Distiller


class PruneGradually(keras.callbacks.Callback):
    """Zeros among the weights of matrix products, more of them step by step (Zhu and Gupta, arXiv 1710.01878).

    From `begin_step` to `end_step` the share of zeros in every layer is

        s(t) = sparsity (1 - (1 - t)^3),   t = (step - begin_step) / (end_step - begin_step)

    and the smallest weights are the zeros. What is zero stays zero, in training and in the file. The model has to be
    prepared with `keep_zeros=True`.

    Args:
        sparsity: the share of zeros at the end, above 0 and below 1.
        end_step: when it is reached, as the optimizer counts its updates (`optimizer.iterations`).
        begin_step: when it begins.
        every: steps between two changes.
        keep: names of layers (regular expression found anywhere in the name) that are not pruned; empty for none.

    Raises:
        ConfigError: a value is out of bounds, or `keep` is no regular expression.
        ModelError: in fit, where no layer of the model keeps its zeros.
    """

    def __init__(self, sparsity: float, *, end_step: int, begin_step: int = 0, every: int = 50, keep: str = ""):
        super().__init__()
        if not 0 < sparsity < 1:
            raise ConfigError(f"sparsity must be above 0 and below 1, found {sparsity!r}.")
        if not 0 <= begin_step < end_step or every < 1:
            raise ConfigError(
                f"PruneGradually needs 0 <= begin_step < end_step and every >= 1; found {begin_step}, {end_step} and "
                f"{every}."
            )
        try:
            self._keep = re.compile(keep) if keep else None
        except re.error as error:
            raise ConfigError(f"{keep!r} is not a regular expression: {error}.") from error
        self.sparsity, self.begin_step, self.end_step, self.every = sparsity, begin_step, end_step, every

    def share(self, step: int) -> float:
        """The share of zeros at a step."""
        t = (step - self.begin_step) / (self.end_step - self.begin_step)
        return float(self.sparsity * (1 - (1 - np.clip(t, 0, 1)) ** 3))

    def on_train_begin(self, logs: Any = None) -> None:
        self._layers()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        step = int(self.model.optimizer.iterations.numpy())
        last = step == self.end_step
        if self.begin_step <= step <= self.end_step and (last or (step - self.begin_step) % self.every == 0):
            self._prune(self.share(step))

    def on_train_end(self, logs: Any = None) -> None:
        """The last step of a run that ends with the schedule."""
        step = int(self.model.optimizer.iterations.numpy())
        if step >= self.end_step:
            self._prune(self.sparsity)

    def _prune(self, share: float) -> None:
        for layer in self._layers():
            key = weight_of(layer.node).name
            weight = np.abs(np.asarray(layer.trained_weights()[key]))
            count = round(share * weight.size)
            mask = np.ones(weight.size, np.float32)
            mask[np.argsort(weight, axis=None, kind="stable")[:count]] = 0
            before = np.asarray(layer.user_views[key].arrays["mask"])
            layer.user_views[key].arrays["mask"].assign(np.minimum(before, mask.reshape(weight.shape)))

    def _layers(self) -> list[QuantizedLayer]:
        """Those that are pruned, each weight once."""
        model = self.model.student if isinstance(self.model, Distiller) else self.model
        if not isinstance(model, QuantizedModel):
            raise ModelError(f"{model.name!r} has no quantizers: train the result of kquant.prepare_qat.")
        found: dict[int, QuantizedLayer] = {}
        for name, layer in model.quantized_layers.items():
            view = layer.user_views.get(weight_of(layer.node).name) if op_of(layer.node).matrix else None
            masked = view is not None and "mask" in view.arrays
            if masked and (self._keep is None or not self._keep.search(name)):
                found.setdefault(id(view), layer)
        if not found:
            raise ModelError(
                f"No layer of {model.name!r} keeps its zeros: prepare it with keep_zeros=True in the config"
                + (f", and `keep` names all layers with {self._keep.pattern!r}." if self._keep else ".")
            )
        return list(found.values())
