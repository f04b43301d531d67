"""A graph for training: deployed it is the usual one, and in training it computes what the user's model does."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from kquant.graph.ops import evaluate
from kquant.graph.transforms import prepare_graph
from kquant.graph.transforms.absorb_bias import absorb_bias
from kquant.graph.transforms.equalize import equalize
from kquant.graph.transforms.training import in_training, without_train_only
from tests.support import zoo
from tests.support.train_only import Shifted, StochasticDepth


def frozen_norm(name: str) -> Any:
    """A batch normalization at its running statistics, in training too."""
    layer = layers.BatchNormalization(name=name)
    layer.trainable = False
    return layer


def between_everything() -> keras.Model:
    """Between an operation and its normalization, its activation, a reshape, and in front of a rescaling."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 3))
    x = Shifted(0.5, 20.0)(layers.Rescaling(1 / 255.0)(Shifted(0.9, 3.0)(x)))
    x = Shifted()(layers.Conv2D(4, 3, use_bias=False, activity_regularizer="l2", name="conv")(x))
    x = layers.ReLU()(Shifted(2.0, -0.5)(frozen_norm("norm")(x)))
    x = Shifted(0.7, 0.1)(layers.Reshape((36, 4))(x))
    x = layers.ReLU(2.0)(Shifted(1.2, 0.3)(layers.Conv1D(5, 3, name="sequence")(Shifted(1.1, 0.2)(x))))
    x = layers.Dropout(0.3, seed=3)(layers.Conv1D(4, 3, name="second")(x))
    x = layers.Add()([layers.ReLU()(x), StochasticDepth()(layers.Conv1D(4, 3, padding="same")(layers.ReLU()(x)))])
    model = keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Flatten()(x)))
    zoo.randomize(model)
    return model


def seeded(model: keras.Model) -> None:
    """Start the generators of a model where `in_training` starts its own: anywhere, but at the same place."""
    for layer in model._flatten_layers():
        for generator in vars(layer).get("_seed_generators", ()):
            generator.state.assign([11, 0])


def test_what_is_deployed_is_the_graph_of_inference() -> None:
    model = between_everything()
    plain, found = prepare_graph(model), without_train_only(prepare_graph(model, for_training=True))
    facts = [{n.name: (n.op, n.inputs, n.shape, n.attrs.get("clip")) for n in g} for g in (plain, found)]
    assert facts[0] == facts[1] and plain.outputs == found.outputs
    for node in plain:
        for key, value in node.weights.items():
            np.testing.assert_array_equal(value, found[node.name].weights[key])
    assert not any(n.user or n.between or n.op == "train_only" for n in plain)


@pytest.mark.parametrize("equalized", [False, True])
def test_in_training_it_computes_what_the_model_does(equalized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was folded, fused, moved and scaled in between."""
    monkeypatch.setattr("kquant.graph.transforms.training._seed_of", lambda number: 11)
    model, x = between_everything(), np.random.default_rng(0).uniform(0, 255, (16, 8, 8, 3)).astype(np.float32)
    graph = prepare_graph(model, for_training=True)
    if equalized:
        graph, report = equalize(graph)
        assert any(np.ptp(scale) > 0 for scale in report.scales.values())
    seeded(model)
    (found,), expected = evaluate(in_training(graph), [x]), model(x, training=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(model(x, training=False) - expected).max() > 0.1
    np.testing.assert_allclose(evaluate(graph, [x])[0], model(x, training=False), rtol=1e-4, atol=1e-5)


def test_dropout_goes_behind_a_relu_and_noise_does_not() -> None:
    x = keras.Input((4,))
    y = layers.ReLU()(layers.Dropout(0.5)(layers.Dense(3, name="dropped")(x)))
    y = layers.ReLU()(layers.GaussianNoise(0.5)(layers.Dense(3, name="noisy")(y)))
    y = layers.ReLU(6.0)(layers.Dropout(0.5)(layers.Dense(3, name="capped")(y)))
    graph = prepare_graph(keras.Model(x, y), for_training=True)
    assert [len(graph[name].between) for name in ("dropped", "noisy", "capped")] == [0, 1, 1]
    assert [n.op for n in graph] == ["input", "dense", "train_only", "dense", "dense"]


def test_it_sees_the_users_values_where_a_bias_was_absorbed() -> None:
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6,))
    x = layers.ReLU()(layers.BatchNormalization(name="norm", trainable=False)(layers.Dense(5, name="first")(x)))
    model = keras.Model(inputs, layers.Dense(3)(Shifted(0.5, 1.0)(layers.Reshape((5,))(x))))
    model.get_layer("norm").beta.assign(np.linspace(5.0, 9.0, 5))
    graph, report = absorb_bias(prepare_graph(model, for_training=True))
    assert report.absorbed["first"].any()
    data = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    for found, training in ((in_training(graph), True), (graph, False)):
        np.testing.assert_allclose(evaluate(found, [data])[0], model(data, training=training), rtol=1e-4, atol=1e-4)
