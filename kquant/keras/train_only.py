"""`TrainOnly`: a layer of the user's that acts in training only, such as Dropout, inside a quantized model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from kquant.graph.ir import Node
from kquant.graph.transforms.training import act, acts

Tensor = Any


@keras.saving.register_keras_serializable("kquant")
class TrainOnly(keras.layers.Layer):
    """What a "train_only" node does in training; otherwise the identity, but for an activity regularizer's penalty.

    The user's layer works on x * scale + offset, which is the tensor of the user's model that x was before folding.

    Args:
        layer: a copy of the user's layer.
        user_shape: of the tensor in the user's model, which may be reshaped here.
        scale, offset: per channel (entry of the last axis), or one number each.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        user_shape: Sequence[int | None],
        scale: float | Sequence[float] | None = None,
        offset: float | Sequence[float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**{"dtype": "float32", **kwargs})
        self.layer, self.frame = layer, {"user_shape": tuple(user_shape), "scale": scale, "offset": offset}
        if not layer.built:
            layer.build(tuple(user_shape))
        self.built = True

    @classmethod
    def of(cls, node: Node, name: str) -> TrainOnly:
        """That of a "train_only" node."""
        copy = node.call.clone(name=f"{name}.layer").operation
        facts = {k: node.attrs[k] for k in ("user_shape", "scale", "offset")}
        return cls(copy, **facts, name=name)

    @property
    def penalizes(self) -> bool:
        """Whether it has a penalty, at inference too."""
        return self.layer.activity_regularizer is not None

    def call(self, x: Tensor, training: bool | None = False) -> Tensor:
        if not (training or self.penalizes):
            return x
        acting = acts(self.layer)
        y = act(self.layer, self.frame, x, **({"training": bool(training)} if acting else {}))
        return y if training and acting else x

    def compute_output_spec(self, x: Any, training: bool | None = False) -> Any:
        return keras.KerasTensor(x.shape, dtype=x.dtype)

    def get_config(self) -> dict[str, Any]:
        layer = keras.saving.serialize_keras_object(self.layer)
        return {**super().get_config(), "layer": layer, **self.frame}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TrainOnly:
        return cls(**{**config, "layer": keras.saving.deserialize_keras_object(config["layer"])})
