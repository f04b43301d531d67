"""Targets: the measured table, and what is refused."""

from dataclasses import replace

import keras
import numpy as np
import pytest

import kquant
from kquant.config.quant_config import QuantConfig
from kquant.config.specs import QuantSpec, Rule
from kquant.errors import ConfigError
from kquant.graph.ir import Node
from kquant.targets.litert.flatbuffer import read_tensors
from kquant.targets.litert.target import LITERT, LITERT_PER_TENSOR, SIMULATION
from kquant.targets.target import get_target, register_target

TARGETS = (LITERT, LITERT_PER_TENSOR, SIMULATION)
SYMMETRIC = QuantSpec(symmetric=True)
EIGHT = replace(LITERT, activation_bits=(8,))


def test_names_find_targets():
    assert all(get_target(target.name) is target for target in TARGETS)
    with pytest.raises(ConfigError, match="did you mean 'litert'"):
        get_target("literat")


@pytest.mark.parametrize(
    ("old", "target"),
    [("tflite_int8", LITERT), ("tflite_int16x8", LITERT), ("tflite_int8_per_tensor", LITERT_PER_TENSOR)],
)
def test_names_of_before_are_found(old, target):
    assert get_target(old) is target


@pytest.mark.parametrize(("bits", "container"), [(2, 8), (4, 8), (8, 8), (9, 16), (16, 16)])
def test_activation_containers(bits, container):
    assert LITERT.container_bits(bits) == container


@pytest.mark.parametrize(
    ("op", "bits", "activations", "container"),
    [
        ("conv2d", 4, 8, 4),
        ("conv2d", 2, 8, 4),
        ("conv2d", 5, 8, 8),
        ("conv2d", 4, 16, 4),
        ("depthwise_conv2d", 3, 8, 4),
        ("depthwise_conv2d", 3, 16, 8),  # the kernel accepts int4 and is silently wrong
        ("dense", 2, 8, 2),
        ("dense", 3, 8, 4),
        ("dense", 2, 16, 4),
        ("dense", 8, 8, 8),
        ("affine", 4, 8, 8),
        ("conv2d_transpose", 4, 8, 8),
        ("embedding", 4, 8, 8),
        ("prelu", 2, 8, 8),
    ],
)
def test_weight_containers(op, bits, activations, container):
    node = Node(name="n", op=op)
    assert LITERT.weight_container(node, bits, activations) == container


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_fixed_outputs_cover_the_functions_values(target):
    for op, low, high in (("softmax", 0, 1), ("logistic", 0, 1), ("tanh", -1, 1)):
        for container in (8, 16):
            scale, zero_point = target.fixed_output(op, container)
            half = 2 ** (container - 1)
            assert scale * (-half - zero_point) <= low and scale * (half - zero_point) == pytest.approx(high)
    assert target.fixed_output("conv2d", 8) is None


def test_operations_without_kernel():
    assert LITERT.float_only("float", 8) and LITERT.float_only("float", 16)
    for op in ("gelu", "elu", "hard_swish", "prelu"):
        assert LITERT.float_only(op, 16) and not LITERT.float_only(op, 8)
    assert not LITERT.float_only("conv2d", 16)


@pytest.mark.parametrize(
    ("target", "config", "said"),
    [
        (LITERT, QuantConfig(weights=QuantSpec()), "symmetric=True"),
        (LITERT, QuantConfig(weights=QuantSpec(symmetric=True, signed=False)), "signed=True"),
        (LITERT, QuantConfig(weights=QuantSpec(symmetric=True, bits=12)), "bits=8"),
        (LITERT_PER_TENSOR, QuantConfig(), "per_channel=False"),
        (LITERT, QuantConfig(activations=QuantSpec(bits=16)), "symmetric=True"),
        (replace(LITERT, activation_bits=(16,)), QuantConfig(), "bits=16"),
        (EIGHT, QuantConfig(activations=QuantSpec(bits=16, symmetric=True)), "bits=8"),
        (LITERT, QuantConfig(activations=QuantSpec(per_channel=True)), "per_channel=False"),
        (EIGHT, QuantConfig(inputs=QuantSpec(bits=16, symmetric=True)), "inputs"),
        (LITERT, QuantConfig(rules=(Rule(name="head", weights={"bits": 10}),)), "rule 0.*head"),
    ],
)
def test_impossible_combinations_are_refused_with_the_remedy(target, config, said):
    with pytest.raises(ConfigError, match=said):
        target.check(config)


def test_possible_combinations_pass():
    EIGHT.check(QuantConfig(rules=(Rule(name="head", activations={"bits": 16}),)))
    LITERT.check(QuantConfig(weights=None, activations=None))
    LITERT.check(QuantConfig(activations=QuantSpec(symmetric=True, signed=False)))
    LITERT.check(QuantConfig(activations=QuantSpec(bits=12, symmetric=True)))
    LITERT_PER_TENSOR.check(QuantConfig(weights=SYMMETRIC))


def test_a_target_of_ones_own_quantizes_and_exports():
    """A device like LiteRT's, with int8 containers for all weights and no kernel for an addition."""
    kernels = {**LITERT.kernels, "add": replace(LITERT.kernels["add"], arithmetic={})}
    mine = register_target(replace(LITERT, name="mine", kernels=kernels, packed_weights=False))
    assert get_target("mine") is mine and get_target("litert") is LITERT
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="conv")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(5, name="head")(keras.layers.Add(name="sum")([x, x])))
    data = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
    found = {}
    for name in ("litert", "mine"):
        quantized = kquant.quantize_model(model, data, {"preset": "w4a8", "target": name}, progress=False)
        file = kquant.export_tflite(quantized)
        tensors = read_tensors(file.content)
        found[name] = tensors["conv/kernel"].type, tensors["sum"].type
        assert quantized.target.name == name
        assert kquant.verify_tflite(quantized, file.content, data).ok
    assert found == {"litert": ("INT4", "INT8"), "mine": ("INT8", "FLOAT32")}


def test_only_targets_are_registered():
    with pytest.raises(TypeError, match="kquant.Target"):
        register_target("litert")
