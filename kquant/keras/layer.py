"""The layers of a quantized model; with `fake_quant.FakeQuant` the only classes that own variables.

`QuantizedLayer` wraps one operation of the network with the quantizers of its weights and of its output.
At inference it computes on integer-valued float32 tensors, which is exact below 2^24: convolutions
accumulate the very integers that the target accumulates. In training it computes the real-valued
function of quantized weights and inputs, and quantizes its output: the same up to a rounding, at the
price of the float operation and little more. A layer with switches computes that function at inference, too.

A quantized tensor travels through the model as a pair: its values, scale * (q - zero_point), and its
grid, the vector [scale, zero_point]. So a layer can recover the integers of its input exactly, and
gradients reach the scale from both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.ops import clip_of, clip_tensor, compute, op_of, weight_of, weight_view, with_insertion, without_clip
from kquant.grids.gradients import round_ste
from kquant.grids.grid import Grid
from kquant.keras.fake_quant import FakeQuant
from kquant.keras.record import node_from_dict, node_to_dict
from kquant.keras.train_only import TrainOnly
from kquant.keras.unit import weight_unit
from kquant.keras.user_view import UserView, views_of
from kquant.targets.operand import Call, Operand
from kquant.targets.target import get_target

Tensor = Any


@keras.saving.register_keras_serializable("kquant")
class QuantizedLayer(keras.layers.Layer):
    """One operation of the network, with the quantizers of its weights and of its output.

    Call it on the list of its input values and the list of their grids, `layer(values, grids)`;
    `grids` is empty where it reads float tensors. It returns `(values, grid)`, or the values alone
    where its output stays float. An integer operation computes

        q = clamp(arithmetic(q_x - z_x, round(W / s_w), ...) + z_y)

    with the arithmetic of the target's kernel, the fused activation being part of the clamp.

    Args:
        node: the operation; its weights give initial values, or only shapes in a serialized config.
        weight_grid, output_grid: settings of a `FakeQuant`, or None where there is no quantizer.
        shares_grid: the output is on the grid of the input (pooling, reshaping, concatenation ...).
        activation_bits: bits of the integer type of its input and output, 8 or 16.
        constants: inputs that are constants, by name (values, or shapes in a serialized config).
        constant_grids: their quantizers' settings, by the same names.
        relative_weight: the variable of the weight of a linear operation holds it in units of its size (`weight_unit`).
        rounds_in_training: False for probabilities that a loss takes the logarithm of, which must not become 0.
        training_dtype: in what the operation itself computes in training, "float32" or "bfloat16" (of mixed
            precision); a dtype policy of the layer would round the variables too.
        integers: type of the quantized weight's integers where they are decided, "int8" or "int16": the layer computes
            with these. None where they follow from the weight and its grid at every call.
        frozen: all is decided: nothing of the layer trains.
        target: name of the target whose kernel computes it.
        switchable: its quantizers can be switched off (see `FakeQuant`); it computes in real numbers.
        limits: the smallest and largest integer of the grid that it shares, where it puts a value of its own on it.
        user: weight or constant -> what the user's layer asks of it in training (`user_view.settings_of`).
        between: layers that act in training between the operation and its fused activation.
    """

    def __init__(
        self,
        node: Node | Mapping[str, Any],
        weight_grid: Mapping[str, Any] | None = None,
        output_grid: Mapping[str, Any] | None = None,
        shares_grid: bool = False,
        activation_bits: int = 8,
        constants: Mapping[str, Any] | None = None,
        constant_grids: Mapping[str, Any] | None = None,
        relative_weight: bool = False,
        rounds_in_training: bool = True,
        training_dtype: str = "float32",
        integers: str | None = None,
        frozen: bool = False,
        target: str = "litert",
        switchable: bool = False,
        limits: Sequence[int] | None = None,
        user: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        between: Sequence[TrainOnly] = (),
        **kwargs: Any,
    ):
        super().__init__(**{"dtype": "float32", **kwargs}, autocast=False)
        self.node = node if isinstance(node, Node) else node_from_dict(node)
        quantizer = partial(FakeQuant, switchable=switchable)
        self.weight_quantizer = quantizer(**weight_grid, name="weight_quantizer") if weight_grid else None
        self.output_quantizer = quantizer(**output_grid, name="output_quantizer") if output_grid else None
        self.shares_grid, self.activation_bits = shares_grid, activation_bits
        self.rounds_in_training, self.training_dtype = rounds_in_training, training_dtype
        self.frozen, self.switchable, self.limits = frozen, switchable, limits
        self.target, self.between = get_target(target), list(between)
        self._user_settings = dict(user)
        self.variables_by_name = {k: self._own(k, v) for k, v in self.node.weights.items()}
        key = weight_of(self.node).name if relative_weight else ""
        self.unit = self._own_unit(key, self.node.weights[key]) if relative_weight else None
        self.constants = {k: self._own(f"constant_{i}", v) for i, (k, v) in enumerate((constants or {}).items())}
        self.constant_quantizers = {
            k: quantizer(**v, name=f"constant_quantizer_{i}") for i, (k, v) in enumerate((constant_grids or {}).items())
        }
        self.user_views = self._views()
        self.integers = self._own_integers(integers) if integers is not None else None
        self.node = self.node.with_(weights={k: tuple(v.shape) for k, v in self.variables_by_name.items()}, stats={})
        self.built = True

    def _own(self, name: str, value: Any) -> keras.Variable:
        """A variable of the shape of `value`, an array or a shape."""
        known = isinstance(value, np.ndarray)
        shape = value.shape if known else tuple(value)
        trainable = not self.frozen and self._user_settings.get(name, {}).get("trainable", True)
        variable = self.add_weight(shape=shape, initializer="zeros", trainable=trainable, name=name)
        if known:
            variable.assign(value)
        return variable

    def _own_integers(self, dtype: str) -> keras.Variable:
        """The integers of the quantized weight, in its own shape."""
        shape = self.variables_by_name[self._quantized_key()].shape
        return self.add_weight(shape=shape, dtype=dtype, initializer="zeros", trainable=False, name="integers")

    def _quantized_key(self) -> str:
        """The name of the weight that carries a grid; empty where none does."""
        weight = op_of(self.node).weight
        return "" if weight is None else weight.name

    def _own_unit(self, key: str, weight: Any) -> keras.Variable:
        """The unit of a weight (an array or a shape), whose variable holds it in that unit from now on."""
        known = isinstance(weight, np.ndarray)
        value = weight_unit(self.node.op, weight if known else np.ones(tuple(weight), np.float32))
        unit = self.add_weight(shape=value.shape, initializer="ones", trainable=False, name="unit")
        if known:
            unit.assign(value)
            self.variables_by_name[key].assign(weight / value)
        return unit

    def _views(self) -> dict[str, UserView]:
        named = self.variables_by_name | {f"constant_{i}": v for i, v in enumerate(self.constants.values())}
        units = {} if self.unit is None else {self._quantized_key(): partial(getattr, self, "unit")}
        return views_of(self, named, self._user_settings, units)

    def tie_weights(self, other: QuantizedLayer) -> None:
        """Have the weights of `other` and their grid from now on: a layer of the user's that is called twice."""
        for name, variable in self.variables_by_name.items():
            self._untrack_variable(variable)
            setattr(self, f"tied_{name}", other.variables_by_name[name])
        self.variables_by_name = dict(other.variables_by_name)
        for view in self.user_views.values():
            for variable in view.arrays.values():
                self._untrack_variable(variable)
        self.user_views = other.user_views
        if self.unit is not None:
            self._untrack_variable(self.unit)
            self.unit = other.unit
        if self.weight_quantizer is not None and other.weight_quantizer is not None:
            self.weight_quantizer.tie(other.weight_quantizer)

    @property
    def quantizers(self) -> dict[str, FakeQuant]:
        """The quantizers of the output and of the constants, by the names of the tensors."""
        output = {} if self.output_quantizer is None else {self.node.name: self.output_quantizer}
        return output | self.constant_quantizers

    @property
    def runs_in_integers(self) -> bool:
        """Whether the output is an integer tensor."""
        return self.output_quantizer is not None or self.shares_grid

    def call(self, values: Sequence[Tensor], grids: Sequence[Tensor] = (), training: bool | None = False) -> Any:
        node, values, grids = self.node, list(values), list(grids)
        if not self.runs_in_integers:
            return self._in_float(self._with_constants(values), training)
        if training or self.switchable:
            return self._in_real_numbers(values, grids)
        if any(layer.penalizes for layer in self.between):
            self._between(self._compute(self._with_constants(values), self._real_weights()), training=False)
        if self.output_quantizer is None:
            return self._shared_grid(values, grids)
        if op_of(node).lookup:
            return compute(node, values, self._real_weights()), self.output_quantizer.grid
        if not grids and node.op in ("input", "requantize"):
            return self.output_quantizer.fake_quantize(values[0])
        out = self._operand(None, grid := self.output_quantizer.grid)
        centered = self._integers(values, grids, out)
        lo, hi = clip_of(node)
        if lo is not None:
            centered = tf.maximum(centered, self.target.kernel(node).lower_bound(lo, tf.round(lo / out.scale)))
        if hi is not None:
            centered = tf.minimum(centered, tf.round(tf.constant(hi, tf.float32) / out.scale))
        return self.output_quantizer.clamp(centered) * out.scale, grid

    def _in_float(self, inputs: list[Tensor], training: bool | None) -> Tensor:
        """An operation that stays float."""
        if not self.between:
            return compute(self.node, inputs, self._real_weights())
        y = self._between(compute(without_clip(self.node), inputs, self._real_weights()), bool(training))
        return clip_tensor(y, *clip_of(self.node))

    def _in_real_numbers(self, values: list[Tensor], grids: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The real-valued function of what is quantized already, quantized."""
        node = self.node
        if self.output_quantizer is None:
            return self._moved(values, grids), grids[0]
        if node.op in ("input", "requantize"):
            return self.output_quantizer.fake_quantize(values[0])
        y = self._between(self._forward(self._with_constants(values)), training=not self.switchable)
        if not self.rounds_in_training:
            return y, self.output_quantizer.grid
        return self.output_quantizer.fake_quantize(y, node.attrs.get("clip", (None, None)))

    def _moved(self, values: list[Tensor], grids: list[Tensor]) -> Tensor:
        """An operation on the grid of its input, in real numbers."""
        op, scale = op_of(self.node), grids[0][0]

        def real() -> Tensor:
            node = self.node if self.switchable else with_insertion(self.node, grids[0], self.limits)
            return compute(node, self._with_constants(values))

        if self.switchable and (op.averages or op.inserts):
            # many of its values lie halfway between two steps, where the kernels' rule for ties shifts the mean
            return tf.cond(scale > 0, lambda: self._shared_grid(values, grids)[0], real)
        return round_ste(real() / scale) * scale if op.averages else real()

    def _between(self, y: Tensor, training: bool) -> Tensor:
        """What acts between the operation and its fused activation."""
        for layer in self.between:
            y = layer(y, training=training)
        return y

    def _forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output in real numbers, before its quantizer."""
        weights = self.float_weights()
        if self.weight_quantizer is not None:
            key = weight_of(self.node).name
            weights[key] = self.fake_quantized(weights[key])
        return self._compute(inputs, weights)

    def fake_quantized(self, weight: Tensor) -> Tensor:
        """A weight on the grid of the weight quantizer, if there is one; as it was decided, if it was."""
        if self.weight_quantizer is None:
            return weight
        if self.integers is not None:
            return self._real_weights()[self._quantized_key()]
        unit: Tensor = 1.0
        if self.unit is not None:
            units = tf.convert_to_tensor(self.unit)
            one = self.weight_quantizer.channels is None
            unit = tf.sqrt(tf.reduce_mean(tf.square(units))) if one else tf.reshape(units, [-1])
        y, _ = self.weight_quantizer.fake_quantize(weight_view(self.node, weight), unit=unit)
        return y if y.shape == weight.shape else tf.reshape(y, weight.shape)

    def _compute(self, inputs: Sequence[Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        """The operation without its fused activation, in the type of mixed precision, the result in float32."""

        def cast(t: Tensor) -> Tensor:
            return tf.cast(t, self.training_dtype) if t.dtype.is_floating else t

        y = compute(without_clip(self.node), [cast(t) for t in inputs], {k: cast(w) for k, w in weights.items()})
        return tf.cast(y, tf.float32)

    def _integers(self, values: list[Tensor], grids: list[Tensor], out: Operand) -> Tensor:
        """What the target's kernel computes on the grid `out`, before the clamp."""
        weight = None
        if self.weight_quantizer is not None:
            bits = self.target.weight_container(self.node, self.weight_quantizer.width, out.bits)
            weight = Operand(self._quantized_weight()[0], self.weight_scale(), 0.0, bits)
        call = Call(
            node=without_clip(with_insertion(self.node, (out.scale, out.zero_point), self.limits)),
            inputs=self._operands(values, grids),
            out=out,
            weight=weight,
            weights=self.float_weights(),
        )
        return self.target.kernel(self.node).arithmetic[self.activation_bits](call)

    @property
    def grid_of_weight(self) -> FakeQuant | None:
        """The quantizer of the weight; a table that is read in integers has the grid of the output."""
        table = op_of(self.node).lookup and self.weight_quantizer is None
        return self.output_quantizer if table else self.weight_quantizer

    def _quantized_weight(self) -> tuple[Tensor, Tensor]:
        """The integers of the weight, less the zero point, and their real values, in the weight's own shape."""
        if self.grid_of_weight is None:
            raise AssertionError(f"{self.node.name!r} has no weight quantizer")
        shape = self.variables_by_name[self._quantized_key()].shape
        if self.integers is not None:
            view = weight_view(self.node, tf.cast(tf.convert_to_tensor(self.integers), tf.float32))
            integers = view - self.grid_of_weight.spread(self.grid_of_weight.parameters()[1], view.shape)
        else:
            view = weight_view(self.node, self.float_weights()[self._quantized_key()])
            integers = self.grid_of_weight.integers(view)
        real = self.grid_of_weight.real(integers)
        return tf.reshape(integers, shape), tf.reshape(real, shape)

    def float_weights(self) -> dict[str, Tensor]:
        """The weights of the operation as it is deployed, before quantization."""
        return self.trained_weights()

    def trained_weights(self) -> dict[str, Tensor]:
        """The weights as they are trained."""
        weights = {k: tf.convert_to_tensor(v) for k, v in self.variables_by_name.items()}
        if self.unit is not None:
            weights[self._quantized_key()] *= self.unit
        return {k: self.user_views[k].masked(w) if k in self.user_views else w for k, w in weights.items()}

    def weight_scale(self) -> Tensor:
        """The scale of the quantized weight as it is deployed."""
        if self.weight_quantizer is None:
            raise AssertionError(f"{self.node.name!r} has no weight quantizer")
        return self.weight_quantizer.parameters()[0]

    def deployed(self) -> tuple[dict[str, np.ndarray], Grid | None, np.ndarray | None]:
        """The weights as they are deployed; of the quantized one its grid, and its integers if decided."""
        weights = {k: np.asarray(v.numpy(), np.float32) for k, v in self.float_weights().items()}
        if self.grid_of_weight is None or not self._quantized_key():
            return weights, None, None
        grid = self.grid_of_weight.to_grid()
        return weights, grid, None if self.integers is None else weight_view(self.node, np.asarray(self.integers))

    def _real_weights(self) -> dict[str, Tensor]:
        """The weights as real numbers, on their grid where they have one."""
        weights, key = self.float_weights(), self._quantized_key()
        if self.grid_of_weight is None or not key:
            return weights
        return {**weights, key: self.grid_of_weight.if_on(lambda: self._quantized_weight()[1], lambda: weights[key])}

    def _with_constants(self, values: list[Tensor]) -> list[Tensor]:
        """All inputs in order, constants in their places, on their grid where they have one."""
        rest = iter(values)
        return [self._constant(i) if i in self.constants else next(rest) for i in self.node.inputs]

    def _constant(self, name: str) -> Tensor:
        value = tf.convert_to_tensor(self.constants[name])
        return self.constant_quantizers[name](value) if name in self.constant_quantizers else value

    def _operands(self, values: list[Tensor], grids: list[Tensor]) -> list[Operand]:
        rest, on_grids, operands = iter(values), iter(grids), list[Operand]()
        for name in self.node.inputs:
            if name in self.constants:
                quantizer = self.constant_quantizers[name]
                centered = quantizer.integers(tf.convert_to_tensor(self.constants[name]))
                operands.append(self._operand(centered, quantizer.grid))
            elif not (value := tf.convert_to_tensor(next(rest))).dtype.is_floating:  # ids, truth values
                operands.append(Operand(value, tf.constant(1.0), tf.constant(0.0), self.activation_bits))
            else:
                scale, zero_point = tf.unstack(next(on_grids), 2)
                operands.append(Operand(round_ste(value / scale), scale, zero_point, self.activation_bits))
        return operands

    def _operand(self, centered: Tensor | None, grid: Tensor) -> Operand:
        scale, zero_point = tf.unstack(grid, 2)
        return Operand(centered, scale, zero_point, self.activation_bits)

    def _shared_grid(self, values: list[Tensor], grids: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Operations that move or select values, on the grid of their input."""
        return self._integers(values, grids, out := self._operand(None, grids[0])) * out.scale, grids[0]

    def compute_output_spec(self, values: Any, grids: Any = (), training: bool | None = False) -> Any:
        output = keras.KerasTensor(self.node.shape, dtype=self.node.dtype)
        return (output, keras.KerasTensor((2,), dtype="float32")) if self.runs_in_integers else output

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.pop("dtype", None)
        quantizers = {"weight_grid": self.weight_quantizer, "output_grid": self.output_quantizer}
        return {
            **config,
            "node": node_to_dict(self.node),
            "shares_grid": self.shares_grid,
            "activation_bits": self.activation_bits,
            "relative_weight": self.unit is not None,
            "rounds_in_training": self.rounds_in_training,
            "training_dtype": self.training_dtype,
            "frozen": self.frozen,
            "integers": None if self.integers is None else self.integers.dtype,
            "target": self.target.name,
            "switchable": self.switchable,
            "limits": None if self.limits is None else list(self.limits),
            "user": {k: dict(v) for k, v in self._user_settings.items()},
            "between": [keras.saving.serialize_keras_object(layer) for layer in self.between],
            **{k: q and q.settings for k, q in quantizers.items()},
            "constants": {k: list(v.shape) for k, v in self.constants.items()},
            "constant_grids": {k: q.settings for k, q in self.constant_quantizers.items()},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizedLayer:
        between = [keras.saving.deserialize_keras_object(layer) for layer in config.get("between", ())]
        return cls(**{**config, "between": between})
