"""Random one-operator files for the tests of the integer reference: name -> (rng) -> (file, inputs)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.support.litert_files import Op, T, build

Case = tuple[bytes, list[np.ndarray]]
Rng = np.random.Generator
_RANGE = {"INT8": (-128, 128), "INT16": (-32768, 32768), "UINT8": (0, 256)}
_NUMPY = {"INT8": np.int8, "INT16": np.int16, "UINT8": np.uint8}


def scale(rng: Rng, low: float = 0.01, high: float = 0.2, size: int | None = None) -> Any:
    """Log-uniform float32."""
    return np.float32(np.exp(rng.uniform(np.log(low), np.log(high), size)))


def ints(rng: Rng, shape: Sequence[int], dtype: str = "INT8") -> np.ndarray:
    """Uniform integers of an activation type."""
    return rng.integers(*_RANGE[dtype], tuple(shape)).astype(_NUMPY[dtype])


def act(rng: Rng, name: str, shape: Sequence[int], dtype: str = "INT8", s: Any = None) -> T:
    """An activation with random parameters; int16 is symmetric and 256 times finer."""
    if dtype == "INT16":
        return T(name, tuple(shape), dtype, scale(rng) / np.float32(256) if s is None else s, 0)
    return T(name, tuple(shape), dtype, scale(rng) if s is None else s, int(rng.integers(*_RANGE[dtype])))


def like(t: T, name: str, shape: Sequence[int]) -> T:
    """A tensor on the same grid."""
    return T(name, tuple(shape), t.dtype, t.scale, t.zero_point)


def const(name: str, values: Sequence[int] | np.ndarray) -> T:
    """An int32 constant."""
    data = np.asarray(values, np.int32)
    return T(name, data.shape, "INT32", data=data)


def one(
    inputs: Sequence[T | None], out: T, code: str, options: str | None = None, version: int = 1, **fields: Any
) -> bytes:
    """A file with one operator."""
    op = Op(code, [None if t is None else t.name for t in inputs], [out.name], options, fields, version)
    return build([*(t for t in inputs if t is not None), out], [op], [out.name])


def weights(rng: Rng, shape: Sequence[int], bits: int, axis: int, per_channel: bool = True) -> T:
    """Symmetric weights, scaled so that outputs do not saturate."""
    half = 1 << (bits - 1)
    data = rng.integers(-half + (bits > 2), half, tuple(shape)).astype(np.int8)
    s = scale(rng, 0.3, 3.0, shape[axis] if per_channel else None) / np.float32(half * np.sqrt(data.size / shape[axis]))
    return T("w", tuple(shape), {8: "INT8", 4: "INT4", 2: "INT2"}[bits], s, 0, axis, data)


def bias(rng: Rng, x: T, w: T, channels: int, wide: bool) -> T:
    """A bias on the grid s_x * s_w."""
    data = rng.integers(-3000, 3000, channels).astype(np.int64 if wide else np.int32)
    return T("b", (channels,), "INT64" if wide else "INT32", np.float32(x.scale) * np.asarray(w.scale), 0, 0, data)


def _out(rng: Rng, x: T, shape: Sequence[int]) -> T:
    dtype = x.dtype
    spread = 40 * float(x.scale) * (128 if dtype == "INT16" else 1)
    return act(
        rng, "y", shape, dtype, np.float32(spread / (100 * (256 if dtype == "INT16" else 1)) * rng.uniform(0.5, 4))
    )


def conv(dtype: str = "INT8", bits: int = 8, groups: int = 1, per_channel: bool = True) -> Callable[[Rng], Case]:
    """CONV_2D."""

    def case(rng: Rng) -> Case:
        k, s, d = int(rng.integers(1, 4)), int(rng.integers(1, 3)), int(rng.integers(1, 3))
        h, v, cin, cout, valid = (
            int(rng.integers(8, 14)),
            int(rng.integers(8, 14)),
            4 * groups,
            16 * groups,
            int(rng.integers(2)),
        )
        x = act(rng, "x", (2, h, v, cin), dtype)
        w = weights(rng, (cout, k, k + 1, cin // groups), bits, 0, per_channel)
        h2 = (h - (k - 1) * d - 1) // s + 1 if valid else -(-h // s)
        v2 = (v - k * d - 1) // s + 1 if valid else -(-v // s)
        y = _out(rng, x, (2, h2, v2, cout))
        version = 7 if bits == 4 else {"INT8": 3, "INT16": 4}[dtype]
        fields = {"padding": valid, "strideH": s, "strideW": s, "dilationHFactor": d, "dilationWFactor": d}
        fused = int(rng.integers(0, 4))
        model = one(
            [x, w, bias(rng, x, w, cout, dtype == "INT16")], y, "CONV_2D", "Conv2DOptions", version,
            fusedActivationFunction=fused, **fields,
        )  # fmt: skip
        return model, [ints(rng, x.shape, dtype)]

    return case


def depthwise(dtype: str = "INT8", bits: int = 8, version: int | None = None) -> Callable[[Rng], Case]:
    """DEPTHWISE_CONV_2D."""

    def case(rng: Rng) -> Case:
        k, s, d, m = (int(rng.integers(a, b)) for a, b in ((1, 4), (1, 3), (1, 3), (1, 4)))
        h, v, c, valid = int(rng.integers(8, 14)), int(rng.integers(8, 14)), 8, int(rng.integers(2))
        x = act(rng, "x", (2, h, v, c), dtype)
        w = weights(rng, (1, k, k, c * m), bits, 3)
        reach = (k - 1) * d
        size = [(n - reach - 1) // s + 1 if valid else -(-n // s) for n in (h, v)]
        y = _out(rng, x, (2, *size, c * m))
        number = version or (7 if bits == 4 else {"INT8": 3, "INT16": 5}[dtype])
        model = one(
            [x, w, bias(rng, x, w, c * m, dtype == "INT16")], y, "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions", number,
            padding=valid, strideH=s, strideW=s, dilationHFactor=d, dilationWFactor=d, depthMultiplier=m,
            fusedActivationFunction=int(rng.integers(0, 4)),
        )  # fmt: skip
        return model, [ints(rng, x.shape, dtype)]

    return case


def transpose_conv(dtype: str = "INT8", biased: bool = True) -> Callable[[Rng], Case]:
    """TRANSPOSE_CONV."""

    def case(rng: Rng) -> Case:
        k, s, valid = int(rng.integers(1, 5)), int(rng.integers(1, 4)), int(rng.integers(2))
        h, v, cin, cout = int(rng.integers(4, 8)), int(rng.integers(4, 8)), 5, 6
        size = [(n - 1) * s + k if valid else n * s for n in (h, v)]
        x = act(rng, "x", (2, h, v, cin), dtype)
        w = weights(rng, (cout, k, k, cin), 8, 0)
        y = _out(rng, x, (2, *size, cout))
        inputs = [const("s", [2, *size, cout]), w, x, *([bias(rng, x, w, cout, dtype == "INT16")] if biased else [])]
        model = one(inputs, y, "TRANSPOSE_CONV", "TransposeConvOptions", 3, padding=valid, strideH=s, strideW=s)
        return model, [ints(rng, x.shape, dtype)]

    return case


def rsqrt(dtype: str = "INT8") -> Callable[[Rng], Case]:
    """RSQRT of all integers from the zero point on."""

    def case(rng: Rng) -> Case:
        source, out = act(rng, "x", (1, 1), dtype), act(rng, "y", (1, 1), dtype)
        q = np.arange(source.zero_point, _RANGE[dtype][1]).astype(_NUMPY[dtype])
        least = float(source.scale) * rng.uniform(1, 200 if dtype == "INT16" else 4)
        s = np.float32(rng.uniform(0.3, 2) / np.sqrt(least) / (32767 if dtype == "INT16" else 255))
        x, y = like(source, "x", q.shape), T("y", q.shape, dtype, s, out.zero_point)
        return one([x], y, "RSQRT", version=3 if dtype == "INT16" else 2), [q]

    return case


def fully_connected(
    dtype: str = "INT8", bits: int = 8, per_channel: bool = True, keep: bool = True
) -> Callable[[Rng], Case]:
    """FULLY_CONNECTED."""

    def case(rng: Rng) -> Case:
        cin, cout = int(rng.integers(1, 40)), int(rng.integers(1, 40))
        shape = (4, 7, 6, cin) if keep else (150, cin)
        x = act(rng, "x", shape, dtype)
        w = weights(rng, (cout, cin), bits, 0, per_channel)
        y = _out(rng, x, (*shape[:-1], cout))
        version = {4: 10, 2: 13}.get(bits, 12 if per_channel else {"INT8": 4, "INT16": 7}[dtype])
        biased = bool(rng.integers(2))
        model = one(
            [x, w, bias(rng, x, w, cout, dtype == "INT16") if biased else None], y, "FULLY_CONNECTED",
            "FullyConnectedOptions", version, keepNumDims=keep, fusedActivationFunction=int(rng.integers(0, 4)),
        )  # fmt: skip
        return model, [ints(rng, x.shape, dtype)]

    return case


def binary(code: str, dtype: str = "INT8", constant: bool = False) -> Callable[[Rng], Case]:
    """ADD, SUB, MUL with broadcasting."""

    def case(rng: Rng) -> Case:
        a, b = (
            act(rng, "a", (2, 9, 17, 16), dtype),
            act(rng, "b", [(2, 9, 17, 16), (16,), (1, 1, 1, 16), (1, 9, 17, 1)][int(rng.integers(4))], dtype),
        )
        second = ints(rng, b.shape, dtype)
        if constant:
            b = T(b.name, b.shape, b.dtype, b.scale, b.zero_point, 0, second)
        y = act(rng, "y", a.shape, dtype)
        if code == "MUL" and dtype == "INT16":
            y = act(rng, "y", a.shape, dtype, np.float32(float(a.scale) * float(b.scale) * 32768 * rng.uniform(0.2, 2)))
        fields = {"potScaleInt16": False} if code != "MUL" and dtype == "INT16" else {}
        version = {"INT8": 2, "INT16": {"ADD": 3, "SUB": 5, "MUL": 4}[code]}[dtype]
        model = one(
            [a, b],
            y,
            code,
            code.capitalize() + "Options",
            version,
            fusedActivationFunction=int(rng.integers(0, 4)),
            **fields,
        )
        return model, [ints(rng, a.shape, dtype), *([] if constant else [second])]

    return case


def extremum(code: str, dtype: str = "INT8") -> Callable[[Rng], Case]:
    """MAXIMUM, MINIMUM."""

    def case(rng: Rng) -> Case:
        a = act(rng, "a", (2, 9, 17, 16), dtype)
        b = T("b", (1, 1, 1, 1), dtype, a.scale, a.zero_point, 0, ints(rng, (1, 1, 1, 1), dtype))
        return one([a, b], like(a, "y", a.shape), code, "MaximumMinimumOptions", 2), [ints(rng, a.shape, dtype)]

    return case


def unary(
    code: str,
    dtype: str = "INT8",
    options: str | None = None,
    version: int = 1,
    out: tuple[float, int] | None = None,
    **fields: Any,
) -> Callable[[Rng], Case]:
    """A function of one tensor; `out` fixes the output's grid."""

    def case(rng: Rng) -> Case:
        x = act(rng, "x", (2, 16, 16, 16), dtype)
        y = act(rng, "y", x.shape, dtype) if out is None else T("y", x.shape, dtype, out[0], out[1])
        if code == "HARD_SWISH":
            y = act(rng, "y", x.shape, dtype, np.float32(float(x.scale) * rng.uniform(0.3, 2)))
        data = ints(rng, x.shape, dtype)
        if dtype == "INT8":
            data.reshape(-1)[:256] = np.arange(-128, 128)
        drawn = {k: v(rng) if callable(v) else v for k, v in fields.items()}
        return one([x], y, code, options, version, **drawn), [data]

    return case


def pot_int16(code: str, exponent: int, out: tuple[float, int]) -> Callable[[Rng], Case]:
    """LOGISTIC and TANH of int16 at a power-of-two scale."""

    def case(rng: Rng) -> Case:
        x = T("x", (4096,), "INT16", np.float32(2.0**exponent), 0)
        return one([x], T("y", x.shape, "INT16", *out), code, None, 3), [ints(rng, x.shape, "INT16")]

    return case


def prelu(rng: Rng) -> Case:
    """PRELU."""
    x, y = act(rng, "x", (2, 9, 17, 16)), act(rng, "y", (2, 9, 17, 16))
    alpha = T("a", (1, 1, 16), "INT8", scale(rng, 0.002, 0.01), int(rng.integers(-128, 128)), 0, ints(rng, (1, 1, 16)))
    return one([x, alpha], y, "PRELU"), [ints(rng, x.shape)]


def softmax(dtype: str = "INT8", classes: int = 10) -> Callable[[Rng], Case]:
    """SOFTMAX."""

    def case(rng: Rng) -> Case:
        x = act(rng, "x", (4096 // classes + 2, classes), dtype)
        if rng.integers(2):
            x = act(rng, "x", x.shape, dtype, np.float32(float(x.scale) * 4))
        y = T("y", x.shape, dtype, *((1 / 256, -128) if dtype == "INT8" else (1 / 32768, 0)))
        data = (
            ints(rng, x.shape, dtype)
            if rng.integers(2)
            else (rng.normal(size=x.shape) * (20 if dtype == "INT8" else 4000))
            .clip(-128 if dtype == "INT8" else -32768, 127 if dtype == "INT8" else 32767)
            .astype(_NUMPY[dtype])
        )
        return one([x], y, "SOFTMAX", "SoftmaxOptions", 2, beta=1.0), [data]

    return case


def quantize(source: str, target: str) -> Callable[[Rng], Case]:
    """QUANTIZE between integer types, or from float."""

    def case(rng: Rng) -> Case:
        y = act(rng, "y", (2, 16, 16, 16), target)
        if source == "FLOAT32":
            x = T("x", y.shape, "FLOAT32")
            step = float(y.scale)
            data = (rng.normal(size=x.shape) * step * (60 if target != "INT16" else 20000)).astype(np.float32)
            data.reshape(-1)[:512] = (rng.integers(-200, 200, 512) + 0.5).astype(np.float32) * np.float32(step)  # ties
            return one([x], y, "QUANTIZE", "QuantizeOptions", 1), [data]
        x = act(rng, "x", y.shape, source)
        return one([x], y, "QUANTIZE", "QuantizeOptions", 2), [ints(rng, x.shape, source)]

    return case


def dequantize(dtype: str) -> Callable[[Rng], Case]:
    """DEQUANTIZE."""

    def case(rng: Rng) -> Case:
        x = act(rng, "x", (2, 16, 16, 16), dtype)
        return one([x], T("y", x.shape, "FLOAT32"), "DEQUANTIZE", "DequantizeOptions", 2), [ints(rng, x.shape, dtype)]

    return case


def mean(
    dtype: str = "INT8", axes: Sequence[int] = (1, 2), keep: bool = True, same: bool = False
) -> Callable[[Rng], Case]:
    """MEAN."""

    def case(rng: Rng) -> Case:
        h, v = int(rng.integers(1, 9)), int(rng.integers(1, 9))
        x = act(rng, "x", (16, h, v, 128), dtype)
        shape = np.zeros(x.shape).mean(axis=tuple(axes), keepdims=keep).shape
        other = act(rng, "y", shape, dtype, np.float32(float(x.scale) * rng.uniform(0.05, 1)))
        y = like(x, "y", shape) if same else other
        return one([x, const("axes", axes)], y, "MEAN", "ReducerOptions", 2, keepDims=keep), [ints(rng, x.shape, dtype)]

    return case


def pool(code: str, dtype: str = "INT8") -> Callable[[Rng], Case]:
    """MAX_POOL_2D, AVERAGE_POOL_2D."""

    def case(rng: Rng) -> Case:
        kh, kw, sh, sw, valid = (int(rng.integers(a, b)) for a, b in ((1, 5), (1, 5), (1, 4), (1, 4), (0, 2)))
        h, v = int(rng.integers(6, 14)), int(rng.integers(6, 14))
        size = [(n - k) // s + 1 if valid else -(-n // s) for n, k, s in ((h, kh, sh), (v, kw, sw))]
        x = act(rng, "x", (2, h, v, 16), dtype)
        fields = {"filterHeight": kh, "filterWidth": kw, "strideH": sh, "strideW": sw, "padding": valid}
        y = like(x, "y", (2, *size, 16))
        fused = int(rng.integers(0, 4))
        return one(
            [x], y, code, "Pool2DOptions", 2 if dtype == "INT8" else 3, fusedActivationFunction=fused, **fields
        ), [ints(rng, x.shape, dtype)]

    return case


def resize(code: str, dtype: str = "INT8") -> Callable[[Rng], Case]:
    """RESIZE_BILINEAR, RESIZE_NEAREST_NEIGHBOR."""

    def case(rng: Rng) -> Case:
        x = act(rng, "x", (2, int(rng.integers(1, 9)), int(rng.integers(1, 9)), 8), dtype)
        size = [int(rng.integers(1, 20)), int(rng.integers(1, 20))]
        mode = [{}, {"halfPixelCenters": True}, {"alignCorners": True}][int(rng.integers(3))]
        options = "ResizeBilinearOptions" if code == "RESIZE_BILINEAR" else "ResizeNearestNeighborOptions"
        y = like(x, "y", (2, *size, 8))
        return one([x, const("size", size)], y, code, options, 3, **mode), [ints(rng, x.shape, dtype)]

    return case


def moves(rng: Rng) -> dict[str, Case]:
    """One case for each operator that only moves values."""
    x = act(rng, "x", (3, 6, 5, 8))
    data = ints(rng, x.shape)

    def made(
        shape: Sequence[int], code: str, extra: Sequence[T], options: str, version: int = 2, **fields: Any
    ) -> Case:
        return one([x, *extra], like(x, "y", shape), code, options, version, **fields), [data]

    pads = [[0, 0], [1, 2], [2, 1], [0, 3]]
    fill = T("fill", (), "INT8", x.scale, x.zero_point, 0, np.asarray(7, np.int8))
    inner = [const("b", [0, -5, 1, 0]), const("e", [3, 6, -1, 8]), const("s", [1, 2, 1, 3])]
    back = [const("b", [0, 4, 1, 2]), const("e", [3, -6, 5, 8]), const("s", [1, -1, 1, 1])]
    masked = [const("b", [0, 1, 9, -2, 3]), const("e", [0, 3, 9, 1, 8]), const("s", [1] * 5)]
    return {
        "reshape": made((3, 240), "RESHAPE", [const("s", [3, -1])], "ReshapeOptions", 1),
        "transpose": made((3, 5, 8, 6), "TRANSPOSE", [const("p", [0, 2, 3, 1])], "TransposeOptions"),
        "expand dims": made((3, 1, 6, 5, 8), "EXPAND_DIMS", [const("a", 1)], "ExpandDimsOptions", 1),
        "slice": made((3, 4, 5, 3), "SLICE", [const("b", [0, 1, 0, 5]), const("n", [3, 4, -1, 3])], "SliceOptions"),
        "strided slice": made((3, 3, 3, 3), "STRIDED_SLICE", inner, "StridedSliceOptions"),
        "strided slice backwards": made((3, 5, 4, 6), "STRIDED_SLICE", back, "StridedSliceOptions", endMask=2),
        "strided slice shrinking": made((3, 3, 3), "STRIDED_SLICE", inner, "StridedSliceOptions", shrinkAxisMask=4),
        "strided slice masked": made(
            (1, 2, 6, 2, 5), "STRIDED_SLICE", masked, "StridedSliceOptions", newAxisMask=1, ellipsisMask=4, endMask=8
        ),
        "pad": made((3, 9, 8, 11), "PAD", [const("p", pads)], "PadOptions"),
        "padv2": made((3, 9, 8, 11), "PADV2", [const("p", pads), fill], "PadV2Options"),
        "mirror pad reflect": made((3, 9, 8, 11), "MIRROR_PAD", [const("p", pads)], "MirrorPadOptions", mode=0),
        "mirror pad symmetric": made((3, 9, 8, 11), "MIRROR_PAD", [const("p", pads)], "MirrorPadOptions", mode=1),
        "gather": made((3, 6, 4, 8), "GATHER", [const("i", [4, 0, 2, 2])], "GatherOptions", axis=2),
        "reduce min": made((3, 1, 5, 8), "REDUCE_MIN", [const("a", [1])], "ReducerOptions", keepDims=True),
        "reduce max": made((3, 1, 5, 8), "REDUCE_MAX", [const("a", [1])], "ReducerOptions", keepDims=True),
        "reduce max flattened": made((3, 8), "REDUCE_MAX", [const("a", [1, -2])], "ReducerOptions", keepDims=False),
    }  # fmt: skip


def concat(rng: Rng) -> Case:
    """CONCATENATION."""
    a = act(rng, "a", (2, 15, 14, 7))
    b = like(a, "b", (2, 15, 14, 9))
    model = one([a, b], like(a, "y", (2, 15, 14, 16)), "CONCATENATION", "ConcatenationOptions", 2, axis=-1)
    return model, [ints(rng, a.shape), ints(rng, b.shape)]


def pack(rng: Rng) -> Case:
    """PACK."""
    a = act(rng, "a", (2, 25, 14))
    b = like(a, "b", (2, 25, 14))
    model = one([a, b], like(a, "y", (2, 2, 25, 14)), "PACK", "PackOptions", 2, axis=1, valuesCount=2)
    return model, [ints(rng, a.shape), ints(rng, b.shape)]
