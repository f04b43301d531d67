"""What hardware computes, stores and runs."""

from kquant.targets.target import Target, get_target

__all__ = ["Target", "get_target"]
