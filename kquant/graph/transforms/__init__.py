"""Equivalence transforms: float graph -> float graph that computes the same function."""

from kquant.graph.transforms.prepare import prepare_graph

__all__ = ["prepare_graph"]
