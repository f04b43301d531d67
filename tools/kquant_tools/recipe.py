"""The optimizer of a fine-tuning run."""

from __future__ import annotations

from typing import Any

LEARNING_RATES = {"adam": 5e-4, "sgd": 5e-3}
WARM_UP = 0.05  # of the steps


def recipe(steps: int, optimizer: str = "adam", learning_rate: float | None = None) -> Any:
    """The optimizer of a fine-tuning run: a linear warm-up over 5 % of the steps, then a cosine to zero.

    Args:
        steps: of the whole run.
        optimizer: "adam" or "sgd" (Nesterov momentum 0.9).
        learning_rate: the highest, by default 5e-4 for Adam and 5e-3 for SGD.
    """
    import keras

    highest = LEARNING_RATES[optimizer] if learning_rate is None else learning_rate
    warm_up = int(WARM_UP * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0 if warm_up else highest,
        max(steps - warm_up, 1),
        warmup_target=highest if warm_up else None,
        warmup_steps=warm_up,
    )
    if optimizer == "adam":
        return keras.optimizers.Adam(schedule)
    return keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True)
