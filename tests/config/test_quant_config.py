"""Settings: round trips, presets, rules and messages."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kquant.config.pruning import Prune
from kquant.config.quant_config import QuantConfig
from kquant.config.specs import ACTIVATIONS, METHODS, WEIGHTS, Rule
from kquant.errors import ConfigError
from kquant.targets.target import get_target
from tests.support.strategies import specs

RULES = st.builds(
    Rule,
    name=st.sampled_from([None, "^head", "conv.*_3$", "ä[0-9]"]),
    layer_type=st.just("Dense"),
    position=st.sampled_from([None, "first", "last"]),
    weights=st.sampled_from([None, {"bits": 4}, {"method": "mse", "percentile": 99.9}]),
    activations=st.sampled_from([None, {"method": "cross_entropy"}, {"range": (-1, 0.5)}]),
    float=st.booleans(),
)
CONFIGS = st.builds(
    QuantConfig,
    weights=st.none() | specs(weights=True),
    activations=st.none() | specs(),
    inputs=st.none() | specs(),
    target=st.sampled_from(("litert", "litert_per_tensor", "simulation")),
    keep_zeros=st.booleans(),
    widen=st.booleans(),
    channel_scales=st.booleans(),
    logits=st.sampled_from([None, *METHODS]),
    divergence=st.none() | st.floats(1e-6, 10),
    prune=st.sampled_from([None, Prune(sparsity=0.7, by="sensitivity"), Prune(pattern="2:4", keep="^head")]),
    rules=st.lists(RULES, max_size=3),
)


@given(config=CONFIGS)
def test_round_trip_is_exact(config, tmp_path_factory):
    assert QuantConfig.load(config.to_dict()) == config
    folder = tmp_path_factory.mktemp("config")
    for name in ("c.yaml", "c.yml", "c.json"):
        config.save(folder / name)
        assert QuantConfig.load(folder / name) == config
        assert QuantConfig.load(str(folder / name)) == config


@pytest.mark.parametrize("name", QuantConfig.names())
def test_preset_is_possible_on_its_target(name):
    config = QuantConfig.load(name)
    get_target(config.target).check(config)
    assert QuantConfig.from_dict(config.to_dict()) == config


def test_presets_say_what_their_name_says():
    w4a8 = QuantConfig.preset("w4a8")
    assert (w4a8.weights.bits, w4a8.weights.method, w4a8.activations) == (4, "mse", ACTIVATIONS)
    assert QuantConfig.preset("w8a8").weights == WEIGHTS and w4a8.weights.per_channel
    per_tensor = QuantConfig.preset("w8a8-per_tensor")
    assert not per_tensor.weights.per_channel and per_tensor.target == "litert_per_tensor"
    w8a16 = QuantConfig.preset("w8a16")
    assert (w8a16.activations.bits, w8a16.activations.symmetric, w8a16.target) == (16, True, "litert")
    assert QuantConfig.preset("w4").activations is None and QuantConfig.preset("w4").input_spec is None


def test_8_bits_exempt_a_layer_from_a_format_and_from_blocks():
    for preset in ("w2a8-ternary", "w1a8-binary", "w4a8-b32", "w4a8-kmeans"):
        config = QuantConfig.load({"preset": preset, "rules": [{"name": "^head$", "weights": {"bits": 8}}]})
        head, other = (config.resolve(name, "Dense").weights for name in ("head", "body"))
        assert (head.bits, head.format, head.block) == (8, "uniform", None)
        assert (other.bits, other.format, other.block) == (
            config.weights.bits,
            config.weights.format,
            config.weights.block,
        )
    with pytest.raises(ConfigError, match="must be 2, found 3"):
        QuantConfig.load({"preset": "w2a8-ternary", "rules": [{"name": "^head$", "weights": {"bits": 3}}]})


def test_below_8_bits_inputs_and_ends_stay_at_8():
    config = QuantConfig.preset("w4a4")
    assert config.input_spec.bits == 8 and config.activations.method == "mse"
    assert QuantConfig.preset("a4").activations.method == "mse"
    assert {QuantConfig.preset(p).activations.method for p in ("w4a8", "w8a16", "a8")} == {"auto"}
    first, middle, last = (config.resolve("x", "Conv2D", first=i == 0, last=i == 2) for i in range(3))
    assert [s.weights.bits for s in (first, middle, last)] == [8, 4, 8]
    assert [s.activations.bits for s in (first, middle, last)] == [4, 4, 8]


@pytest.mark.parametrize("name", ["w8b8", "8a8", "w1a8", "w17", "w8a8-per_channel", "w4a1", ""])
def test_no_such_preset(name):
    with pytest.raises(ConfigError):
        QuantConfig.preset(name)


def test_later_rules_win_and_are_named():
    config = QuantConfig(
        rules=(
            Rule(layer_type="Conv2D|Dense", weights={"bits": 4}, float=True),
            Rule(name="head", weights={"bits": 6}),
            Rule(name="^head$", float=False),
        )
    )
    conv, head, other = config.resolve("conv", "Conv2D"), config.resolve("head", "Dense"), config.resolve("a", "Add")
    assert (conv.weights.bits, conv.float, conv.matched) == (4, True, (0,))
    assert (head.weights.bits, head.float, head.matched) == (6, False, (0, 1, 2))
    assert (other.weights, other.float, other.matched, other.reason) == (WEIGHTS, False, (), "")
    assert "rule 1" in head.reason and "'head'" in head.reason


def test_dict_changes_a_preset():
    config = QuantConfig.load(
        {"preset": "w4a4", "weights": {"method": "min_max"}, "rules": [{"name": "a", "float": True}]}
    )
    base = QuantConfig.preset("w4a4")
    assert config.weights == dataclasses.replace(base.weights, method="min_max")
    assert config.rules == (*base.rules, Rule(name="a", float=True))
    assert config.activations == base.activations


def test_rules_that_match_nothing_are_listed_with_suggestions():
    rules = (Rule(name="^hed$", float=True), Rule(layer_type="Conv", float=True), Rule(name="conv", float=True))
    config = QuantConfig(rules=(*rules, Rule(position="first", float=True)))
    with pytest.raises(ConfigError) as error:
        config.check_matched([2], ["head", "conv_1"], ["Conv2D", "Dense"])
    text = str(error.value)
    assert "'head'" in text and "'Conv2D'" in text and "rule 0" in text and "rule 1" in text
    assert "rule 2" not in text and "rule 3" not in text
    config.check_matched([0, 1, 2], ["head"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"weigths": {}}, "weights"),
        ({"weights": {"bit": 8}}, "bits"),
        ({"rules": [{"nam": "x", "float": True}]}, "name"),
        ({"rules": [{"name": "x", "weights": {"simmetric": True}}]}, "symmetric"),
        ({"weights": {"method": "mse2"}}, "mse"),
        ({"logits": "crossentropy"}, "cross_entropy"),
        ({"preset": "w8a8-per_tenser"}, "w8a8-per_tensor"),
    ],
)
def test_misspelled_settings_get_the_right_spelling(values, said):
    with pytest.raises(ConfigError, match=f"did you mean.*'{said}'"):
        QuantConfig.from_dict(values)


def test_a_rule_that_cannot_be_applied_is_named():
    with pytest.raises(ConfigError, match="rule 0.*conv.*narrow_range"):
        QuantConfig(rules=(Rule(name="conv", activations={"narrow_range": True}),))


@pytest.mark.parametrize(
    "values",
    [
        {"weights": {"method": "cross_entropy"}},
        {"weights": {"range": [-1, 1]}},
        {"rules": [{"name": "head", "weights": {"method": "batch_norm"}}]},
    ],
)
def test_weights_have_no_method_of_activations(values):
    with pytest.raises(ConfigError, match="min_max.*percentile.*mse") as error:
        QuantConfig.from_dict(values)
    assert "rules" not in values or "rule 0" in str(error.value)


def test_inputs_with_a_fixed_range_keep_the_other_settings():
    config = QuantConfig.from_dict({"preset": "w4a4", "inputs": {"range": [-1, 1]}})
    assert config.input_spec == dataclasses.replace(config.activations, bits=8, range=(-1, 1))
    assert config.to_dict()["inputs"]["range"] == [-1, 1]


@pytest.mark.parametrize("source", [5, None, ["w8a8"], {"rules": {"name": "x"}}, {"weights": 8}, {"logits": 8}])
def test_not_a_config(source):
    with pytest.raises(ConfigError):
        QuantConfig.load(source)


def test_unreadable_files(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- 1")
    for name in ("bad.json", "bad.yaml", "list.yaml", "missing.yaml"):
        with pytest.raises(ConfigError):
            QuantConfig.load(tmp_path / name)
    with pytest.raises(ConfigError):
        QuantConfig().save(tmp_path / "c.txt")
