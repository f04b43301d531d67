"""What decides an output, and more bits for it."""

import keras
import numpy as np
import pytest

import kquant
from kquant.graph.decisions import at_outputs, decisive
from kquant.graph.transforms.prepare import prepare_graph
from kquant.keras.model import extract
from kquant.targets.litert.flatbuffer import only_integer_ops

layers = keras.layers
DATA = np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype(np.float32)


def two_tasks() -> keras.Model:
    """A mask of enlarged logits, and boxes beside scores."""
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="body")(image)
    logits = layers.Resizing(16, 16, interpolation="bilinear")(layers.Conv2D(4, 1, name="classes")(x))
    boxes = layers.Reshape((-1, 4))(layers.Conv2D(4, 3, name="boxes")(x))
    scores = layers.Activation("sigmoid")(layers.Conv2D(2, 3, name="scores")(x))
    return keras.Model(image, [keras.ops.argmax(logits, -1), boxes, scores])


def classifier() -> keras.Model:
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(5, "softmax", name="top")(layers.Flatten()(x)))


def origins(model: keras.Model) -> list[str | None]:
    graph = prepare_graph(model)
    return [graph[name].origin for name in decisive(graph)]


def test_it_is_behind_what_moves_squashes_or_chooses() -> None:
    assert origins(two_tasks()) == ["classes", "boxes", "scores"]
    assert origins(classifier()) == ["top"]
    inputs = keras.Input((3,))
    assert len(origins(keras.Model(inputs, [inputs, layers.ReLU()(inputs)]))) == 2


@pytest.mark.parametrize(("make", "bits"), [(two_tasks, 16), (classifier, 16), (classifier, 4)])
def test_a_rule_gives_their_bits_to_them_alone(make, bits) -> None:
    model = make()
    config = {"preset": "w8a8", "rules": [{"position": "outputs", "activations": {"bits": bits}}]}
    qmodel = kquant.quantize_model(model, DATA, config, progress=False)
    qgraph = extract(qmodel)
    graph, found = qgraph.graph, {n: q.bits for n, q in qgraph.activations.items() if q is not None}
    assert {found[name] for name in decisive(graph)} == {bits}
    of_probabilities = max(bits, 8)
    assert {found[name] for name in at_outputs(graph) & found.keys()} == {bits, of_probabilities}
    assert {found[n.name] for n in graph if n.name not in at_outputs(graph) and n.op != "requantize"} == {8}
    content = kquant.export_tflite(qmodel, allow_float=False).content
    assert only_integer_ops(content)
    assert kquant.verify_tflite(qmodel, content, DATA[:8]).ok


@pytest.mark.slow
def test_16_bits_bring_outputs_nearer() -> None:
    model = two_tasks()
    rule = {"position": "outputs", "activations": {"bits": 16}}
    wanted = model.predict(DATA, verbose=0)[1]

    def error(config: object) -> float:
        found = kquant.quantize_model(model, DATA, config, progress=False).predict(DATA, verbose=0)[1]
        return float(np.square(found - wanted).mean())

    assert error({"preset": "w8a8", "rules": [rule]}) < error("w8a8")
