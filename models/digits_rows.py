"""An LSTM or a GRU that reads the 8 x 8 digits row by row.

python -m models.digits_rows lstm        # trains it (20 seconds) and says how accurate it is
"""

from __future__ import annotations

import argparse

import keras
import numpy as np
from keras import layers

from models.digits_cnn import SEED, load_split

KINDS = {"lstm": layers.LSTM, "gru": layers.GRU}


def rows(images: np.ndarray) -> np.ndarray:
    """Images [n, 8, 8, 1] as sequences of rows [n, 8, 8]."""
    return images.reshape(-1, 8, 8)


def build(kind: str) -> keras.Model:
    """32 units, and a dense layer on the last state."""
    inputs = keras.Input((8, 8), name="rows")
    x = KINDS[kind](32, name=kind)(inputs)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x), name=f"digits_{kind}")


def train(kind: str, epochs: int = 30, verbose: int = 2) -> keras.Model:
    """Train from scratch.

    Args:
        kind: one of `KINDS`.
        epochs: passes over the training images.
        verbose: as in `keras.Model.fit`.
    """
    keras.utils.set_random_seed(SEED)
    digits, model, batch_size = load_split(), build(kind), 32
    schedule = keras.optimizers.schedules.CosineDecay(8e-3, epochs * -(-len(digits.x_train) // batch_size))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=1e-3), loss, metrics=["accuracy"])
    model.fit(rows(digits.x_train), digits.y_train, batch_size, epochs, verbose=verbose)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=list(KINDS))
    model, digits = train(parser.parse_args().kind), load_split()
    accuracy = np.mean(np.argmax(model.predict(rows(digits.x_test), verbose=0), -1) == digits.y_test)
    print(f"{model.count_params():,} parameters, test accuracy {100 * accuracy:.2f} %")


if __name__ == "__main__":
    main()
