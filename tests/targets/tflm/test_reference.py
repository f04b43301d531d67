"""The numpy kernels against the interpreter of the package tflite-micro, operator by operator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kquant.targets.litert import kernels as litert
from kquant.targets.litert.reference.interpreter import IntegerReference
from kquant.targets.tflm.kernels import REFERENCE
from kquant.targets.tflm.runtime import MicroModel
from tests.targets.litert.cases import (
    Case,
    Rng,
    binary,
    concat,
    conv,
    depthwise,
    extremum,
    fully_connected,
    mean,
    moves,
    pool,
    prelu,
    quantize,
    resize,
    rsqrt,
    softmax,
    transpose_conv,
    unary,
)

pytest.importorskip("tflite_micro", reason="tflite-micro is not installed: pip install .[tflm]")
OUTPUTS = 10_000  # compared per case


def slope(rng: Rng) -> float:
    return float(rng.uniform(0.01, 0.6))


# what LiteRT's reference kernels compute otherwise
DIFFERENT: dict[str, Callable[[Rng], Case]] = {
    "fully connected": fully_connected(),
    "fully connected per tensor": fully_connected(per_channel=False, keep=False),
    "fully connected int16": fully_connected("INT16"),
    "mul int16": binary("MUL", "INT16", constant=True),
    "relu int16": unary("RELU", "INT16", version=3),
    "relu6": unary("RELU6", version=2),
    "relu6 int16": unary("RELU6", "INT16", version=3),
    "leaky relu int16": unary("LEAKY_RELU", "INT16", "LeakyReluOptions", 2, alpha=slope),
    "softmax int16": softmax("INT16"),
    "rsqrt int16": rsqrt("INT16"),
}
SAME: dict[str, Callable[[Rng], Case]] = {
    "rsqrt": rsqrt(),
    "conv": conv(),
    "conv grouped": conv(groups=3),
    "conv int4": conv(bits=4),
    "conv int16": conv("INT16"),
    "depthwise": depthwise(),
    "depthwise int4": depthwise(bits=4),
    "depthwise int16": depthwise("INT16"),
    "transpose conv": transpose_conv(),
    "transpose conv int16": transpose_conv("INT16"),
    "add": binary("ADD", constant=True),
    "add int16": binary("ADD", "INT16", constant=True),
    "sub": binary("SUB", constant=True),
    "sub int16": binary("SUB", "INT16", constant=True),
    "mul": binary("MUL", constant=True),
    "maximum": extremum("MAXIMUM"),
    "minimum int16": extremum("MINIMUM", "INT16"),
    "relu": unary("RELU", version=2),
    "leaky relu": unary("LEAKY_RELU", "INT8", "LeakyReluOptions", 2, alpha=slope),
    "prelu": prelu,
    "logistic": unary("LOGISTIC", version=2, out=(1 / 256, -128)),
    "logistic int16": unary("LOGISTIC", "INT16", version=3, out=(1 / 32768, 0)),
    "tanh": unary("TANH", version=2, out=(1 / 128, 0)),
    "tanh int16": unary("TANH", "INT16", version=3, out=(1 / 32768, 0)),
    "hard swish": unary("HARD_SWISH", "INT8", "HardSwishOptions"),
    "elu": unary("ELU"),
    "softmax": softmax(),
    "softmax 1000": softmax(classes=1000),
    "mean": mean(),
    "mean rows": mean(axes=(1,)),
    "mean int16": mean("INT16"),
    "max pool": pool("MAX_POOL_2D"),
    "average pool": pool("AVERAGE_POOL_2D"),
    "average pool int16": pool("AVERAGE_POOL_2D", "INT16"),
    "resize bilinear": resize("RESIZE_BILINEAR"),
    "resize nearest": resize("RESIZE_NEAREST_NEIGHBOR"),
    "concatenation": concat,
    "quantize": quantize("INT8", "INT8"),
    "quantize to int16": quantize("INT8", "INT16"),
    "quantize to int8": quantize("INT16", "INT8"),
    "quantize float": quantize("FLOAT32", "INT8"),
}
MOVES = tuple(n for n in moves(np.random.default_rng(0)) if n != "strided slice masked")  # new axes are refused


def compare(case: Callable[[Rng], Case], outputs: int = OUTPUTS) -> None:
    compared, seed = 0, 0
    while compared < outputs:
        model, inputs = case(np.random.default_rng(seed))
        expected = MicroModel(model).run(inputs)[0]
        found = IntegerReference(model, kernels=REFERENCE).run(inputs)["y"]
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected, err_msg=f"seed {seed}")
        compared, seed = compared + expected.size, seed + 1


@pytest.mark.parametrize("name", [*SAME, *DIFFERENT])
def test_equals_the_interpreter(name: str) -> None:
    compare({**SAME, **DIFFERENT}[name])


@pytest.mark.parametrize("name", MOVES)
def test_moves_equal_the_interpreter(name: str) -> None:
    compare(lambda rng: moves(rng)[name], 1000)


@pytest.mark.parametrize("name", DIFFERENT)
def test_litert_computes_something_else(name: str) -> None:
    differ = 0
    for seed in range(12):
        model, inputs = DIFFERENT[name](np.random.default_rng(seed))
        ours, theirs = (IntegerReference(model, kernels=k).run(inputs)["y"] for k in (REFERENCE, litert.REFERENCE))
        differ += int(np.sum(ours != theirs))
    assert differ
