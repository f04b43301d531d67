"""Layers that act in training only, in a way that can be told exactly."""

from __future__ import annotations

import keras


@keras.saving.register_keras_serializable("kquant_tests")
class Shifted(keras.layers.Layer):
    """factor * x + shift in training, x otherwise: neither commutes with a ReLU or a batch normalization."""

    def __init__(self, factor: float = -1.5, shift: float = 0.25, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.factor, self.shift = factor, shift

    def call(self, x: object, training: bool | None = None) -> object:
        return self.factor * x + self.shift if training else x

    def get_config(self) -> dict[str, object]:
        return {**super().get_config(), "factor": self.factor, "shift": self.shift}


@keras.saving.register_keras_serializable("kquant_tests")
class StochasticDepth(keras.layers.Layer):
    """Drops whole samples in training, as networks with residual branches write it."""

    def __init__(self, rate: float = 0.5, seed: int = 7, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.rate, self.seed = rate, seed
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, x: object, training: bool | None = None) -> object:
        if not training:
            return x
        shape = (keras.ops.shape(x)[0],) + (1,) * (len(x.shape) - 1)
        kept = keras.ops.floor(1 - self.rate + keras.random.uniform(shape, seed=self.generator))
        return x / (1 - self.rate) * kept

    def get_config(self) -> dict[str, object]:
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}
