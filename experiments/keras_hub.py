"""Which models of keras-hub go through: `python -m experiments.keras_hub [NAME ...]`, a row of a table per model.

Every model is built small with random weights, quantized to w8a8, exported, and its file compared with the simulation.
keras-hub is in the extra `dev` only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.keras_hub_models import MODELS
from experiments.keras_hub_small import samples
from experiments.passages import HEADER, row

SAMPLES = 8


def main(names: Sequence[str]) -> None:
    """Print the table."""
    print(HEADER, flush=True)
    for name in names or MODELS:
        print(row(name, MODELS[name], lambda model: samples(model, SAMPLES)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
