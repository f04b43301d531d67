"""The switches of a quantized model: which quantizers it has, which are on, and what its tensors then are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kquant.config.quant_config import QuantConfig
from kquant.config.text import suggest
from kquant.errors import ConfigError, ModelError
from kquant.graph.ir import sample_size
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.grid import Grid
from kquant.keras.fake_quant import FakeQuant
from kquant.keras.model import QuantizedModel, extract, insert
from kquant.quantize.record import Quantization
from kquant.targets.litert.target import LITERT
from kquant.targets.target import Target

Tensor = Any
WEIGHTS, ACTIVATIONS = "weights", "activations"


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantizer:
    """One switch: the weights of a node, or its output with all tensors that share its grid.

    Attributes:
        name: unique, "NODE:weights" or "NODE:activations".
        kind: "weights" or "activations".
        node: the node in the graph; `layer` is the user's layer it came from, `op` its operation.
        grid: where its values are rounded to.
    """

    name: str
    kind: str
    node: str
    layer: str
    op: str
    grid: Grid

    @property
    def bits(self) -> int:
        """How many bits an integer of the grid takes."""
        return self.grid.bits


class Switches:
    """The quantizers of a switchable model, which are switched on and off by name.

    Off, a tensor is the float network's; on, it is rounded to its grid and back (eq. 7 of the white paper). A change
    retraces nothing, and a quantizer that is off costs nothing. With all on, the model computes the simulation's
    function up to single roundings.

    Args:
        model: from `insert(..., switchable=True)`. All of its quantizers are switched off.

    Attributes:
        model: as given, for whatever takes a Keras model: `predict`, `evaluate` after `compile`, or a call.
        quantizers: all of them, in the order of the graph; tensors on the grid of their input have none of their own.

    Raises:
        ModelError: the model has no switches.
    """

    def __init__(self, model: QuantizedModel) -> None:
        self.model = model
        found: dict[str, list[FakeQuant]] = {}  # a constant has one quantizer in each layer that reads it
        for layer in model.quantized_layers.values():
            if layer.weight_quantizer is not None:
                found[f"{layer.node.name}:{WEIGHTS}"] = [layer.weight_quantizer]
            for name, quantizer in layer.quantizers.items():
                found.setdefault(f"{name}:{ACTIVATIONS}", []).append(quantizer)
        if any(quantizer.on is None for own in found.values() for quantizer in own):
            raise ModelError(f"The quantizers of {model.name!r} cannot be switched: make it with Switches.of.")
        self.quantizers = tuple(
            Quantizer(
                name=name,
                kind=kind,
                node=node.name,
                layer=node.origin or node.name,
                op=node.op,
                grid=found[name][0].to_grid(),
            )
            for node in self.qgraph.graph
            for kind in (WEIGHTS, ACTIVATIONS)
            if (name := f"{node.name}:{kind}") in found
        )
        self._states: dict[str, list[Any]] = {q.name: [f.on for f in found[q.name]] for q in self.quantizers}
        self.switch(())

    @classmethod
    def of(cls, source: QuantizedModel | QuantizedGraph, target: Target = LITERT) -> Switches:
        """The switches of a new model of what is quantized.

        Args:
            source: a quantized model, or a quantized graph.
            target: the hardware, for a graph.

        Raises:
            ModelError: `source` is not the result of `quantize_model`.
        """
        if isinstance(source, QuantizedGraph):
            asked = Quantization(config=QuantConfig(target=target.name))
            return cls(insert(source, asked, switchable=True))
        return cls(insert(extract(source), source.quantization, switchable=True))

    @cached_property
    def qgraph(self) -> QuantizedGraph:
        """What is quantized and how."""
        return extract(self.model)

    @property
    def target(self) -> Target:
        """The hardware."""
        return self.model.target

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all quantizers."""
        return tuple(self._states)

    @property
    def on(self) -> tuple[str, ...]:
        """The names of those that are on."""
        return tuple(name for name, states in self._states.items() if bool(states[0].numpy()))

    def switch(self, on: Collection[str]) -> None:
        """Switch exactly these quantizers on, and all others off.

        Raises:
            ConfigError: there is no quantizer of such a name.
        """
        for name in on:
            if name not in self._states:
                raise ConfigError(f"There is no quantizer {name!r}{suggest(name, self._states)}; see `quantizers`.")
        for name, states in self._states.items():
            for state in states:
                if bool(state.numpy()) != (name in on):  # reading is cheaper than writing
                    state.assign(name in on)

    def tensors(self, feeds: Sequence[Tensor], fetch: Sequence[str]) -> list[Tensor]:
        """Tensors of the network as it is switched, each behind its quantizer.

        Args:
            feeds: one tensor per input of the graph, in order.
            fetch: names of nodes that have a grid.
        """
        return self._compiled(fetch, lambda tensors: tensors)(*feeds)

    def stream(
        self, data: Iterable[Sequence[Any]], fetch: Sequence[str], summarize: Callable[[list[Tensor]], Any]
    ) -> Iterator[Any]:
        """summarize(the tensors `fetch`), compiled with the network, for one slice of the data after another.

        Memory grows neither with the number of batches nor with their size.

        Args:
            data: batches, with one array per input of the graph.
            fetch: names of nodes that have a grid.
            summarize: from tensors to the tensors wanted, which are yielded as numpy arrays in the same structure.
        """
        run = self._compiled(fetch, summarize)
        largest = max(4 * sample_size(node) for node in self.qgraph.graph)
        rows = max(1, (32 << 20) // largest)
        for batch in data:
            for k in range(0, len(batch[0]), rows):
                yield tf.nest.map_structure(np.asarray, run(*(x[k : k + rows] for x in batch)))

    def _compiled(self, fetch: Sequence[str], summarize: Callable[[list[Tensor]], Any]) -> Callable[..., Any]:
        graph = self.qgraph.graph
        inner = self.model.inner(fetch)
        signature = [tf.TensorSpec(graph[i].shape, graph[i].dtype) for i in graph.inputs]

        @tf.function(input_signature=signature, autograph=False)
        def run(*feeds: Any) -> Any:
            return summarize(keras.tree.flatten(inner(list(feeds))))

        return run
