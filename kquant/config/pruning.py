"""Which weights become zero before the others are quantized: frozen settings."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kquant.config.specs import is_positive
from kquant.errors import ConfigError

PRUNINGS = ("magnitude", "obs")
SHARES = ("uniform", "sensitivity")
PATTERNS = (None, "2:4")


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Which weights of matrix products become zero (`quantize.prune`), in one shot, with the others and the biases
    repaired.

    Attributes:
        sparsity: the share of zeros, above 0 and below 1.
        method: one of `PRUNINGS`: the smallest weights ("magnitude"), or those that cost the output least once the
            others have made up for them, on the second moments of the inputs ("obs": optimal brain surgeon).
        by: "uniform" for the same share in every layer, or "sensitivity" for one threshold of what a weight costs
            the network's outputs.
        pattern: "2:4": of every four consecutive input channels two stay (a `sparsity` of 0.5); None for none.
        keep: names of layers (regular expression found anywhere in the name) that are not pruned; empty for none.

    Raises:
        ConfigError: a value is out of bounds.
    """

    sparsity: float = 0.5
    method: str = "obs"
    by: str = "uniform"
    pattern: str | None = None
    keep: str = ""

    def __post_init__(self) -> None:
        for name, known in (("method", PRUNINGS), ("by", SHARES), ("pattern", PATTERNS)):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"Unknown {name} {value!r} of prune; use one of {known}.")
        if not is_positive(self.sparsity) or self.sparsity >= 1:
            raise ConfigError(f"sparsity must be a number above 0 and below 1, found {self.sparsity!r}.")
        if self.pattern is not None and (self.sparsity != 0.5 or self.by != "uniform"):
            raise ConfigError(f'pattern="{self.pattern}" is sparsity=0.5 in every layer: set by="uniform".')
        try:
            re.compile(self.keep)
        except (re.error, TypeError) as error:
            raise ConfigError(f"{self.keep!r} in {self} is not a regular expression: {error}.") from error
