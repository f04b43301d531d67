"""Specs of tensors and rules for layers: what is possible, what is refused, and how."""

import dataclasses

import pytest

from kquant.config.specs import ACTIVATIONS, WEIGHTS, QuantSpec, Rule, check_weights
from kquant.config.text import plain
from kquant.errors import ConfigError


def test_name_is_searched_and_type_is_matched_whole():
    assert Rule(name="v_1", float=True).matches("conv_1_relu", "ReLU")
    assert not Rule(layer_type="Conv", float=True).matches("c", "Conv2D")
    assert not Rule(name="c", position="first", float=True).matches("c", "Conv2D", last=True)


def test_an_override_to_16_bits_becomes_symmetric():
    spec = Rule(name="x", activations={"bits": 16}).apply(WEIGHTS, ACTIVATIONS)[1]
    assert spec == dataclasses.replace(ACTIVATIONS, bits=16, symmetric=True)
    assert not ACTIVATIONS.override({"bits": 16, "symmetric": False}).symmetric


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 1},
        {"bits": 17},
        {"bits": 8.0},
        {"bits": True},
        {"power_of_two": True},
        {"signed": False},
        {"narrow_range": True},
        {"symmetric": True, "signed": False, "narrow_range": True},
        {"symmetric": "yes"},
        {"percentile": 50},
        {"percentile": 101},
        {"percentile": float("nan")},
        {"method": "octav"},
        {"range": (1, 1)},
        {"range": (1, -1)},
        {"range": (0, float("inf"))},
        {"range": (float("nan"), 1)},
        {"range": (0, 1, 2)},
        {"range": (False, True)},
        {"range": ("0", "1")},
        {"range": "01"},
        {"range": 6},
    ],
)
def test_impossible_specs(settings):
    with pytest.raises(ConfigError):
        QuantSpec(**settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"name": "x"}, {"float": True}, {"name": "(", "float": True}, {"position": "third", "float": True}],
)
def test_impossible_rules(settings):
    with pytest.raises(ConfigError):
        Rule(**settings)


def test_a_range_is_a_pair_of_numbers_however_it_is_written():
    for pair in ([-1, 1], (-1, 1), (-1.0, 1.0)):
        spec = QuantSpec(range=pair)
        assert spec == QuantSpec().override({"range": pair}) and spec.range == (-1.0, 1.0)
        assert isinstance(spec.range, tuple) and all(isinstance(edge, float) for edge in spec.range)
        assert hash(spec) == hash(QuantSpec(range=(-1, 1)))
        assert Rule(name="a", activations={"range": pair}) == Rule(name="a", activations={"range": (-1, 1)})
    assert QuantSpec(range=(2, 3)).range == (2, 3)  # the grid widens it to contain 0


def test_plain_has_lists_for_tuples_at_any_depth():
    assert plain({"a": (1, 2), "b": [{"c": (3,)}], "d": None}) == {"a": [1, 2], "b": [{"c": [3]}], "d": None}


@pytest.mark.parametrize(
    "changes", [{"method": "cross_entropy"}, {"method": "batch_norm"}, {"range": (-1, 1)}], ids=lambda c: str(c)
)
def test_weights_refuse_what_only_activations_have(changes):
    check_weights(None)
    check_weights(WEIGHTS)
    with pytest.raises(ConfigError, match="min_max.*percentile.*mse"):
        check_weights(WEIGHTS.override(changes))
