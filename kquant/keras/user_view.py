"""`UserView`: a variable of a quantized layer as the user's layer has it, for its penalty and its constraint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kquant.graph.training import UserWeight

Tensor = Any


def settings_of(weight: UserWeight, keep_zeros: bool) -> dict[str, Any]:
    """A `UserWeight` as JSON, with names for its arrays, which become variables.

    Args:
        weight: of a node.
        keep_zeros: what is zero in the user's layer stays zero, and what a callback makes zero.
    """
    asked = {"regularizer": weight.regularizer, "constraint": weight.constraint} if weight.asked else {}
    arrays = {"factor": weight.factor, "offset": weight.offset} if weight.asked else {}
    return {
        "trainable": weight.trainable,
        "shape": list(weight.shape),
        "order": None if weight.order is None else list(weight.order),
        **{k: keras.saving.serialize_keras_object(v) for k, v in asked.items() if v is not None},
        "arrays": [k for k, v in arrays.items() if v is not None],
        "mask": keep_zeros or weight.gaps is not None,
    }


class UserView:
    """A variable of a layer as the user's layer has it.

    It asks of the variable what the user's layer asks of its own: the variable's penalty and constraint are those of
    ((variable * unit - offset) / factor) in the shape of the user's.

    Args:
        layer: has the variable, and gets variables for factor, offset and mask.
        name: of the variable in the layer.
        variable: in the shape of the node's weight.
        settings: from `settings_of`.
        unit: of the variable; None for 1.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        name: str,
        variable: keras.Variable,
        settings: Mapping[str, Any],
        unit: Callable[[], Any],
    ):
        self.settings, self._unit = settings, unit
        made = {k: (variable.shape, "ones" if k == "factor" else "zeros") for k in settings["arrays"]}
        if settings["mask"]:
            made["mask"] = (variable.shape, "ones")
        self.arrays = {
            k: layer.add_weight(shape=shape, initializer=start, trainable=False, name=f"{name}_{k}")
            for k, (shape, start) in made.items()
        }
        if "regularizer" in settings:
            regularizer = keras.regularizers.get(settings["regularizer"])
            variable.regularizer = lambda v: regularizer(self.as_user(v))
        if "constraint" in settings:
            constraint = keras.constraints.get(settings["constraint"])
            variable.constraint = lambda v: self.from_user(constraint(self.as_user(v)), v)

    def assign(self, weight: UserWeight, keep_zeros: bool) -> None:
        """Take the arrays of a `UserWeight`."""
        for name, variable in self.arrays.items():
            if name == "mask":
                zeros = weight.zeros if keep_zeros else weight.gaps
                variable.assign(np.ones(variable.shape) if zeros is None else 1.0 - np.asarray(zeros, np.float32))
            else:
                variable.assign(getattr(weight, name))

    def masked(self, weight: Tensor) -> Tensor:
        """The weight with the zeros that stay."""
        return weight * self.arrays["mask"] if "mask" in self.arrays else weight

    def as_user(self, variable: Any) -> Tensor:
        """The variable as the user's layer has it."""
        w = tf.convert_to_tensor(variable) * self._unit()
        w = w - self.arrays["offset"] if "offset" in self.arrays else w
        if "factor" in self.arrays:
            w = tf.math.divide_no_nan(w, self.arrays["factor"])
        shape, order = self.settings["shape"], self.settings["order"]
        if order is None:
            return tf.reshape(w, shape)
        return tf.transpose(tf.reshape(w, [shape[k] for k in order]), np.argsort(order))

    def from_user(self, user: Tensor, variable: Any) -> Tensor:
        """The inverse: what the variable is to be; it stays where its factor is zero."""
        order, before = self.settings["order"], tf.convert_to_tensor(variable)
        w = tf.reshape(user if order is None else tf.transpose(user, order), before.shape)
        factor = self.arrays.get("factor")
        w = w if factor is None else w * factor
        w = (w + self.arrays["offset"] if "offset" in self.arrays else w) / self._unit()
        return w if factor is None else tf.where(tf.equal(factor, 0.0), before, w)


def views_of(
    layer: keras.layers.Layer,
    variables: Mapping[str, keras.Variable],
    settings: Mapping[str, Mapping[str, Any]],
    units: Mapping[str, Callable[[], Any]],
) -> dict[str, UserView]:
    """The views of those variables of a layer of which the user's layer asks something."""
    asked = {k: s for k, s in settings.items() if s["mask"] or {"regularizer", "constraint"} & s.keys()}
    return {
        k: UserView(layer, k, variables[k], s, units.get(k, lambda: 1.0)) for k, s in asked.items() if k in variables
    }
