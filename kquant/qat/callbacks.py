"""Keras callbacks for quantization-aware training: stop the learning of grids, and log it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kquant.errors import ConfigError, ModelError
from kquant.keras.fake_quant import FakeQuant
from kquant.keras.layer import QuantizedLayer
from kquant.keras.model import QuantizedModel, extract
from kquant.qat.distill import Distiller


class FreezeQuantizers(keras.callbacks.Callback):
    """From some step or epoch on, grids stay as they are and only weights train on.

    Their variables leave the gradient and the optimizer's update, so neither momentum nor weight decay moves them.
    They stay frozen after fit, for as long as the model is in memory; a model loaded from a file learns its grids
    again, unless this callback, which counts on, is there too. Compile before: an optimizer built afterwards does not
    know them.

    Args:
        at_step: the first step that leaves them, as the optimizer counts its updates (`optimizer.iterations`): 0 is
            the first of all, also of a run that is resumed.
        at_epoch: the first epoch that does, 0 the first. One of the two.

    Raises:
        ConfigError: not exactly one of them is given, or it is negative.
        ModelError: in fit, where the model is neither quantized nor a `Distiller` of such a model.
    """

    def __init__(self, *, at_step: int | None = None, at_epoch: int | None = None):
        super().__init__()
        at = at_step if at_epoch is None else at_epoch
        if (at_step is None) == (at_epoch is None) or isinstance(at, bool) or not isinstance(at, int) or at < 0:
            raise ConfigError(
                f"FreezeQuantizers takes at_step or at_epoch, an integer of at least 0; found at_step={at_step!r} and "
                f"at_epoch={at_epoch!r}."
            )
        self.at_step, self.at_epoch = at_step, at_epoch

    def on_train_begin(self, logs: Any = None) -> None:
        quantizers_of(self.model)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self.at_epoch is not None and epoch >= self.at_epoch:
            self._freeze()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.at_step is not None and int(self.model.optimizer.iterations.numpy()) >= self.at_step:
            self._freeze()

    def _freeze(self) -> None:
        quantizers = quantizers_of(self.model).values()
        learning = [v for q in quantizers for v in q.learned.values() if v.trainable]
        if not learning:
            return
        for variable in learning:
            variable.trainable = False
        self.model.make_train_function(force=True)  # the old one has the variables that it trains built in


class LogQuantizers(keras.callbacks.Callback):
    """Writes grids and the training logs to TensorBoard, once per epoch.

    The scalars are `scale/<quantizer>` (the geometric mean over channels), `zero_point/<quantizer>` for those with one
    zero point, `entropy/<quantizer>` (zero-order, in bits) and `zeros/<quantizer>` (the share) for those of weights,
    and `epoch_<name>` for every entry of the logs. Writing them does not need TensorBoard itself.

    Args:
        log_dir: the folder of the event file; made if needed.

    Raises:
        ModelError: in fit, where the model is neither quantized nor a `Distiller` of such a model.
    """

    def __init__(self, log_dir: str | os.PathLike[str]):
        super().__init__()
        self.log_dir = os.fspath(log_dir)
        self._writer: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        quantizers_of(self.model)
        self._writer = tf.summary.create_file_writer(self.log_dir)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        values = {f"epoch_{name}": float(value) for name, value in (logs or {}).items()}
        for name, quantizer in quantizers_of(self.model).items():
            grid = quantizer.to_grid()
            values[f"scale/{name}"] = float(np.exp(np.mean(np.log(grid.scale))))
            if np.ndim(grid.zero_point) == 0:
                values[f"zero_point/{name}"] = float(grid.zero_point)
        values |= weight_statistics(self.model)
        with self._writer.as_default():
            for tag, value in values.items():
                _write_scalar(tag, value, epoch)
        self._writer.flush()

    def on_train_end(self, logs: Any = None) -> None:
        self._writer.close()


def quantizers_of(model: keras.Model) -> dict[str, FakeQuant]:
    """All quantizers of a quantized model, or of a distiller's student.

    Returns:
        `<node>/weights` and `<node>` (its output, or a constant) -> quantizer.

    Raises:
        ModelError: the model is not quantized.
    """
    student = _student(model)
    if not isinstance(student, QuantizedModel):
        raise ModelError(f"{student.name!r} has no quantizers: train the result of kquant.prepare_qat.")
    found: dict[str, FakeQuant] = {}
    for layer in student.layers:
        if isinstance(layer, QuantizedLayer):
            if layer.weight_quantizer is not None:
                found[f"{layer.node.name}/weights"] = layer.weight_quantizer
            found.update(layer.quantizers)
    return found


def weight_statistics(model: keras.Model) -> dict[str, float]:
    """What a coder would make of the weights of a quantized model, or of a distiller's student, as they stand now.

    Returns:
        `entropy/<node>/weights` and `zeros/<node>/weights` -> bits, and the share of zeros.
    """
    qgraph, values = extract(_student(model)), {}
    for name, grid in qgraph.weights.items():
        if grid is not None:
            integers = qgraph.integers[name]
            values[f"entropy/{name}/weights"] = grid.entropy(integers)
            values[f"zeros/{name}/weights"] = float(np.mean(integers == 0))
    return values


def _student(model: keras.Model) -> keras.Model:
    return model.student if isinstance(model, Distiller) else model


def _write_scalar(tag: str, value: float, step: int) -> None:
    """A scalar of TensorBoard's plugin "scalars", whose own function needs the tensorboard package."""
    plugin = tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars")
    tf.summary.write(tag, tf.constant(value, tf.float32), step, tf.compat.v1.SummaryMetadata(plugin_data=plugin))
