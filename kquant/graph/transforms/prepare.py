"""From a Keras model to the graph that is quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import keras

from kquant.graph.ir import Graph
from kquant.graph.tracing.trace import trace_model
from kquant.graph.transforms.bound_masks import part_masks
from kquant.graph.transforms.fold_batch_norm import fold_batch_norm
from kquant.graph.transforms.fuse_activations import fuse_activations
from kquant.graph.transforms.fuse_functions import fuse_functions
from kquant.graph.transforms.padding import settle_padding
from kquant.graph.transforms.recognize_normalization import recognize_normalization
from kquant.graph.transforms.simplify import absorb_padding, simplify


def prepare_graph(
    model: keras.Model, for_training: bool = False, shapes: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> Graph:
    """Trace a model, recognize its normalizations, fold those of batches, fuse activations and functions of one tensor.

    Args:
        model: see `trace_model`; it is not modified.
        for_training, shapes: likewise.

    Returns:
        A float graph with `evaluate(graph, inputs) == model(inputs)` up to float rounding.

    Raises:
        ModelError: see `trace_model`.
    """
    graph = simplify(settle_padding(trace_model(model, for_training, shapes)))
    graph = fold_batch_norm(simplify(recognize_normalization(graph)))
    return fuse_functions(part_masks(fuse_activations(absorb_padding(simplify(graph)))))
