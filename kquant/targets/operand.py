"""An integer tensor as the simulation sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Tensor = Any


@dataclass(frozen=True)
class Operand:
    """`centered` = q - zero_point, integer-valued float32; the real value is scale * centered."""

    centered: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int = 8

    @property
    def value(self) -> Tensor:
        """The real values."""
        return self.centered * self.scale
