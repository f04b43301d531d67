"""The integer reference against LiteRT's own kernels, operator by operator and on published models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from kquant.errors import ExportError
from kquant.targets.builtin import Reference
from kquant.targets.litert.kernels import OPTIMIZED, REFERENCE
from kquant.targets.litert.reference.interpreter import IntegerReference
from tests.support.litert_files import Op, Resolver, T, build, run
from tests.targets.litert.cases import (
    Case,
    Rng,
    act,
    binary,
    concat,
    conv,
    depthwise,
    dequantize,
    extremum,
    fully_connected,
    ints,
    like,
    mean,
    moves,
    one,
    pack,
    pool,
    pot_int16,
    prelu,
    quantize,
    resize,
    rsqrt,
    softmax,
    transpose_conv,
    unary,
    weights,
)

OUTPUTS = 20_000  # compared per case
DATA = Path(os.environ.get("KQUANT_DATA", "../shared/data")) / "tflite_reference"
PUBLISHED = ("kws_ref_model", "pretrainedResnet_quant", "mobilenet_v2_1.0_ptq")


def slope(rng: Rng) -> float:
    return float(rng.uniform(0.01, 0.6))


CASES: dict[str, Callable[[Rng], Case]] = {
    "rsqrt": rsqrt(),
    "rsqrt int16": rsqrt("INT16"),
    "conv": conv(),
    "conv per tensor": conv(per_channel=False),
    "conv grouped": conv(groups=3),
    "conv int4": conv(bits=4),
    "conv int16": conv("INT16"),
    "conv int16 x int4": conv("INT16", 4),
    "depthwise": depthwise(),
    "depthwise int16": depthwise("INT16"),
    "depthwise int4 as version 3": depthwise(bits=4, version=3),
    "transpose conv": transpose_conv(),
    "transpose conv without bias": transpose_conv(biased=False),
    "transpose conv int16": transpose_conv("INT16"),
    "fully connected": fully_connected(),
    "fully connected per tensor": fully_connected(per_channel=False),
    "fully connected flattened": fully_connected(per_channel=False, keep=False),
    "fully connected int4": fully_connected(bits=4),
    "fully connected int2": fully_connected(bits=2),
    "fully connected int16": fully_connected("INT16"),
    "fully connected int16 per tensor": fully_connected("INT16", per_channel=False),
    "fully connected int16 x int4": fully_connected("INT16", 4),
    "maximum": extremum("MAXIMUM"),
    "minimum int16": extremum("MINIMUM", "INT16"),
    "relu": unary("RELU", version=2),
    "relu6": unary("RELU6", version=2),
    "relu n1 to 1": unary("RELU_N1_TO_1"),
    "relu 0 to 1": unary("RELU_0_TO_1"),
    "relu int16": unary("RELU", "INT16", version=3),
    "leaky relu": unary("LEAKY_RELU", "INT8", "LeakyReluOptions", 2, alpha=slope),
    "leaky relu int16": unary("LEAKY_RELU", "INT16", "LeakyReluOptions", 2, alpha=slope),
    "prelu": prelu,
    "logistic": unary("LOGISTIC", version=2, out=(1 / 256, -128)),
    "logistic int16": unary("LOGISTIC", "INT16", version=3, out=(1 / 32768, 0)),
    "logistic int16 power of two": pot_int16("LOGISTIC", -12, (1 / 32768, 0)),
    "logistic int16 wide power of two": pot_int16("LOGISTIC", -11, (1 / 32768, 0)),
    "tanh": unary("TANH", version=2, out=(1 / 128, 0)),
    "tanh int16": unary("TANH", "INT16", version=3, out=(1 / 32768, 0)),
    "tanh int16 power of two": pot_int16("TANH", -12, (1 / 32768, 0)),
    "tanh int16 wide power of two": pot_int16("TANH", -11, (1 / 32768, 0)),
    "hard swish": unary("HARD_SWISH", "INT8", "HardSwishOptions"),
    "gelu": unary("GELU", "INT8", "GeluOptions", 2),
    "gelu approximate": unary("GELU", "INT8", "GeluOptions", 2, approximate=True),
    "softmax": softmax(),
    "softmax 1000": softmax(classes=1000),
    "softmax int16": softmax("INT16"),
    "softmax int16 100": softmax("INT16", 100),
    "mean": mean(),
    "mean flattened": mean(keep=False),
    "mean same grid": mean(same=True),
    "mean same grid flattened": mean(same=True, keep=False),
    "mean channels": mean(axes=(3,)),
    "mean rows": mean(axes=(1,)),
    "mean int16": mean("INT16"),
    "max pool": pool("MAX_POOL_2D"),
    "max pool int16": pool("MAX_POOL_2D", "INT16"),
    "average pool": pool("AVERAGE_POOL_2D"),
    "average pool int16": pool("AVERAGE_POOL_2D", "INT16"),
    "resize bilinear": resize("RESIZE_BILINEAR"),
    "resize bilinear int16": resize("RESIZE_BILINEAR", "INT16"),
    "resize nearest": resize("RESIZE_NEAREST_NEIGHBOR"),
    "concatenation": concat,
    "pack": pack,
    **{
        f"{code.lower()} {kind.lower()}{' constant' if constant else ''}": binary(code, kind, constant)
        for code, kind, constant in product(("ADD", "SUB", "MUL"), ("INT8", "INT16"), (False, True))
    },
    **{
        f"quantize {a} to {b}": quantize(a, b)
        for a, b in product(("INT8", "INT16", "UINT8", "FLOAT32"), ("INT8", "INT16", "UINT8"))
        if (a, b) not in {("UINT8", "UINT8"), ("UINT8", "INT16"), ("INT16", "UINT8")}
    },
    **{f"dequantize {kind}": dequantize(kind) for kind in ("INT8", "INT16", "UINT8")},
}


def drawn(case: Callable[[Rng], Case]) -> Iterator[tuple[int, bytes, list[np.ndarray]]]:
    """Seeds and their cases, until enough outputs were asked for (the consumer stops)."""
    for seed in range(1000):
        yield (seed, *case(np.random.default_rng(seed)))


def assert_equal(
    case: Callable[[Rng], Case], kernels: Mapping[str, Reference], resolver: object, outputs: int = OUTPUTS
) -> None:
    compared = 0
    for seed, model, inputs in drawn(case):
        expected = run(model, inputs, resolver)["y"]
        found = IntegerReference(model, kernels=kernels).run(inputs)["y"]
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected, err_msg=f"seed {seed}")
        compared += expected.size
        if compared >= outputs:
            return


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_kernels(name: str) -> None:
    assert_equal(CASES[name], REFERENCE, Resolver.BUILTIN_REF)


@pytest.mark.parametrize("name", moves(np.random.default_rng(0)))
def test_moves_equal_the_reference_kernels(name: str) -> None:
    assert_equal(lambda rng: moves(rng)[name], REFERENCE, Resolver.BUILTIN_REF, 1000)


@pytest.mark.parametrize(
    "case",
    [
        *(conv(), conv(groups=3), conv(bits=4), conv("INT16"), depthwise(), depthwise(bits=4), depthwise("INT16")),
        *(fully_connected(), fully_connected(bits=4), fully_connected("INT16"), mean(), mean(same=True), mean("INT16")),
        *(mean(keep=False), quantize("INT8", "INT8"), quantize("INT8", "UINT8"), quantize("FLOAT32", "INT8")),
        *(quantize("INT8", "INT16"), binary("ADD"), binary("MUL", "INT16"), unary("ELU"), softmax(), softmax("INT16")),
    ],
)
def test_equals_the_optimized_kernels(case: Callable[[Rng], Case]) -> None:
    assert_equal(case, OPTIMIZED, Resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES, 10_000)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_published_models(name: str) -> None:
    path = DATA / f"{name}.tflite"
    if not path.exists():
        pytest.skip("KQUANT_DATA does not name a folder with the published .tflite files")
    reference = IntegerReference(path)
    rng = np.random.default_rng(0)
    feeds = [
        rng.integers(np.iinfo(t.dtype).min, np.iinfo(t.dtype).max + 1, t.shape).astype(t.dtype)
        for t in reference.program.inputs
    ]
    expected = run(path.read_bytes(), feeds)
    found = reference.run(feeds)
    assert {t.name for op in reference.operators for t in op.outputs} <= expected.keys()
    for tensor, value in found.items():
        np.testing.assert_array_equal(value, expected[tensor], err_msg=tensor)
    for op in reference.operators:  # fed the interpreter's own integers
        for tensor, value in reference.run_op(op.index, expected).items():
            np.testing.assert_array_equal(value, expected[tensor], err_msg=str(op))


def two_ops() -> bytes:
    rng = np.random.default_rng(3)
    a, w = act(rng, "a", (1, 4, 4, 3)), weights(rng, (5, 1, 1, 3), 8, 0)
    b = T("b", (5,), "INT32", np.float32(a.scale) * w.scale, 0, 0, np.arange(5, dtype=np.int32))
    c = act(rng, "c", (1, 4, 4, 5))
    ops = [
        Op("CONV_2D", ["a", "w", "b"], ["c"], "Conv2DOptions", {"strideH": 1, "strideW": 1}, 3),
        Op("SOFTMAX", ["c"], ["d"], "SoftmaxOptions", {"beta": 1.0}, 2),
    ]
    return build([a, w, b, c, T("d", (1, 4, 4, 5), "INT8", 1 / 256, -128)], ops, ["d"])


def test_batch_may_grow_and_feeds_may_be_named() -> None:
    model = two_ops()
    data = ints(np.random.default_rng(0), (6, 4, 4, 3))
    expected = run(model, [data])
    found = IntegerReference(model).run({"a": data})
    for name in ("a", "c", "d"):
        np.testing.assert_array_equal(found[name], expected[name])
    assert IntegerReference(model).input_names == ("a",) and IntegerReference(model).output_names == ("d",)


def test_shape_arithmetic_of_a_dynamic_batch() -> None:
    x = T("x", (1, 4, 3), "INT8", 0.1, 5)
    tensors = [
        *(x, T("shape", (3,), "INT32"), T("batch", (), "INT32"), T("new", (2,), "INT32"), like(x, "flat", (1, 12))),
        *(like(x, "y", (1, 12, 1)), like(x, "z", (1, 12))),
        *(T(n, (1,), "INT32", data=np.array([v], np.int32)) for n, v in (("zero", 0), ("one", 1))),
        *(T(n, (), "INT32", data=np.array(v, np.int32)) for n, v in (("rest", 12), ("last", 2))),
    ]
    ops = [
        Op("SHAPE", ["x"], ["shape"], "ShapeOptions", {"outType": 2}),
        Op("STRIDED_SLICE", ["shape", "zero", "one", "one"], ["batch"], "StridedSliceOptions", {"shrinkAxisMask": 1}),
        Op("PACK", ["batch", "rest"], ["new"], "PackOptions", {"valuesCount": 2}),
        Op("RESHAPE", ["x", "new"], ["flat"], "ReshapeOptions"),
        Op("EXPAND_DIMS", ["flat", "last"], ["y"], "ExpandDimsOptions"),
        Op("SQUEEZE", ["y"], ["z"], "SqueezeOptions", {"squeezeDims": [2]}),
    ]
    model, data = build(tensors, ops, ["z"]), ints(np.random.default_rng(0), (7, 4, 3))
    expected, found = run(model, [data]), IntegerReference(model).run([data])
    for name in ("shape", "batch", "new", "flat", "y", "z"):
        np.testing.assert_array_equal(found[name], expected[name])
        assert found[name].dtype == expected[name].dtype


def test_run_op_takes_only_what_the_operator_reads() -> None:
    reference = IntegerReference(two_ops())
    given = ints(np.random.default_rng(1), (2, 4, 4, 5))
    (made,) = reference.run_op(1, {"c": given}).values()
    assert made.shape == given.shape
    np.testing.assert_array_equal((made.astype(int) + 128).sum(-1).round(-1), 260)  # 256, rounded to tens
    with pytest.raises(ExportError, match=r"SOFTMAX.*no value for its input 'c'"):
        reference.run_op(1, {})


def float_model() -> bytes:
    x = T("x", (2, 3), "FLOAT32")
    return build([x, T("y", (2, 3), "FLOAT32")], [Op("FLOOR", ["x"], ["y"])], ["y"])


def test_float_operators_are_refused_or_delegated() -> None:
    data = np.array([[0.5, -0.5, 2.0], [1.5, 3.0, -7.1]], np.float32)
    reference = IntegerReference(float_model())
    assert [op.code for op in reference.unsupported()] == ["FLOOR"]
    with pytest.raises(ExportError, match=r"FLOOR \(making 'y'\)"):
        reference.run([data])
    delegated = IntegerReference(float_model(), float_op=lambda op, values: [np.floor(values[0])])
    np.testing.assert_array_equal(delegated.run([data])["y"], np.floor(data))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.95])
def test_truncated_files_are_refused(share: float) -> None:
    model = two_ops()
    with pytest.raises(ExportError, match=r"tflite file|truncated|bytes for"):
        IntegerReference(model[: int(share * len(model))]).run([np.zeros((1, 4, 4, 3), np.int8)])


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ExportError, match=r"not a .tflite file"):
        IntegerReference(path)


def test_wrong_feeds_are_refused() -> None:
    reference = IntegerReference(two_ops())
    with pytest.raises(ExportError, match="takes int8"):
        reference.run([np.zeros((1, 4, 4, 3), np.float32)])
    with pytest.raises(ExportError, match="1 inputs, 2 were given"):
        reference.run([np.zeros((1, 4, 4, 3), np.int8)] * 2)
    with pytest.raises(ExportError, match="no value for the input 'a'"):
        reference.run({"z": np.zeros((1, 4, 4, 3), np.int8)})


def test_constructions_that_kernels_misread_are_refused() -> None:
    rng = np.random.default_rng(0)
    x, w = act(rng, "x", (1, 4, 4, 3), "INT16"), weights(rng, (5, 1, 1, 3), 8, 0)
    narrow = T("b", (5,), "INT32", np.float32(x.scale) * w.scale, 0, 0, np.arange(5, dtype=np.int32))
    model = one(
        [x, w, narrow], act(rng, "y", (1, 4, 4, 5), "INT16"), "CONV_2D", "Conv2DOptions", 4, strideH=1, strideW=1
    )
    with pytest.raises(ExportError, match=r"CONV_2D.*write it as int64"):
        IntegerReference(model).run([ints(rng, x.shape, "INT16")])
    model, inputs = depthwise("INT16", bits=4)(rng)
    with pytest.raises(ExportError, match=r"DEPTHWISE_CONV_2D.*as int8"):
        IntegerReference(model).run(inputs)
    a = T("a", (2, 8), "INT16", 2.0**-12, 0)
    model = one([a, like(a, "b", a.shape)], like(a, "y", a.shape), "ADD", "AddOptions", 3, potScaleInt16=True)
    with pytest.raises(ExportError, match=r"ADD.*potScaleInt16"):
        IntegerReference(model).run([ints(rng, a.shape, "INT16")] * 2)
