"""Batch normalization in training (section 4.2 of the white paper), folded into the operation that is deployed.

A batch normalization behind a linear operation u = op(x, W), with statistics of the batch (mean_B, sigma_B) in training
and running ones (mean, sigma) at inference:

    keep              y = gamma (op(x, Q(W)) - mean_B) / sigma_B + beta, deployed with scales s gamma / sigma
    double_forward    y = op(x, Q(W gamma / sigma)) sigma / sigma_B + beta - gamma mean_B / sigma_B
                      (Krishnamoorthi 2018, arXiv 1806.08342, section 3.2.2)
    batch_statistics  y = op(x, Q(W gamma / sigma_B)) + beta - gamma mean_B / sigma_B   (Jacob et al. 2018, 1712.05877)

The last two compute the operation twice, once in float for the statistics. The normalization is put back from the
statistics that folding left behind (`Node.stats`): W is the folded weight, and gamma and beta are the deviation and the
mean of its output, so that training starts from the folded network exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from kquant.config.specs import Training
from kquant.errors import ConfigError, ModelError
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import bias_of, op_of, weight_of, weight_view
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.keras.layer import QuantizedLayer
from kquant.keras.model import QuantizedModel

Tensor = Any
_EPSILON = 1e-3
_MOMENTUM = 0.99  # of the running statistics, as in Keras


@keras.saving.register_keras_serializable("kquant")
class BatchNormLayer(QuantizedLayer):
    """A linear operation with a batch normalization that trains.

    Args:
        batch_norm: "keep", "double_forward" or "batch_statistics".
        gamma_trains: whether the user's gamma does, if there is one.
        running: momentum of the running statistics.
        kwargs: those of `QuantizedLayer`.
    """

    def __init__(
        self, *args: Any, batch_norm: str, gamma_trains: bool = True, running: float = _MOMENTUM, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.batch_norm, self.gamma_trains, self.running = batch_norm, gamma_trains, running
        bias = bias_of(self.node)  # it is beta from now on, and not what the user's layer has penalties for
        self.user_views.pop(bias, None)
        self.variables_by_name[bias].regularizer = self.variables_by_name[bias].constraint = None
        channels = (self.node.shape[-1],)
        self.gamma = self.add_weight(shape=channels, initializer="ones", trainable=gamma_trains, name="gamma")
        self.moving_mean = self.add_weight(shape=channels, initializer="zeros", trainable=False, name="moving_mean")
        self.moving_variance = self.add_weight(
            shape=channels, initializer="ones", trainable=False, name="moving_variance"
        )
        self.momentum = self.add_weight(
            shape=(), initializer=keras.initializers.Constant(running), trainable=False, name="momentum"
        )

    def start(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Normalize an output of this mean and deviation to itself; the bias takes the place of beta.

        Args:
            mean, std: of the output with its bias, [channels].
        """
        bias = self.variables_by_name[bias_of(self.node)]
        self.moving_mean.assign(mean - bias.numpy())
        self.moving_variance.assign(np.square(std))
        self.gamma.assign(np.sqrt(np.square(std) + _EPSILON))
        bias.assign(mean)

    def float_weights(self) -> dict[str, Tensor]:
        weights = super().float_weights()
        key, bias = weight_of(self.node).name, bias_of(self.node)
        ratio = self._ratio(tf.convert_to_tensor(self.moving_variance))
        return {key: self._scaled(weights[key], ratio), bias: weights[bias] - ratio * self.moving_mean}

    def weight_scale(self) -> Tensor:
        scale = super().weight_scale()
        if self.batch_norm != "keep":
            return scale
        return scale * tf.abs(self._ratio(tf.convert_to_tensor(self.moving_variance)))

    def deployed(self) -> tuple[dict[str, np.ndarray], Grid | None, np.ndarray | None]:
        weights, grid, decided = super().deployed()
        if grid is None or self.batch_norm != "keep":
            return weights, grid, decided
        key = weight_of(self.node).name
        scale = np.asarray(self.weight_scale().numpy(), np.float32)
        real = np.asarray(self._quantized_weight()[1].numpy(), np.float32)
        return {**weights, key: real}, replace(grid, scale=scale), decided

    def _quantized_weight(self) -> tuple[Tensor, Tensor]:
        if self.weight_quantizer is None or self.batch_norm != "keep":
            return super()._quantized_weight()
        weight = self.trained_weights()[weight_of(self.node).name]
        integers = self.weight_quantizer.integers(weight_view(self.node, weight))
        integers *= tf.sign(self._along_weight(tf.convert_to_tensor(self.gamma), integers))
        real = integers * self._along_weight(self.weight_scale(), integers)
        return tf.reshape(integers, weight.shape), tf.reshape(real, weight.shape)

    def _forward(self, inputs: Sequence[Tensor]) -> Tensor:
        key, offset = weight_of(self.node).name, bias_of(self.node)
        weights = self.trained_weights()
        weight, beta = weights[key], weights[offset]

        def output(w: Tensor) -> Tensor:
            return self._compute(inputs, {key: w, offset: tf.zeros_like(beta)})

        return _TRAIN[self.batch_norm](self, weight, beta, output)

    def moments(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of a batch of outputs, which the running statistics follow."""
        mean, variance = tf.nn.moments(u, list(range(u.shape.rank - 1)))
        self.follow(mean, variance)
        return mean, variance

    def follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of a batch."""
        momentum = tf.convert_to_tensor(self.momentum)
        for running, seen in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moved = momentum * running + (1.0 - momentum) * tf.stop_gradient(seen)
            running.assign(tf.where(tf.math.is_finite(moved), moved, running))  # a bad batch leaves no trace

    def _ratio(self, variance: Tensor) -> Tensor:
        """gamma / sigma."""
        return self.gamma * tf.math.rsqrt(variance + _EPSILON)

    def _scaled(self, weight: Tensor, factor: Tensor) -> Tensor:
        """The weight times a factor per output channel."""
        view = weight_view(self.node, weight)
        return tf.reshape(view * self._along_weight(factor, view), weight.shape)

    def _along_weight(self, v: Tensor, view: Tensor) -> Tensor:
        axis = weight_of(self.node).channels
        return tf.reshape(v, [-1 if k == axis else 1 for k in range(view.shape.rank)])

    def get_config(self) -> dict[str, Any]:
        own = {"batch_norm": self.batch_norm, "gamma_trains": self.gamma_trains, "running": self.running}
        return {**super().get_config(), **own}


def _keep(layer: BatchNormLayer, weight: Tensor, beta: Tensor, output: Callable[[Tensor], Tensor]) -> Tensor:
    u = output(layer.fake_quantized(weight))
    if u.shape.rank != 4:
        mean, variance = layer.moments(u)
        return (u - mean) * layer._ratio(variance) + beta
    # one kernel, which passes over the tensor less often; its variance is the unbiased one
    y, mean, variance = tf.compat.v1.nn.fused_batch_norm(u, layer.gamma, beta, epsilon=_EPSILON)
    count = tf.cast(tf.size(u) // u.shape[-1], tf.float32)
    layer.follow(mean, variance * ((count - 1.0) / count))
    return y


def _double_forward(layer: BatchNormLayer, weight: Tensor, beta: Tensor, output: Callable[[Tensor], Tensor]) -> Tensor:
    running = tf.stop_gradient(tf.convert_to_tensor(layer.moving_variance))
    mean, variance = layer.moments(output(weight))
    y = output(layer.fake_quantized(layer._scaled(weight, layer._ratio(running))))
    return y * tf.sqrt((running + _EPSILON) / (variance + _EPSILON)) - mean * layer._ratio(variance) + beta


def _batch_statistics(
    layer: BatchNormLayer, weight: Tensor, beta: Tensor, output: Callable[[Tensor], Tensor]
) -> Tensor:
    mean, variance = layer.moments(output(weight))
    ratio = layer._ratio(variance)
    return output(layer.fake_quantized(layer._scaled(weight, ratio))) - mean * ratio + beta


_TRAIN: Mapping[str, Callable[[BatchNormLayer, Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]] = MappingProxyType(
    {"keep": _keep, "double_forward": _double_forward, "batch_statistics": _batch_statistics}
)


def batch_norm_layers(qgraph: QuantizedGraph, training: Training) -> dict[str, Callable[..., QuantizedLayer]]:
    """node -> what makes its layer, for the linear operations that a batch normalization was folded into.

    Raises:
        ConfigError: "keep" with one weight scale per tensor, which cannot take up a factor per channel.
        ModelError: the model has no batch normalization to train with.
    """
    if training.batch_norm == "fold":
        return {}
    nodes = _normalized(qgraph.graph)
    if not nodes:
        raise ModelError(
            f"batch_norm={training.batch_norm!r}, but nothing is known of batch normalizations that train in "
            f'{qgraph.graph.name!r}: pass the float model with its BatchNormalization layers, or use batch_norm="fold".'
        )
    for node in nodes:
        grid = qgraph.weights.get(node.name)
        if training.batch_norm == "keep" and grid is not None and np.ndim(grid.scale) == 0:
            raise ConfigError(
                f'batch_norm="keep" gives each channel of {node.name!r} a scale of its own, and the config wants one '
                'per tensor: use batch_norm="fold", or a per-channel config.'
            )
    return {node.name: _maker(node, training.batch_norm) for node in nodes}


def _normalized(graph: Graph) -> list[Node]:
    """The operations that have one; one that the user froze stays folded, at its running statistics."""
    found = [n for n in graph if op_of(n).matrix and {"mean", "std"} <= n.stats.keys()]
    return [n for n in found if not n.user or "gamma" in n.user]


def _maker(node: Node, batch_norm: str) -> Callable[..., QuantizedLayer]:
    gamma = node.user.get("gamma")
    facts: dict[str, Any] = {} if gamma is None else {"gamma_trains": gamma.trainable, "running": gamma.momentum}

    def make(*args: Any, **kwargs: Any) -> QuantizedLayer:
        layer = BatchNormLayer(*args, batch_norm=batch_norm, **facts, **kwargs)
        layer.start(node.stats["mean"], node.stats["std"])
        return layer

    return make


def reestimate_batch_norm(model: QuantizedModel, data: Any, progress: bool = True) -> None:
    """Replace the running statistics of all batch normalizations by averages over `data`.

    A running average lags behind weights that train, and more so behind quantized ones (section 4.2).

    Args:
        model: from `prepare_qat` with a batch_norm other than "fold"; changed in place.
        data: batches of inputs, or of (inputs, labels).
        progress: show a progress bar.

    Raises:
        ModelError: the model has no batch normalization.
    """
    layers = [layer for layer in model.layers if isinstance(layer, BatchNormLayer)]
    if not layers:
        raise ModelError(f"{model.name!r} has no batch normalization: it was folded before training.")
    forward = tf.function(lambda x: model(x, training=True), autograph=False, reduce_retracing=True)
    try:
        for seen, batch in enumerate(tqdm(data, desc="batch norm", unit="batch", disable=not progress, leave=False)):
            for layer in layers:
                layer.momentum.assign(seen / (seen + 1.0))
            forward(batch[0] if isinstance(batch, tuple) else batch)
    finally:
        for layer in layers:
            layer.momentum.assign(layer.running)
