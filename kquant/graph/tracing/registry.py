"""The hook by which a user teaches kquant a layer of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

LayerLowering = Callable[..., Any]
_REGISTERED: dict[type, LayerLowering] = {}


def register_layer(layer_class: type, lower: LayerLowering | None = None) -> Any:
    """Tell kquant how a custom layer is written with layers and operations that it knows.

    Most custom layers need no registration: their `call` is traced. Register one whose `call`
    cannot be traced (it looks at values, say), or that has a better integer form.

    >>> class Scale(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.factor = self.add_weight(shape=(shape[-1],), name="factor")
    ...     def call(self, x):
    ...         return tf.numpy_function(np.multiply, [x, self.factor], tf.float32)
    >>> @kquant.register_layer(Scale)
    ... def lower_scale(layer, x):
    ...     return x * layer.factor

    Args:
        layer_class: the class; subclasses are included unless they are registered themselves.
        lower: `lower(layer, *tensors)` receives the layer and the KerasTensors it is called on and
            returns a KerasTensor (or a structure of them) computed with Keras layers and `keras.ops`.
            Left out, a decorator is returned.

    Returns:
        `lower`, or the decorator.

    Raises:
        TypeError: `layer_class` is not a Keras layer class.
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer)):
        raise TypeError(f"register_layer takes a subclass of keras.layers.Layer, not {layer_class!r}")

    def enter(fn: LayerLowering) -> LayerLowering:
        _REGISTERED[layer_class] = fn
        return fn

    return enter if lower is None else enter(lower)


def registered_lowering(layer: Any) -> LayerLowering | None:
    """What was registered for the layer's class or its nearest base class."""
    return next((_REGISTERED[cls] for cls in type(layer).__mro__ if cls in _REGISTERED), None)
