"""`FakeQuant`: a grid as variables, fixed or learned.

Training moves a grid by relative amounts, which start at zero: scale = base * exp(rate * log_scale). So a step of an
optimizer that normalizes gradients (Adam) changes every scale by the same factor, however large it is, a scale stays
positive whatever the step, and weight decay pulls towards the grid that training began with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kquant.graph.ops.activations import clip_tensor
from kquant.grids.gradients import (
    exact,
    fake_quant,
    grid_of_range,
    nearest,
    power_of_two,
    relative_scale,
    round_ste,
    scaled_gradient,
)
from kquant.grids.grid import Grid, signed_width

Tensor = Any
# how far a scale may move: no step of an optimizer leads to one that is zero or infinite
_LARGEST = 8.0  # of the exponents of e
_OCTAVES = 32.0


def grid_settings(q: Grid | None, learning: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The settings of a `FakeQuant` that can hold `q`, with those by which it learns."""
    if q is None:
        return None
    channels = None if np.ndim(q.scale) == 0 else len(q.scale)
    settings: dict[str, Any] = {"qmin": q.qmin, "qmax": q.qmax, "channels": channels, "axis": q.axis}
    if q.table is not None:
        settings["table"] = list(q.table.shape)
    if q.block is not None:
        blocks = q.scale.shape[1] if q.scale.ndim == 2 else None
        settings |= {"block": q.block, "block_axis": q.block_axis, "blocks": blocks}
    return {**settings, **(learning or {})}


@keras.saving.register_keras_serializable("kquant")
class FakeQuant(keras.layers.Layer):
    """Quantize to a grid and back: scale * (clamp(round(x / scale) + z, qmin, qmax) - z).

    Eq. 4-7 of the white paper, round half to even, float32; gradients as `gradients.fake_quant` has them.

    Args:
        qmin, qmax: the smallest and largest integer of the grid, as stored on the target.
        channels: number of scales, None for one per tensor.
        axis: the axis of the channels.
        block, blocks, block_axis: how many entries of `block_axis` share a scale or a table, and how many times.
        table: shape of the table of allowed integers, None where all from qmin to qmax are; see `grids.grid.Grid`.
        gradient: how the grid learns, one of `specs.GRADIENTS`; "ste" keeps it as it is.
        rate: how fast, relative to the optimizer's learning rate.
        elements: number of values of a sample that one scale quantizes (N of LSQ).
        levels: the largest integer, less the zero point, of the grid that training begins with (Q_P of LSQ).
        switchable: it can be switched off, by the variable `on`, and then leaves values as they are.
    """

    def __init__(
        self,
        qmin: int,
        qmax: int,
        channels: int | None = None,
        axis: int | None = None,
        gradient: str = "ste",
        rate: float = 1.0,
        elements: int = 1,
        levels: int = 1,
        table: Sequence[int] | None = None,
        block: int | None = None,
        block_axis: int | None = None,
        blocks: int | None = None,
        switchable: bool = False,
        **kwargs: Any,
    ):
        super().__init__(dtype="float32", **kwargs)
        self.qmin, self.qmax, self.channels, self.axis = int(qmin), int(qmax), channels, axis
        self.gradient, self.rate, self.elements, self.levels = gradient, float(rate), int(elements), int(levels)
        self.block, self.block_axis, self.blocks = block, block_axis, blocks
        channel = () if channels is None else (channels,)
        shape = channel if blocks is None else (*channel, blocks)
        self.scale = self.add_weight(shape=shape, initializer="ones", trainable=False, name="scale")
        self.zero_point = self.add_weight(shape=channel, initializer="zeros", trainable=False, name="zero_point")
        self.table = (
            None
            if table is None
            else self.add_weight(shape=tuple(table), initializer="zeros", trainable=False, name="table")
        )
        self.learned = {
            name: self.add_weight(shape=shape, initializer="zeros", name=name) for name in LEARNED_VARIABLES[gradient]
        }
        self.on = None
        if switchable:
            self.on = self.add_weight(shape=(), dtype="bool", initializer="ones", trainable=False, name="on")
            self.supports_jit = False  # a conditional for every quantizer takes XLA minutes to compile
        self.built = True

    def assign(self, q: Grid) -> None:
        """Move to the grid `q` (same limits and granularity)."""
        self.scale.assign(q.scale)
        self.zero_point.assign(np.asarray(q.zero_point, np.float32))
        if self.table is not None and q.table is not None:
            self.table.assign(np.asarray(q.table, np.float32))
        for variable in self.learned.values():
            variable.assign(np.zeros(variable.shape, np.float32))

    def to_grid(self) -> Grid:
        """The grid as it stands now."""
        scale, zero_point = (np.asarray(v) for v in self.parameters())
        return Grid(
            scale=scale.astype(np.float32),
            zero_point=np.rint(zero_point).astype(np.int32),
            qmin=self.qmin,
            qmax=self.qmax,
            axis=self.axis,
            table=None if self.table is None else np.rint(np.asarray(self.table)).astype(np.int32),
            block=self.block,
            block_axis=self.block_axis,
        )

    @property
    def width(self) -> int:
        """Bits of a signed integer that holds every allowed one; see `Grid.width`."""
        return signed_width(self.qmin, self.qmax)

    def parameters(self, unit: Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they stand now, with gradients to the variables that are learned.

        What is learned is computed in float64 and rounded once: in float32 the exponentials of XLA, eager and graph
        execution differ, and with them what is trained from what is exported.
        """
        scale, zero_point = _PARAMETERS[self.gradient](self, unit)
        return tf.cast(scale, tf.float32), tf.cast(zero_point, tf.float32)

    @property
    def grid(self) -> Tensor:
        """[scale, zero_point] of a per-tensor quantizer."""
        return tf.stack(self.parameters())

    def integers(self, x: Tensor) -> Tensor:
        """Integer-valued float32 q - zero_point of real values `x`."""
        scale, zero_point = (self.spread(v, x.shape) for v in self.parameters())
        steps = tf.cast(x, tf.float32) / scale
        if self.table is not None:
            return exact(steps, nearest(steps, self._levels(x.shape)))
        return tf.clip_by_value(round_ste(steps), self.qmin - zero_point, self.qmax - zero_point)

    def real(self, centered: Tensor) -> Tensor:
        """The real values of integers q - zero_point."""
        return centered * self.spread(self.parameters()[0], centered.shape)

    def clamp(self, centered: Tensor) -> Tensor:
        """Clamp integers q - zero_point to the grid."""
        z = self.spread(self.parameters()[1], centered.shape)
        return tf.clip_by_value(centered, self.qmin - z, self.qmax - z)

    def call(self, x: Tensor) -> Tensor:
        return self.fake_quantize(x)[0]

    def fake_quantize(
        self, x: Tensor, clip: tuple[Any, Any] = (None, None), unit: Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """`x` on the grid, and the grid; while it is off `x`, clipped, and a grid of scale 0.

        Args:
            x: the values.
            clip: a fused activation, see `gradients.fake_quant`.
            unit: that of the variable behind `x`, in the shape of the scale; the grid learns as the one of x / unit.
        """
        x = tf.cast(x, tf.float32)

        def off() -> tuple[Tensor, Tensor]:
            shape = tuple(self.scale.shape)
            return clip_tensor(tf.identity(x), *clip), tf.zeros((2, *shape) if self.blocks is None else shape)

        return self.if_on(lambda: self._quantized(x, clip, unit), off)

    def if_on(self, quantized: Callable[[], Any], off: Callable[[], Any]) -> Any:
        """What one of two functions returns: a change of state costs no new trace, and what is off no operation."""
        return quantized() if self.on is None else tf.cond(tf.convert_to_tensor(self.on), quantized, off)

    def _quantized(self, x: Tensor, clip: tuple[Any, Any], unit: Tensor) -> tuple[Tensor, Tensor]:
        parameters = self.parameters(unit)  # once: what is learned takes many small operations
        scale, zero_point = (self.spread(v, x.shape) for v in parameters)
        fixed = self.gradient not in MOVES_ZERO_POINT
        levels = self._levels(x.shape) if self.table is not None else ()
        y = fake_quant(x, scale, zero_point, self.qmin, self.qmax, clip, fixed, levels)
        return y, tf.stack(parameters) if self.blocks is None else parameters[0]

    def spread(self, v: Tensor, shape: Any) -> Tensor:
        """() or (channels,) or (channels, blocks), shaped to broadcast against a tensor; see `Grid.spread`."""
        rank = len(shape)
        if v.shape.rank == 0 or (v.shape.rank == 1 and self.axis == rank - 1):
            return v  # broadcasts as it is
        at = [-1 if k == self.axis else 1 for k in range(rank)]
        if v.shape.rank == 2:
            assert self.axis is not None and self.block_axis is not None, "checked by the grid"
            v = tf.repeat(v, self.block, axis=1)[:, : shape[self.block_axis]]
            v = v if self.axis < self.block_axis else tf.transpose(v)
            at = [shape[k] if k in (self.axis, self.block_axis) else 1 for k in range(rank)]
        return tf.reshape(v, at)

    def _levels(self, shape: Any) -> list[Tensor]:
        """The allowed integers less the zero point; see `Grid.levels`."""
        zero = self.spread(tf.convert_to_tensor(self.zero_point), shape)
        return [self.spread(v, shape) - zero for v in tf.unstack(tf.convert_to_tensor(self.table), axis=-1)]

    def tie(self, other: FakeQuant) -> None:
        """Have the variables of `other` from now on: one grid for two tensors.

        Raises:
            ValueError: the grids differ in limits or granularity, or learn differently.
        """
        if self.settings != other.settings:
            raise ValueError(f"{self.name!r} and {other.name!r} cannot share a grid: {self.settings}, {other.settings}")
        for variable in (self.scale, self.zero_point, *self.learned.values()):
            self._untrack_variable(variable)
        self.scale, self.zero_point, self.learned = other.scale, other.zero_point, other.learned

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make a quantizer with the same limits, granularity and learning."""
        fixed: dict[str, Any] = {"qmin": self.qmin, "qmax": self.qmax, "channels": self.channels, "axis": self.axis}
        if self.table is not None:
            fixed["table"] = list(self.table.shape)
        if self.block is not None:
            fixed |= {"block": self.block, "block_axis": self.block_axis, "blocks": self.blocks}
        learns = {"gradient": self.gradient, "rate": self.rate, "elements": self.elements, "levels": self.levels}
        return fixed if self.gradient == "ste" else {**fixed, **learns}

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        switchable = {} if self.on is None else {"switchable": True}
        return {"name": config["name"], "trainable": config["trainable"], **self.settings, **switchable}


def _fixed(q: FakeQuant, unit: Tensor) -> tuple[Tensor, Tensor]:
    return tf.convert_to_tensor(q.scale), tf.convert_to_tensor(q.zero_point)


def _wide(variable: Any) -> Tensor:
    return tf.cast(tf.convert_to_tensor(variable), tf.float64)


def _base(q: FakeQuant) -> tuple[Tensor, Tensor]:
    """The grid that training began with, in float64."""
    return _wide(q.scale), _wide(q.zero_point)


def _lsq(q: FakeQuant, unit: Tensor) -> tuple[Tensor, Tensor]:
    """LSQ: the gradient of the scale times `_gradient_scale`.

    The balance is one between steps of weights and of scales: it holds where both are in one unit, and
    d/dlog_scale = g / scale is the only gradient here that depends on it.
    """
    g = _gradient_scale(q.elements, q.levels) * unit * unit
    return relative_scale(q.scale, q.learned["log_scale"], q.rate, g, _LARGEST), tf.convert_to_tensor(q.zero_point)


def _lsq_plus(q: FakeQuant, unit: Tensor) -> tuple[Tensor, Tensor]:
    """LSQ+: `shift` moves the zero point too, as a share of the grid's extent."""
    scale, _ = _lsq(q, unit)
    extent = q.qmax - q.qmin
    zero_point = round_ste(_wide(q.zero_point) + extent * q.rate * _wide(q.learned["shift"]))
    factor = _gradient_scale(q.elements, extent) / (extent**2 * q.rate * tf.stop_gradient(_wide(scale)) ** 2)
    zero_point = scaled_gradient(zero_point, factor)
    return scale, tf.clip_by_value(zero_point, float(q.qmin), float(q.qmax))


def _gradient_scale(elements: int, levels: int) -> float:
    """g = min(1, 4 / Q_P) / sqrt(N Q_P).

    The paper's g is that without the minimum: it balances grids that start at 2 mean |w| / sqrt(Q_P). Those here start
    at the range of the values, where 8 bits and more would run away.
    """
    return min(1.0, 4.0 / levels) / math.sqrt(elements * levels)


def _min_max(q: FakeQuant, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Both edges of the range learn, each by a factor: an edge at zero stays there."""
    scale, zero_point = _base(q)
    low = scale * (q.qmin - zero_point) * _exp(q, "log_low")
    high = scale * (q.qmax - zero_point) * _exp(q, "log_high")
    return grid_of_range(low, high, q.qmin, q.qmax)


def _symmetric(q: FakeQuant, unit: Tensor) -> tuple[Tensor, Tensor]:
    """One edge for both sides: the same as a scale, with its gradient unscaled."""
    scale, zero_point = _base(q)
    return scale * _exp(q, "log_scale"), zero_point


def _tqt(q: FakeQuant, unit: Tensor) -> tuple[Tensor, Tensor]:
    """TQT: the scale is the power of two at or above a learned threshold."""
    base, zero_point = _base(q)
    # half a step below the power of two: the grid leaves it for a smaller one as easily as for a larger one
    exponent = tf.math.log(base) / math.log(2.0) - 0.5
    moved = _limited(q.rate * _wide(q.learned["log2_scale"]), _OCTAVES)
    return power_of_two(exponent + moved), zero_point


def _exp(q: FakeQuant, name: str) -> Tensor:
    return tf.exp(_limited(q.rate * _wide(q.learned[name]), _LARGEST))


def _limited(x: Tensor, largest: float) -> Tensor:
    """x within +-largest, with the gradient of x, which leads back from beyond."""
    return exact(x, tf.clip_by_value(x, -largest, largest))


_PARAMETERS: Mapping[str, Callable[[FakeQuant, Tensor], tuple[Tensor, Tensor]]] = MappingProxyType(
    {"ste": _fixed, "lsq": _lsq, "lsq+": _lsq_plus, "min_max": _min_max, "symmetric": _symmetric, "tqt": _tqt}
)
MOVES_ZERO_POINT = ("lsq+", "min_max")
LEARNED_VARIABLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ste": (),
        "lsq": ("log_scale",),
        "lsq+": ("log_scale", "shift"),
        "min_max": ("log_low", "log_high"),
        "symmetric": ("log_scale",),
        "tqt": ("log2_scale",),
    }
)
