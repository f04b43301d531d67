"""The plan: what runs in integers, on which grid, and why not."""

import keras
import pytest
from keras import layers

from kquant.config.quant_config import QuantConfig
from kquant.errors import ConfigError
from kquant.graph.ir import Node
from kquant.graph.transforms import prepare_graph
from kquant.quantize.plan import make_plan
from tests.support.toy import config, toy_graph


def test_every_tensor_has_a_spec_or_a_reason():
    plan = make_plan(toy_graph(), config())
    assert set(plan.activations) == set(plan.graph.nodes)
    assert not plan.skipped
    assert set(plan.weights) == {"c1", "dw", "fc"}


def test_pooling_shares_the_grid_of_the_concatenation_and_its_sole_consumed_input():
    plan = make_plan(toy_graph(), config())
    # "add" has one reader, so it takes the concatenation's grid; "dw" has two, so it is requantized
    assert plan.groups["add"] == plan.groups["cat"] == plan.groups["pool"] == plan.groups["dw/requantize"]
    assert plan.groups["dw"] == "dw"
    assert plan.graph["cat"].inputs == ("add", "dw/requantize")
    assert plan.observed[plan.groups["cat"]] == ("cat",)


def test_softmax_has_the_grid_that_the_kernel_insists_on():
    for name, scale, zero_point in (("w8a8", 1 / 256, -128), ("w8a16", 1 / 32768, 0)):
        grid = make_plan(toy_graph(), config(name)).fixed["sm"]
        assert (float(grid.scale), int(grid.zero_point)) == (scale, zero_point)


def test_a_float_layer_is_fenced_by_requantization():
    plan = make_plan(toy_graph(), config(rules=[{"name": "^dw$", "float": True}]))
    assert [s.node for s in plan.skipped] == ["dw"]
    assert "dw" in plan.skipped[0].reason
    assert "dw" not in plan.activations and "dw" not in plan.weights
    assert {plan.graph[i].op for i in plan.graph["add"].inputs} == {"conv2d", "requantize"}


def test_same_scale_operations_follow_a_float_input():
    plan = make_plan(toy_graph(), config(rules=[{"name": "^cat$", "float": True}]))
    assert {s.node for s in plan.skipped} == {"cat", "pool"}
    assert plan.graph["mean"].inputs == ("pool/requantize",)


def test_a_16_bit_layer_among_8_bit_ones_is_requantized_at_both_ends():
    wide = {"bits": 16, "symmetric": True}
    plan = make_plan(toy_graph(), config(rules=[{"name": "^fc$", "activations": wide}]))
    assert plan.graph["fc"].inputs == ("mean/requantize",)
    assert plan.activations["mean/requantize"].bits == 16
    assert plan.graph["sm"].inputs == ("fc/requantize",)
    assert plan.activations["fc/requantize"].bits == 8


def test_two_readers_share_one_requantization():
    graph = toy_graph()
    extra = Node(name="fc2", op="dense", inputs=("mean",), shape=(None, 5), weights=graph["fc"].weights, origin="fc2")
    nodes = [*graph.nodes.values(), extra]
    graph = type(graph)({n.name: n for n in nodes}, ("in",), ("sm", "fc2"), ("x",), ("y", "z"))
    wide = {"bits": 16, "symmetric": True}
    plan = make_plan(graph, config(rules=[{"name": "^fc", "activations": wide}]))
    assert plan.graph["fc"].inputs == plan.graph["fc2"].inputs == ("mean/requantize",)


def test_weight_only_leaves_every_activation_float():
    plan = make_plan(toy_graph(), config("w8"))
    assert not plan.activations and not plan.observed
    assert set(plan.weights) == {"c1", "dw", "fc"}


def test_first_and_last_layers_by_position():
    plan = make_plan(toy_graph(), config("w4a8", rules=[{"position": "first", "weights": {"bits": 8}}]))
    assert [plan.weights[n].bits for n in ("c1", "dw", "fc")] == [8, 4, 4]


def test_a_rule_that_matches_nothing_is_an_error_with_a_suggestion():
    with pytest.raises(ConfigError, match="c1"):
        make_plan(toy_graph(), config(rules=[{"name": "^c1x$", "float": True}]))


def test_a_last_layer_is_small_with_less_than_a_tenth_of_the_weights() -> None:
    """Presets with a format leave it, the first layer and depthwise ones at 8 bits."""

    def specs(width: int):
        keras.utils.set_random_seed(0)
        x = inputs = keras.Input((8, 8, 3))
        x = layers.Conv2D(16, 3, name="first")(x)
        x = layers.SeparableConv2D(32, 3, name="separable")(x)
        x = layers.Dense(width, name="last")(layers.Dense(64, name="middle")(layers.Flatten()(x)))
        return make_plan(prepare_graph(keras.Model(inputs, x)), QuantConfig.preset("w2a8-ternary")).weights

    for width, small in ((10, True), (900, False)):
        found = specs(width)
        assert {found[n].bits for n in found if "first" in n} == {8}
        assert (found["middle"].format, found["middle"].bits) == ("ternary", 2)
        assert found["last"].bits == (8 if small else 2)
        assert sorted(s.bits for n, s in found.items() if "separable" in n) == [2, 8]
