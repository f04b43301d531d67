"""Training with weights of few bits, against the float model trained alike: accuracy, flash, and the file after xz.

    python -m experiments.reproduce --table=few_bits --models=resnet20 --epochs=12 --seeds=3

Batch normalizations train along, the float model of the same seed teaches; the first layer and a small last one have 8
bits (see `QuantConfig.preset`). `flash` is Vela's for an ethos-u55-128.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .tables import Options, Table
from .training_tables import TRAINED, Variants, trained_alike

VARIANTS: Variants = {
    "ternary": ("w2a8-ternary", "keep", True),
    "four levels": ("w2a8-kmeans", "keep", True),
    "binary": ("w1a8-binary", "keep", True),
    "80 % zeros": ({"preset": "w8a8", "prune": {"sparsity": 0.8, "by": "sensitivity"}}, "keep", True),
}


def few_bits(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """A row for the float model and for every variant."""
    yield from trained_alike(name, options, VARIANTS)


TABLES = {"few_bits": Table(few_bits, (*TRAINED, "flash", "xz"), ("model", "variant"))}
