"""TensorFlow's functions on symbolic tensors of Keras: each call becomes the operations of Keras that compute the same.

Layers and lambdas may be written in TensorFlow itself (`tf.concat`, `tf.image.resize`, `tf.nn.relu`), which Keras runs
and cannot record. While such code is traced, TensorFlow asks here for what it does not take: the function is traced on
placeholders, and its graph is written with `keras.ops`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.util import dispatch

k = keras.ops
Translation = Callable[..., Any]


class _Unreadable(Exception):
    """An operation that has no translation, or not with these attributes."""


@contextmanager
def tensorflow_on_symbols() -> Iterator[None]:
    """Let TensorFlow's functions take symbolic tensors of Keras in the block, as far as there are translations."""
    handler = _Handler()
    dispatch._GLOBAL_DISPATCHERS.append(handler)
    try:
        yield
    finally:
        dispatch._GLOBAL_DISPATCHERS.remove(handler)


class _Handler(dispatch.GlobalOpDispatcher):
    """What TensorFlow asks when a function does not take its arguments."""

    def handle(self, op: Any, args: Any, kwargs: Any) -> Any:
        if op.__name__.startswith("convert_to_tensor"):
            return self.NOT_SUPPORTED  # a part of most functions: these are translated as a whole
        if not any(isinstance(v, keras.KerasTensor) for v in tf.nest.flatten((args, kwargs))):
            return self.NOT_SUPPORTED
        try:
            return _translated(op, args, kwargs)
        except Exception:  # whatever a function raises on placeholders: Keras' own error says more
            return self.NOT_SUPPORTED


def _translated(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What a function of TensorFlow makes of symbolic tensors and variables, as `keras.ops` compute it."""
    flat = tf.nest.flatten((args, kwargs))
    places = [i for i, v in enumerate(flat) if isinstance(v, keras.KerasTensor | keras.Variable)]
    specs = [tf.TensorSpec(flat[i].shape, flat[i].dtype) for i in places]

    def call(*tensors: Any) -> Any:
        filled = list(flat)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        own_args, own_kwargs = tf.nest.pack_sequence_as((args, kwargs), filled)
        return function(*own_args, **own_kwargs)

    traced = tf.function(call, autograph=False).get_concrete_function(*specs)
    inner = traced.inputs[: len(places)]
    values: dict[Any, Any] = {t.ref(): flat[i] for t, i in zip(inner, places, strict=True)}
    values |= {own.ref(): np.asarray(captured) for captured, own in traced.graph.captures}
    for op in traced.graph.get_operations():
        if op.type != "Placeholder":
            values.update(_outputs(op, values))
    return tf.nest.map_structure(lambda t: values[t.ref()], traced.structured_outputs)


def _outputs(op: Any, values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The values of an operation's outputs."""
    known = [tf.get_static_value(o) for o in op.outputs]
    if known and all(v is not None for v in known):
        return {o.ref(): tf.constant(v, o.dtype) for o, v in zip(op.outputs, known, strict=True)}
    operands = [values[i.ref()] for i in op.inputs]
    if not any(isinstance(o, keras.KerasTensor | keras.Variable) for o in operands):
        raise _Unreadable
    made = TRANSLATIONS[op.type](op, *operands)
    return {o.ref(): v for o, v in zip(op.outputs, made if isinstance(made, list | tuple) else [made], strict=True)}


# --- translations: (operation, operands) -> what `keras.ops` make of them ------------------------------------------


def _plain(function: Callable[..., Any]) -> Translation:
    return lambda op, *operands: function(*operands)


def _ints(value: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in np.asarray(value).reshape(-1))


def _reduction(function: Callable[..., Any]) -> Translation:
    return lambda op, x, axes: function(x, axis=_ints(axes), keepdims=op.get_attr("keep_dims"))


def _place(function: Callable[..., Any]) -> Translation:
    return lambda op, x, axis: k.cast(function(x, axis=int(np.asarray(axis))), op.outputs[0].dtype.name)


def _channels_last(op: Any) -> None:
    if op.get_attr("data_format") not in (b"NHWC", b""):
        raise _Unreadable


def _biased(op: Any, x: Any, bias: Any) -> Any:
    _channels_last(op)
    return x + bias


def _padding(op: Any) -> str:
    padding = op.get_attr("padding").decode().lower()
    if padding not in ("same", "valid"):
        raise _Unreadable
    return str(padding)


def _convolution(function: Callable[..., Any]) -> Translation:
    def translate(op: Any, x: Any, kernel: Any) -> Any:
        _channels_last(op)
        strides, rates = op.get_attr("strides")[1:3], op.get_attr("dilations")[1:3]
        if max(rates) == 1:
            return function(x, kernel, strides=tuple(strides), padding=_padding(op))
        return function(x, kernel, strides=tuple(strides), padding=_padding(op), dilation_rate=tuple(rates))

    return translate


def _pool(function: Callable[..., Any]) -> Translation:
    def translate(op: Any, x: Any) -> Any:
        _channels_last(op)
        sizes, strides = op.get_attr("ksize"), op.get_attr("strides")
        if sizes[0] != 1 or sizes[-1] != 1:
            raise _Unreadable
        return function(x, tuple(sizes[1:3]), tuple(strides[1:3]), _padding(op))

    return translate


def _resize(interpolation: str) -> Translation:
    def translate(op: Any, x: Any, size: Any) -> Any:
        if op.get_attr("align_corners") or not op.get_attr("half_pixel_centers"):
            raise _Unreadable
        return k.image.resize(x, _ints(size), interpolation=interpolation)

    return translate


def _blocks(to_depth: bool) -> Translation:
    """SPACE_TO_DEPTH and DEPTH_TO_SPACE, as moves."""

    def translate(op: Any, x: Any) -> Any:
        _channels_last(op)
        n = op.get_attr("block_size")
        h, w, c = x.shape[1:]
        if to_depth:
            parts = k.transpose(k.reshape(x, (-1, h // n, n, w // n, n, c)), (0, 1, 3, 2, 4, 5))
            return k.reshape(parts, (-1, h // n, w // n, n * n * c))
        parts = k.transpose(k.reshape(x, (-1, h, w, n, n, c // n**2)), (0, 1, 3, 2, 4, 5))
        return k.reshape(parts, (-1, h * n, w * n, c // n**2))

    return translate


def _strided_slice(op: Any, x: Any, begin: Any, end: Any, strides: Any) -> Any:
    parts = zip(_ints(begin), _ints(end), _ints(strides), strict=True)
    masks = {kind: op.get_attr(f"{kind}_mask") for kind in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    index: list[Any] = []
    for i, (low, high, step) in enumerate(parts):
        marked = {kind for kind, mask in masks.items() if mask >> i & 1}
        if "ellipsis" in marked:
            index.append(Ellipsis)
        elif "new_axis" in marked:
            index.append(None)
        elif "shrink_axis" in marked:
            index.append(low)
        else:
            first, last = None if "begin" in marked else low, None if "end" in marked else high
            index.append(slice(first, last, None if step == 1 else step))
    return x[tuple(index)]


def _gather(op: Any, x: Any, indices: Any, axis: Any) -> Any:
    axis, rows = int(np.asarray(axis)), op.get_attr("batch_dims")
    if not rows:
        return k.take(x, indices, axis=axis)
    if not rows == axis == len(x.shape) - 1 == len(indices.shape) - 1:
        raise _Unreadable
    return k.take_along_axis(x, indices, axis=axis)


def _matmul(op: Any, a: Any, b: Any) -> Any:
    names = ("transpose_a", "transpose_b") if op.type == "MatMul" else ("adj_x", "adj_y")
    a, b = (k.swapaxes(x, -1, -2) if op.get_attr(name) else x for x, name in zip((a, b), names, strict=True))
    return k.matmul(a, b)


def _split(op: Any, *operands: Any) -> Any:
    if op.type == "SplitV":
        x, sizes, axis = operands
        return k.split(x, list(np.cumsum(_ints(sizes))[:-1]), axis=int(np.asarray(axis)))
    axis, x = operands
    return k.split(x, op.get_attr("num_split"), axis=int(np.asarray(axis)))


def _pad(op: Any, x: Any, paddings: Any, value: Any = 0.0) -> Any:
    mode = op.get_attr("mode").decode().lower() if op.type == "MirrorPad" else "constant"
    pairs = [_ints(pair) for pair in np.asarray(paddings)]
    return k.pad(x, pairs, mode, float(np.asarray(value)) if mode == "constant" else None)


def _cumulative(op: Any, x: Any, axis: Any) -> Any:
    if op.get_attr("exclusive") or op.get_attr("reverse"):
        raise _Unreadable
    return k.cumsum(x, axis=int(np.asarray(axis)))


def _normalized(op: Any, x: Any, gamma: Any, beta: Any, mean: Any, variance: Any) -> Any:
    """FusedBatchNormV3 at inference: one output is read, others are statistics."""
    _channels_last(op)
    if op.get_attr("is_training"):
        raise _Unreadable
    y = (x - mean) * (gamma * k.rsqrt(variance + op.get_attr("epsilon"))) + beta
    return [y, *[None] * (len(op.outputs) - 1)]


def _one_hot(op: Any, x: Any, depth: Any, on: Any, off: Any) -> Any:
    if (float(on), float(off), op.get_attr("axis")) != (1.0, 0.0, -1):
        raise _Unreadable
    return k.one_hot(x, int(np.asarray(depth)))


def _sliced(op: Any, x: Any, begin: Any, size: Any) -> Any:
    pairs = zip(_ints(begin), _ints(size), strict=True)
    return x[tuple(slice(low or None, None if n == -1 else low + n) for low, n in pairs)]


_SAME = {
    **{"Abs": k.absolute, "Neg": k.negative, "Exp": k.exp, "Log": k.log, "Sqrt": k.sqrt, "Rsqrt": k.rsqrt},
    **{"Sign": k.sign, "Floor": k.floor, "Ceil": k.ceil, "Round": k.round, "Rint": k.round, "Sin": k.sin, "Cos": k.cos},
    **{"Tanh": k.tanh, "Sigmoid": k.sigmoid, "Relu": k.relu, "Relu6": k.relu6, "Elu": k.elu, "Selu": k.selu},
    **{"Softplus": k.softplus, "Softsign": k.softsign, "Erf": k.erf, "Square": k.square, "Log1p": k.log1p},
    **{"Expm1": k.expm1, "Reciprocal": k.reciprocal, "Inv": k.reciprocal, "Softmax": k.softmax},
    **{"LogSoftmax": k.log_softmax, "LogicalNot": k.logical_not, "Add": k.add, "AddV2": k.add, "Sub": k.subtract},
    **{"Mul": k.multiply, "RealDiv": k.true_divide, "Maximum": k.maximum, "Minimum": k.minimum},
    **{"Pow": k.power, "Atan2": k.arctan2, "FloorMod": k.mod, "Greater": k.greater, "GreaterEqual": k.greater_equal},
    **{"Less": k.less, "LessEqual": k.less_equal, "Equal": k.equal, "NotEqual": k.not_equal},
    **{"LogicalAnd": k.logical_and, "LogicalOr": k.logical_or, "Select": k.where, "SelectV2": k.where},
    **{"AddN": lambda *xs: sum(xs[1:], xs[0])},
    "IdentityN": lambda *xs: list(xs),
    "SquaredDifference": lambda x, y: k.square(x - y),
    **{name: lambda x: x for name in ("Identity", "StopGradient", "PreventGradient", "CheckNumerics", "Snapshot")},
}
TRANSLATIONS: Mapping[str, Translation] = MappingProxyType(
    {
        **{name: _plain(function) for name, function in _SAME.items()},
        **{name: _reduction(f) for name, f in {"Mean": k.mean, "Sum": k.sum, "Prod": k.prod}.items()},
        **{name: _reduction(f) for name, f in {"Max": k.max, "Min": k.min, "Any": k.any, "All": k.all}.items()},
        **{name: _place(f) for name, f in {"ArgMax": k.argmax, "ArgMin": k.argmin}.items()},
        **{name: _convolution(f) for name, f in {"Conv2D": k.conv, "DepthwiseConv2dNative": k.depthwise_conv}.items()},
        **{name: _pool(f) for name, f in {"MaxPool": k.max_pool, "AvgPool": k.average_pool}.items()},
        **dict.fromkeys(("MatMul", "BatchMatMul", "BatchMatMulV2"), _matmul),
        **dict.fromkeys(("Split", "SplitV"), _split),
        **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), _pad),
        "BiasAdd": _biased,
        "ResizeBilinear": _resize("bilinear"),
        "ResizeNearestNeighbor": _resize("nearest"),
        "ResizeBicubic": _resize("bicubic"),
        "SpaceToDepth": _blocks(to_depth=True),
        "DepthToSpace": _blocks(to_depth=False),
        "LeakyRelu": lambda op, x: k.leaky_relu(x, op.get_attr("alpha")),
        "ClipByValue": lambda op, x, low, high: k.clip(x, float(np.asarray(low)), float(np.asarray(high))),
        "Cast": lambda op, x: k.cast(x, op.get_attr("DstT").name),
        "Reshape": lambda op, x, shape: k.reshape(x, _ints(shape)),
        "Transpose": lambda op, x, axes: k.transpose(x, _ints(axes)),
        "ExpandDims": lambda op, x, axis: k.expand_dims(x, int(np.asarray(axis))),
        "Squeeze": lambda op, x: k.squeeze(x, tuple(op.get_attr("squeeze_dims")) or None),
        "ConcatV2": lambda op, *xs: k.concatenate(xs[:-1], axis=int(np.asarray(xs[-1]))),
        "Pack": lambda op, *xs: k.stack(xs, axis=op.get_attr("axis")),
        "Unpack": lambda op, x: k.unstack(x, axis=op.get_attr("axis")),
        "StridedSlice": _strided_slice,
        "Slice": _sliced,
        "Tile": lambda op, x, counts: k.tile(x, _ints(counts)),
        "ReverseV2": lambda op, x, axes: functools.reduce(k.flip, _ints(axes), x),
        "Roll": lambda op, x, shift, axes: k.roll(x, _ints(shift), _ints(axes)),
        "GatherV2": _gather,
        "Einsum": lambda op, *xs: k.einsum(op.get_attr("equation").decode(), *xs),
        "Cumsum": _cumulative,
        "TopKV2": lambda op, x, count: list(k.top_k(x, int(np.asarray(count)))),
        "OneHot": _one_hot,
        "FusedBatchNormV3": _normalized,
    }
)
