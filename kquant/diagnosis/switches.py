"""The float network with a switch at every quantizer: one compiled model for every combination of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kquant.config.text import suggest
from kquant.errors import ConfigError
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import compute, evaluate, op_of, weight_of, weight_view
from kquant.graph.quantized import QuantizedGraph
from kquant.grids.gradients import fake_quant
from kquant.grids.grid import Grid
from kquant.keras.model import QuantizedModel, extract
from kquant.targets.litert.target import LITERT
from kquant.targets.operand import Call, Operand
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


def find_quantizers(qgraph: QuantizedGraph, target: Target = LITERT) -> tuple[Quantizer, ...]:
    """The quantizers of a graph, in its order; tensors on the grid of their input have none of their own."""
    found = []
    for node in qgraph.graph:
        q, w = qgraph.activations.get(node.name), qgraph.weights.get(node.name)
        facts: dict[str, Any] = {"node": node.name, "layer": node.origin or node.name, "op": node.op}
        if w is not None and not op_of(node).lookup:  # whose values have the grid of its output
            found.append(Quantizer(name=f"{node.name}:{WEIGHTS}", kind=WEIGHTS, grid=w, **facts))
        if q is not None and node.op not in target.same_scale | target.inputs_share_output:
            found.append(Quantizer(name=f"{node.name}:{ACTIVATIONS}", kind=ACTIVATIONS, grid=q, **facts))
    return tuple(found)


class SwitchedModel(keras.Model):
    """A quantized graph in real numbers, each of whose quantizers is on or off.

    Off, a tensor is the float network's; on, it is rounded to its grid and back (eq. 7 of the white paper). The
    switches are one variable: a change retraces nothing, and a quantizer that is off costs nothing. With
    all switches on, the model computes the simulation's function up to single roundings, since sums are taken
    in float32 and biases are not rounded. It serves wherever a metric wants a Keras model: `predict`,
    `evaluate` after `compile`, or a call.

    Args:
        qgraph: what is quantized and how. Its arrays are not copied into compiled functions.
        target: the hardware, which says what shares a grid.

    Attributes:
        qgraph, target: as given.
        quantizers: all of them, in the order of the graph; they are all off at first.
    """

    def __init__(self, qgraph: QuantizedGraph, target: Target = LITERT, **kwargs: Any) -> None:
        super().__init__(name=kwargs.pop("name", f"{qgraph.graph.name}_switched"), trainable=False, **kwargs)
        self.supports_jit = False  # a conditional for every quantizer takes XLA minutes to compile
        self.qgraph, self.target = qgraph, target
        self.quantizers = find_quantizers(qgraph, target)
        self._index = {q.name: k for k, q in enumerate(self.quantizers)}
        size = max(1, len(self.quantizers))
        self.switches = self.add_weight(
            shape=(size,), dtype="bool", initializer="zeros", trainable=False, name="switches"
        )
        self._graph = self._switched_graph(qgraph.graph)
        self.built = True

    @classmethod
    def of(cls, model: QuantizedModel) -> SwitchedModel:
        """The switched version of a quantized model.

        Raises:
            ModelError: `model` is not the result of `quantize_model`.
        """
        return cls(extract(model), model.target)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all quantizers."""
        return tuple(self._index)

    def switch(self, on: Collection[str]) -> None:
        """Switch exactly these quantizers on, and all others off.

        Raises:
            ConfigError: there is no quantizer of such a name.
        """
        for name in on:
            if name not in self._index:
                raise ConfigError(f"There is no quantizer {name!r}{suggest(name, self._index)}; see `quantizers`.")
        self.switches.assign([name in on for name in self._index] or [False])

    def call(self, inputs: Any) -> Any:
        """The outputs: one tensor, or a list."""
        outputs = self.tensors(self._feeds(inputs))
        return outputs[0] if len(outputs) == 1 else outputs

    def tensors(self, feeds: Sequence[Tensor], fetch: Sequence[str] | None = None) -> list[Tensor]:
        """Tensors of the network as it is switched, each behind its quantizer.

        Args:
            feeds: one tensor per input of the graph, in order.
            fetch: names of nodes; the outputs by default.
        """
        graph = self.qgraph.graph
        quantized = [self._output(graph[i], x) for i, x in zip(graph.inputs, feeds, strict=True)]
        return evaluate(self._graph, quantized, fetch)

    def stream(
        self, data: Iterable[Sequence[Any]], fetch: Sequence[str], summarize: Callable[[list[Tensor]], Any]
    ) -> Iterator[Any]:
        """summarize(the tensors `fetch`), compiled with the network, for one slice of the data after another.

        Memory grows neither with the number of batches nor with their size.

        Args:
            data: batches, with one array per input of the graph.
            fetch: names of nodes.
            summarize: from tensors to the tensors wanted, which are yielded as numpy arrays in the same structure.
        """
        graph = self.qgraph.graph
        signature = [tf.TensorSpec(graph[i].shape, graph[i].dtype) for i in graph.inputs]

        @tf.function(input_signature=signature, autograph=False)
        def run(*feeds: Any) -> Any:
            return summarize(self.tensors(feeds, fetch))

        largest = max(4 * int(np.prod([d or 1 for d in node.shape])) for node in graph)
        rows = max(1, (32 << 20) // largest)
        for batch in data:
            for k in range(0, len(batch[0]), rows):
                yield tf.nest.map_structure(np.asarray, run(*(x[k : k + rows] for x in batch)))

    def _feeds(self, inputs: Any) -> list[Tensor]:
        """The inputs in order, from a tensor, a list or tuple, or a dict by the inputs' names."""
        graph = self.qgraph.graph
        if isinstance(inputs, Mapping):
            inputs = [inputs[name] for name in graph.input_names]
        tensors = inputs if isinstance(inputs, list | tuple) else [inputs]
        return [tf.cast(x, graph[i].dtype) for i, x in zip(graph.inputs, tensors, strict=True)]

    def _switched_graph(self, graph: Graph) -> Graph:
        """The graph with every node as a call that looks at the switches."""

        def switched(node: Node) -> Node:
            if node.op == "input":
                return node
            # captured tensors are shared by all compiled functions, arrays would be copied into each
            own = node.with_(weights={k: tf.constant(w) for k, w in node.weights.items()})
            return node.with_(op="float", attrs={}, weights={}, call=partial(self._compute, own))

        return graph.rebuild(switched(n) for n in graph)

    def _compute(self, node: Node, inputs: Sequence[Tensor]) -> Tensor:
        weights = dict(node.weights)
        if (name := f"{node.name}:{WEIGHTS}") in self._index:
            key, q = weight_of(node).name, self.quantizers[self._index[name]].grid
            weights[key] = self._switched(name, weights[key], lambda w: _rounded_weight(node, w, q))
        rounds = op_of(node).averages or op_of(node).inserts  # values beside those of its input, on the same grid
        if rounds and (owner := self._owner(node)) is not None:
            grid = self.quantizers[self._index[owner]].grid
            return tf.cond(
                self._is_on(owner), lambda: self._on_grid(node, inputs[0], grid), lambda: compute(node, inputs, weights)
            )
        return self._output(node, weights["value"] if node.op == "const" else compute(node, inputs, weights))

    def _output(self, node: Node, y: Tensor) -> Tensor:
        """The node's output behind its own quantizer, if it has one."""
        name = f"{node.name}:{ACTIVATIONS}"
        if name not in self._index:
            return y
        grid = self.quantizers[self._index[name]].grid
        return self._switched(name, y, lambda v: rounded(v, grid))

    def _owner(self, node: Node) -> str | None:
        """The quantizer whose grid the node's output shares; None where it stays float."""
        if self.qgraph.activations.get(node.name) is None:
            return None
        while f"{node.name}:{ACTIVATIONS}" not in self._index:
            node = self.qgraph.graph[node.inputs[0]]
        return f"{node.name}:{ACTIVATIONS}"

    def _on_grid(self, node: Node, x: Tensor, q: Grid) -> Tensor:
        """An average, interpolation or padding as the target computes it, on the grid of its input.

        Its values often lie halfway between two steps, where the kernels' rule for ties shifts the mean.
        """
        scale, zero_point = tf.constant(q.scale), tf.constant(np.float32(q.zero_point))
        operand = Operand(tf.round(rounded(x, q) / q.scale), scale, zero_point, q.container)
        arithmetic = self.target.kernels[node.op].arithmetic[q.container]
        return arithmetic(Call(node=node, inputs=[operand], out=operand)) * scale

    def _is_on(self, name: str) -> Tensor:
        return tf.convert_to_tensor(self.switches)[self._index[name]]

    def _switched(self, name: str, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        return tf.cond(self._is_on(name), lambda: quantize(x), lambda: tf.identity(x))


def rounded(x: Tensor, q: Grid) -> Tensor:
    """The real values of x on the grid `q`: `kquant.gradients.fake_quant` with the grid's constants."""
    shape = () if q.axis is None else tuple(-1 if k == q.axis else 1 for k in range(len(x.shape)))
    scale, zero_point = (np.reshape(v, shape).astype(np.float32) for v in (q.scale, q.zero_point))
    return fake_quant(x, tf.constant(scale), tf.constant(zero_point), q.qmin, q.qmax)


def _rounded_weight(node: Node, weight: Tensor, q: Grid) -> Tensor:
    return tf.reshape(rounded(weight_view(node, weight), q), weight.shape)
