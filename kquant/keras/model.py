"""Quantized graph <-> quantized Keras model.

`insert` builds the simulation, an ordinary functional Keras model of `QuantizedLayer`s; `extract`
reads the quantized graph back from such a model, as it stands after training or loading, for export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from kquant.errors import ModelError
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import op_of
from kquant.graph.quantized import QuantizedGraph
from kquant.graph.structure import pack
from kquant.graph.tracing.float_call import FloatCall
from kquant.graph.training import UserWeight
from kquant.graph.transforms.training import without_train_only
from kquant.grids.gradients import checked_loss
from kquant.grids.grid import Grid
from kquant.keras.fake_quant import grid_settings
from kquant.keras.layer import QuantizedLayer
from kquant.keras.record import ModelRecord, node_from_dict, node_to_dict
from kquant.keras.report import format_report
from kquant.keras.train_only import TrainOnly
from kquant.keras.user_view import settings_of
from kquant.quantize.plan import is_final
from kquant.quantize.record import Quantization
from kquant.targets.target import Target, get_target

_NOT_FINITE = (
    "The loss is NaN or infinite, and this step changed no weight. Look for NaN or huge values in the batch; if there "
    "are none, lower the learning rate. Loss"
)


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How the grids of a model learn, and which variables are one (`qat.learning`).

    Attributes:
        weights: node -> settings by which the grid of its weights learns (see `FakeQuant`).
        grids: node -> the same of its output, or of a constant.
        tied_weights: groups of nodes that have one weight: calls of one layer.
        tied_grids: groups of nodes (and constants) that have one grid.
        layer: node -> what makes its layer, where it is not a plain `QuantizedLayer`.
        relative_weights: weights are trained in units of their size (`keras.unit`).
        keep_zeros: weights that are exactly zero stay zero.
    """

    weights: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    grids: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tied_weights: tuple[tuple[str, ...], ...] = ()
    tied_grids: tuple[tuple[str, ...], ...] = ()
    layer: Mapping[str, Callable[..., QuantizedLayer]] = field(default_factory=dict)
    relative_weights: bool = False
    keep_zeros: bool = False


@keras.saving.register_keras_serializable("kquant")
class QuantizedModel(keras.Model):
    """A functional model of `QuantizedLayer`s that remembers how it was quantized.

    Attributes:
        record: how it was quantized, and how its layers make up the graph.
    """

    record: ModelRecord

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "quantization": self.record.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> QuantizedModel:
        config = dict(config)
        record = ModelRecord.from_dict(config.pop("quantization"))
        model = super().from_config(config, custom_objects=custom_objects)
        model.record = record
        model.settle()
        return model

    def settle(self) -> None:
        """Name the outputs as the user's model does, and make one variable of those that the training keeps equal.

        Serialization makes them several.
        """
        self.output_names = list(self.record.loss_names or self.record.output_names)
        layers = self.quantized_layers
        quantizers = {name: q for layer in layers.values() for name, q in layer.quantizers.items()}
        for first, *rest in self.record.tied_weights:
            for name in rest:
                layers[name].tie_weights(layers[first])
        for first, *rest in self.record.tied_grids:
            for name in rest:
                quantizers[name].tie(quantizers[first])

    @property
    def quantized_layers(self) -> dict[str, QuantizedLayer]:
        """The layers that simulate the nodes of the graph, by the names of these."""
        return {layer.node.name: layer for layer in self.layers if isinstance(layer, QuantizedLayer)}

    def inner(self, names: Sequence[str]) -> keras.Model:
        """A model of the same inputs, in a list, whose outputs are the values of these nodes.

        Args:
            names: of `quantized_layers`.
        """
        layers = self.quantized_layers
        outputs = [layers[name].output for name in names]
        return keras.Model(self.inputs, [y[0] if isinstance(y, list | tuple) else y for y in outputs])

    @property
    def quantization(self) -> Quantization:
        """How the model was quantized."""
        return self.record.quantization

    def require_training(self) -> None:
        """Refuse to train a model whose integers are decided.

        Raises:
            ModelError: no layer of it trains.
        """
        if self.quantized_layers and all(layer.frozen for layer in self.quantized_layers.values()):
            raise ModelError(
                f"The integers of {self.name!r} are decided, and fit would not change them: train what "
                "kquant.prepare_qat makes of it, or of the float model."
            )

    def compute_loss(self, *args: Any, training: bool = True, **kwargs: Any) -> Any:
        """The loss that `compile` was given; a training step whose loss is not finite fails and changes no weight."""
        if training:
            self.require_training()
        loss = super().compute_loss(*args, training=training, **kwargs)
        return checked_loss(loss, _NOT_FINITE) if training and loss is not None else loss

    @property
    def target(self) -> Target:
        """The hardware that the model simulates."""
        return get_target(self.quantization.target)

    @property
    def report(self) -> str:
        """What was done, tensor by tensor as the model stands now, and what stays float and why."""
        return format_report(self.quantization, extract(self))


def insert(
    qgraph: QuantizedGraph,
    quantization: Quantization,
    learning: Learning | None = None,
    training_dtype: str = "float32",
    switchable: bool = False,
) -> QuantizedModel:
    """The Keras model that simulates `qgraph`.

    Args:
        qgraph: the graph, its grids and integers.
        quantization: how it was quantized.
        learning: how weights and grids learn. Without it the integers are decided: the model computes with these, and
            does not train.
        training_dtype: in what operations compute when the model is trained (see `QuantizedLayer`).
        switchable: every quantizer can be switched off; all are on at first. The model then computes in real numbers:
            sums are taken in float32, and biases are not rounded. Not for a model that learns.
    """
    wired, target = qgraph.graph, get_target(quantization.target)
    graph = without_train_only(wired)
    values: dict[str, Any] = {}
    grids: dict[str, Any] = {}
    inputs, float_nodes = [], {}
    for node in wired:
        if node.op == "const":
            continue
        if node.op == "train_only":
            source = node.inputs[0]
            values[node.name] = TrainOnly.of(node, _keras_name(node))(values[source])
            grids |= {node.name: grids[source]} if source in grids else {}
            continue
        if node.op == "input":
            name = graph.input_names[graph.inputs.index(node.name)]
            tensor = keras.Input(batch_shape=node.shape, dtype=node.dtype, name=name)
            inputs.append(tensor)
            sources: tuple[str, ...] = ()
            arguments = [tensor]
            if qgraph.activations.get(node.name) is None:
                values[node.name] = tensor
                continue
        else:
            sources = tuple(i for i in node.inputs if wired[i].op != "const")
            arguments = [values[i] for i in sources]
        if node.op == "float":
            copied = node.call.deployed if learning is None else node.call.clone
            call = copied(name=_keras_name(node))
            if not node.learns and isinstance(call.operation, keras.layers.Layer):
                call.operation.trainable = False
            values[node.name] = call(arguments)
            float_nodes[node.name] = {**node_to_dict(graph[node.name]), "operation": call.operation.name}
            if call.output is not None:
                float_nodes[node.name]["output"] = call.output
            continue
        layer = _layer(graph, qgraph, graph[node.name], target, learning, training_dtype, switchable)
        if layer.runs_in_integers:
            read = [grids[i] for i in sources if i in grids]
            values[node.name], grids[node.name] = layer(arguments, read) if read else layer(arguments)
        else:
            values[node.name] = layer(arguments)
    fed = {tensor.name: tensor for tensor in inputs}
    model = QuantizedModel(
        pack(graph.input_structure, [fed[name] for name in graph.input_names]),
        pack(graph.output_structure, [values[o] for o in wired.outputs]),
        name=graph.name,
    )
    model.record = _record(qgraph, graph, quantization, learning, float_nodes)
    model.settle()
    return model


def _record(
    qgraph: QuantizedGraph,
    graph: Graph,
    quantization: Quantization,
    learning: Learning | None,
    float_nodes: Mapping[str, Any],
) -> ModelRecord:
    """What is remembered of the model of a graph."""
    return ModelRecord(
        quantization=quantization,
        inputs=graph.inputs,
        outputs=graph.outputs,
        input_names=graph.input_names,
        output_names=graph.output_names,
        input_structure=graph.input_structure,
        output_structure=graph.output_structure,
        loss_names=graph.loss_names,
        order=tuple(graph.nodes),
        float_nodes=float_nodes,
        plain_inputs={i: node_to_dict(graph[i]) for i in graph.inputs if qgraph.activations.get(i) is None},
        tied_weights=learning.tied_weights if learning else (),
        tied_grids=learning.tied_grids if learning else (),
    )


def _keras_name(node: Node) -> str:
    """A legal layer name; the quantizer of an input must not take the input's own name."""
    name = node.name.replace("/", ".")
    return f"{name}.quantize" if node.op == "input" else name


def _layer(
    graph: Graph,
    qgraph: QuantizedGraph,
    node: Node,
    target: Target,
    learning: Learning | None,
    dtype: str,
    switchable: bool,
) -> QuantizedLayer:
    """The layer of one node of `graph` (that of `qgraph` without "train_only" nodes), with its variables set."""
    output, weight = qgraph.activations.get(node.name), qgraph.weights.get(node.name)
    constants = {i: graph[i].weights["value"] for i in node.inputs if graph[i].op == "const"}
    looked_up = output is not None and op_of(node).lookup  # its table has the grid of the output
    shares = output is not None and node.op in target.same_scale | target.inputs_share_output
    integers = qgraph.integers.get(node.name) if learning is None else None
    frozen, learning = learning is None, learning or Learning()
    user = {} if frozen else _user(graph, node, learning.keep_zeros)
    grids = learning.grids
    constant_grids = {i: grid_settings(qgraph.activations[i], grids.get(i)) for i in constants if output is not None}
    layer = learning.layer.get(node.name, QuantizedLayer)(
        node,
        weight_grid=None if looked_up else grid_settings(weight, learning.weights.get(node.name)),
        output_grid=None if shares else grid_settings(output, grids.get(node.name)),
        shares_grid=shares,
        activation_bits=8 if output is None else output.container,
        constants=constants,
        constant_grids=constant_grids,
        relative_weight=learning.relative_weights and op_of(node).matrix,
        rounds_in_training=switchable or node.op != "softmax" or not is_final(graph, node),
        name=_keras_name(node),
        training_dtype=dtype,
        integers=None if integers is None else str(integers.dtype),
        frozen=frozen,
        target=target.name,
        switchable=switchable,
        limits=(output.qmin, output.qmax) if output is not None and shares and op_of(node).inserts else None,
        user={k: settings_of(w, keep) for k, (w, keep) in user.items()},
        between=[TrainOnly.of(n, _keras_name(n)) for n in node.between] if not frozen else (),
    )
    for name, view in layer.user_views.items():
        view.assign(*user[name])
    if layer.integers is not None and integers is not None:
        layer.integers.assign(integers.reshape(layer.integers.shape))
    constant_pairs = ((q, qgraph.activations[name]) for name, q in layer.constant_quantizers.items())
    for quantizer, q in ((layer.weight_quantizer, weight), (layer.output_quantizer, output), *constant_pairs):
        if quantizer is not None and q is not None:
            quantizer.assign(q)
    return layer


def _user(graph: Graph, node: Node, keep_zeros: bool) -> dict[str, tuple[UserWeight, bool]]:
    """Variable of the node's layer -> the weight of the user's, and whether its zeros stay."""
    weight = op_of(node).weight
    key = "" if weight is None else weight.name
    constants = [graph[i] for i in node.inputs if graph[i].op == "const"]
    found = {f"constant_{k}": (c.user["value"], False) for k, c in enumerate(constants) if c.user}
    found |= {name: (node.user[name], keep_zeros and name == key) for name in node.weights if name in node.user}
    if keep_zeros and key and key not in node.user:  # of a model that was quantized already
        zeros = node.weights[key] == 0
        found[key] = (UserWeight(shape=zeros.shape, zeros=zeros if zeros.any() else None), True)
    return found


def extract(model: keras.Model) -> QuantizedGraph:
    """The quantized graph of a model made by `insert`, with its variables as they stand now.

    Raises:
        ModelError: `model` is not a quantized model.
    """
    if not isinstance(model, QuantizedModel):
        raise ModelError(
            f"{getattr(model, 'name', model)!r} is not a quantized model: pass the result of kquant.quantize_model"
        )
    record, layers = model.record, model.quantized_layers
    operations = {op.name: op for op in model.operations}
    nodes: dict[str, Node] = {}
    activations: dict[str, Grid | None] = {}
    weights: dict[str, Grid | None] = {}
    integers: dict[str, np.ndarray] = {}
    for name in record.order:
        if name in record.float_nodes:
            config = dict(record.float_nodes[name])
            call = FloatCall.of(operations[config.pop("operation")], config.pop("output", None))
            nodes[name], activations[name] = node_from_dict(config).with_(weights={}, call=call), None
        elif name in record.plain_inputs:
            nodes[name], activations[name] = node_from_dict(record.plain_inputs[name]), None
        elif name in layers:
            _extract_layer(layers[name], nodes, activations, weights, integers)
    order = {name: k for k, name in enumerate(record.order)}
    graph = Graph(
        nodes={k: nodes[k] for k in sorted(nodes, key=lambda k: order[k])},
        inputs=record.inputs,
        outputs=record.outputs,
        input_names=record.input_names,
        output_names=record.output_names,
        input_structure=record.input_structure,
        output_structure=record.output_structure,
        loss_names=record.loss_names,
        name=model.name,
    )
    return QuantizedGraph(graph, activations, weights, integers)


def _extract_layer(
    layer: QuantizedLayer,
    nodes: dict[str, Node],
    activations: dict[str, Grid | None],
    weights: dict[str, Grid | None],
    integers: dict[str, np.ndarray],
) -> None:
    node = layer.node
    values, weight_grid, decided = layer.deployed()
    for name, constant in layer.constants.items():
        value = np.asarray(constant.numpy(), np.float32)
        nodes[name] = Node(name=name, op="const", shape=value.shape, weights={"value": value}, origin=node.origin)
        quantizer = layer.constant_quantizers.get(name)
        activations[name] = quantizer.to_grid() if quantizer is not None else None
    nodes[node.name] = node.with_(weights=values)
    if layer.shares_grid:
        activations[node.name] = next(q for i in node.inputs if (q := activations[i]) is not None)
    else:
        activations[node.name] = layer.output_quantizer.to_grid() if layer.output_quantizer else None
    if weight_grid is not None:
        weights[node.name] = weight_grid
    if decided is not None:
        integers[node.name] = decided
