"""`Distiller`: a quantized student learns from its float teacher, with labels or without."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from kquant.config.text import suggest
from kquant.errors import ConfigError, ModelError
from kquant.graph.ir import Graph
from kquant.graph.transforms import prepare_graph
from kquant.grids.gradients import checked_loss
from kquant.keras.layer import QuantizedLayer
from kquant.keras.model import QuantizedModel, extract

Tensor = Any
_SMALLEST = 1e-30  # of the probabilities whose logarithm is taken
_NOT_FINITE = (
    "The loss of the distillation is NaN or infinite, and this step changed nothing. Look for NaN or huge values in "
    "the batch; if there are none, lower the learning rate. Loss"
)


@keras.saving.register_keras_serializable("kquant")
class Distiller(keras.Model):
    """Trains a student on what its teacher says (Hinton et al. 2015, arXiv 1503.02531), for compile and fit.

    With the scores z_s of the student and z_t of the teacher, the loss of a training step is

        (1 - alpha) L + alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + feature_weight sum_k mean (f_s,k - f_t,k)^2

    where L is the loss that `compile` was given, and KL and squares are means over samples and positions. Data
    without labels (and `compile` without a loss) trains on the other terms alone. Sample weights weigh L. The logs of
    a training epoch show `distillation_loss` (T^2 KL) and `feature_loss` (the sum); evaluate and predict are the
    student's, and only without labels is the teacher asked there too, for T^2 KL as the loss.

    The teacher runs with training=False and none of its variables is trained. Neither model is modified otherwise
    than that fit trains the student: `distiller.student` is what one saves and exports. A saved distiller holds both.

    Args:
        student: what is trained, e.g. from `prepare_qat`.
        teacher: the float model, with the same inputs and outputs. What is compared are scores of two or more classes
            on the last axis, as logits or as probabilities (their logarithm is the same up to a constant).
        temperature: T, above 0. Higher ones tell more of the classes that the teacher rules out.
        outputs: names of the outputs that are compared, by default all but integers (a mask of classes, say). The
            others learn by the loss of `compile` alone.
        alpha: the share of the teacher, 0 to 1. The default of equal shares at T = 1 is LSQ's (arXiv 1902.08153).
        features: inner tensors to match, student's -> teacher's, by the names of layers (of nodes, for a quantized
            model, whose activations are fused and belong to the node in front). Of equal shape, and not among those
            whose channels equalization has rescaled.
        feature_weight: what their squared errors count, at least 0.

    Raises:
        ModelError: the models' outputs do not match or are no class scores, or an output or a feature does not exist
            or fit.
        ConfigError: a number is out of bounds.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model,
        *,
        temperature: float = 1.0,
        alpha: float = 0.5,
        outputs: Sequence[str] | None = None,
        features: Mapping[str, str] | None = None,
        feature_weight: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        _check("temperature", temperature, 0.0, math.inf, include_low=False)
        _check("alpha", alpha, 0.0, 1.0)
        _check("feature_weight", feature_weight, 0.0, math.inf)
        graphs = _graph(student), _graph(teacher)
        self.outputs_compared = None if outputs is None else tuple(outputs)
        self._compared = _compared(*graphs, self.outputs_compared)
        self.student, self.teacher = student, teacher
        self.temperature, self.alpha, self.feature_weight = float(temperature), float(alpha), float(feature_weight)
        self.features = dict(features or {})
        self._probabilities = tuple(tuple(is_softmax(g, g.outputs[k]) for k in self._compared) for g in graphs)
        self._views = _views(student, teacher, self.features)
        self._distillation_loss = keras.metrics.Mean(name="distillation_loss")
        self._feature_loss = keras.metrics.Mean(name="feature_loss") if features else None
        self.built = True

    def call(self, x: Any, training: bool = False) -> Any:
        """The student's scores; in training, the terms of the teacher are added to `losses`."""
        if not training:
            return self.student(x, training=False)
        scores, inner = self._views[0](x, training=True)
        targets, wanted = self._views[1](x, training=False)
        distillation = self._divergence(targets, scores)
        self._distillation_loss.update_state(distillation)
        self.add_loss(self.alpha * distillation)
        if self._feature_loss is not None:
            pairs = zip(inner, wanted, strict=True)
            squares = [tf.reduce_mean(tf.square(_float(f) - tf.stop_gradient(_float(t)))) for f, t in pairs]
            self._feature_loss.update_state(tf.add_n(squares))
            self.add_loss(self.feature_weight * tf.add_n(squares))
        return scores

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """The loss of `compile`, and in training the teacher's terms of the call that gave `y_pred`."""
        if not training:
            if y is None:
                return self._divergence(self.teacher(x, training=False), y_pred)
            return super().compute_loss(x, y, y_pred, sample_weight, training=False)
        if isinstance(self.student, QuantizedModel):
            self.student.require_training()
        # Keras divides what it sums over replicas; `taught` are the terms that `call` added
        taught = tf.add_n([_float(loss) for loss in self.losses])
        taught /= float(tf.distribute.get_strategy().num_replicas_in_sync)
        if y is None:
            return checked_loss(taught, _NOT_FINITE)
        everything = super().compute_loss(x, y, y_pred, sample_weight, training=True)  # L + taught
        return checked_loss((1.0 - self.alpha) * everything + self.alpha * taught, _NOT_FINITE)

    def test_step(self, data: Any) -> dict[str, Tensor]:
        trained_on = {m.name for m in (self._distillation_loss, self._feature_loss) if m is not None}
        return {name: value for name, value in super().test_step(data).items() if name not in trained_on}

    def _divergence(self, targets: Any, scores: Any) -> Tensor:
        """T^2 KL(softmax(z_t / T) || softmax(z_s / T)), summed over the outputs that are compared."""
        wanted, found = ([keras.tree.flatten(z)[k] for k in self._compared] for z in (targets, scores))
        pairs = zip(wanted, found, *reversed(self._probabilities), strict=True)
        return tf.add_n([divergence(_logits(t, pt), _logits(s, ps), self.temperature) for t, s, pt, ps in pairs])

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """The student's."""
        return self.student.trainable_variables

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """The student's."""
        return self.student.trainable_weights

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        """All others, the teacher's among them."""
        return _without(self.variables, self.trainable_variables)

    @property
    def non_trainable_weights(self) -> list[keras.Variable]:
        """All others, the teacher's among them."""
        return _without(self.weights, self.trainable_weights)

    def get_config(self) -> dict[str, Any]:
        numbers = {k: getattr(self, k) for k in ("temperature", "alpha", "feature_weight")}
        models = {k: keras.saving.serialize_keras_object(getattr(self, k)) for k in ("student", "teacher")}
        names = {"features": dict(self.features), "outputs": self.outputs_compared}
        return {"name": self.name, **models, **numbers, **names}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Distiller:
        models = {
            k: keras.saving.deserialize_keras_object(config[k], custom_objects=custom_objects)
            for k in ("student", "teacher")
        }
        return cls(**{**config, **models})


def gives_probabilities(model: keras.Model) -> bool:
    """Whether the first output of a model, quantized or not, is a softmax and not logits.

    Raises:
        ModelError: the model cannot be traced.
    """
    graph = _graph(model)
    return is_softmax(graph, graph.outputs[0])


def is_softmax(graph: Graph, name: str) -> bool:
    """Whether a tensor is a softmax, directly or reshaped."""
    node = graph[name]
    while node.op == "reshape":
        node = graph[node.inputs[0]]
    return node.op == "softmax"


def divergence(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(targets / T) || softmax(logits / T)), the mean over all axes but the last.

    T^2 keeps the gradient's size: it is about that of the mean squared error of centred logits for a high T
    (section 2.1 of arXiv 1503.02531).

    Args:
        targets, logits: [..., classes] float32.
        temperature: T.
    """
    wanted = tf.stop_gradient(tf.nn.log_softmax(targets / temperature))
    found = tf.nn.log_softmax(logits / temperature)
    return temperature**2 * tf.reduce_mean(tf.reduce_sum(tf.exp(wanted) * (wanted - found), axis=-1))


def _logits(scores: Tensor, probabilities: bool) -> Tensor:
    """Logits, up to a constant per sample."""
    return tf.math.log(tf.maximum(_float(scores), _SMALLEST)) if probabilities else _float(scores)


def _float(x: Tensor) -> Tensor:
    return tf.cast(x, tf.float32)


def _without(variables: Sequence[keras.Variable], others: Sequence[keras.Variable]) -> list[keras.Variable]:
    known = {id(v) for v in others}
    return [v for v in variables if id(v) not in known]


def _check(name: str, value: float, low: float, high: float, include_low: bool = True) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (value == low and not include_low):
        bounds = f"{'at least' if include_low else 'above'} {low:g}" + (f" and at most {high:g}" * (high < math.inf))
        raise ConfigError(f"{name} of a Distiller must be a number {bounds}, found {value!r}.")


def _graph(model: keras.Model) -> Graph:
    return extract(model).graph if isinstance(model, QuantizedModel) else prepare_graph(model)


def _compared(student: Graph, teacher: Graph, names: Sequence[str] | None) -> tuple[int, ...]:
    """The places of the outputs that are compared; models that cannot be as class scores are refused."""
    for name in names or ():
        if name not in student.output_names:
            raise ModelError(f"{student.name!r} has no output {name!r}{suggest(name, student.output_names)}.")
    shapes = [[graph[name].shape[1:] for name in graph.outputs] for graph in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"The outputs of the student {student.name!r} have shapes {shapes[0]} and those of the teacher "
            f"{teacher.name!r} {shapes[1]} (without the batch): a teacher scores the same classes."
        )
    wanted = student.output_names if names is None else names
    places = tuple(
        k
        for k, name in enumerate(student.output_names)
        if name in wanted and (names is not None or student[student.outputs[k]].dtype == "float32")
    )
    if not places:
        raise ModelError(f"{student.name!r} returns nothing that could be compared: no output holds scores.")
    for k in places:
        name, shape = student.output_names[k], shapes[0][k]
        if not shape or (shape[-1] or 0) < 2:
            raise ModelError(
                f"The output {name!r} of {student.name!r} has shape {shape} (without the batch): distillation compares "
                "scores of two or more classes on the last axis. Name outputs to be compared in `outputs`, or train "
                "on labels instead."
            )
    return places


# --- inner tensors -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _View:
    """A model that returns inner tensors too; no Keras object, so that it is not saved as one more model."""

    model: keras.Model
    extended: bool

    def __call__(self, x: Any, training: bool) -> tuple[Any, list[Tensor]]:
        outputs = self.model(x, training=training)
        return (outputs[0], list(outputs[1])) if self.extended else (outputs, [])


def _views(student: keras.Model, teacher: keras.Model, features: Mapping[str, str]) -> tuple[_View, _View]:
    """Both models with their features, in the same order."""
    if not features:
        return _View(student, False), _View(teacher, False)
    ours = [_inner(student, "student", name) for name in features]
    theirs = [_inner(teacher, "teacher", name) for name in features.values()]
    for (a, b), f, t in zip(features.items(), ours, theirs, strict=True):
        if tuple(f.shape) != tuple(t.shape):
            raise ModelError(
                f"The feature {a!r} of the student has shape {tuple(f.shape)} and {b!r} of the teacher "
                f"{tuple(t.shape)}: pair tensors of one shape."
            )
    pairs = ((student, ours), (teacher, theirs))
    views = [_View(keras.Model(model.input, [model.output, inner]), True) for model, inner in pairs]
    return views[0], views[1]


def _inner(model: keras.Model, role: str, name: str) -> Tensor:
    """The symbolic output of a layer; of a quantized one without its grid."""
    if not hasattr(model, "operations"):
        raise ModelError(f"The {role} {model.name!r} is no functional model: features need one.")
    layers = {op.name: op for op in model.operations}
    layers |= {op.node.name: op for op in model.operations if isinstance(op, QuantizedLayer)}
    if name not in layers:
        raise ModelError(f"The {role} {model.name!r} has no layer {name!r}{suggest(name, layers)}.")
    try:
        output = layers[name].output
    except (AttributeError, ValueError) as error:
        raise ModelError(f"The layer {name!r} of the {role} is called several times: choose another one.") from error
    if isinstance(layers[name], QuantizedLayer) and isinstance(output, list | tuple):
        return output[0]
    if isinstance(output, list | tuple):
        raise ModelError(f"The layer {name!r} of the {role} has several outputs: choose another one.")
    return output
