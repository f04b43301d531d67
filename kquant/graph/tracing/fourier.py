"""Lowering of discrete Fourier transforms: products with constant sines and cosines."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from kquant.graph.ir import Node
from kquant.graph.tracing.builder import Builder, NotLowered, as_array, lowers_op, pad, reshape
from kquant.graph.tracing.linear import convolve, from_2d
from kquant.graph.tracing.maps import along
from kquant.graph.tracing.operations import slice_axis

Complex = tuple[Node, Node | None]  # real and imaginary part; None for zeros


def waves(length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [length, count]: of places by frequencies."""
    angles = 2 * np.pi * np.outer(np.arange(length), np.arange(count)) / length
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _transform(b: Builder, x: Complex, axis: int, count: int) -> tuple[Node, Node]:
    """(a + ib)(C - iS) = aC + bS + i(bC - aS) along an axis, at the first `count` frequencies."""
    a, imaginary = x
    cosines, sines = waves(int(a.shape[axis] or 0), count)
    name = f"axis_{axis % len(a.shape)}"
    real = along(b, a, axis, cosines, f"{name}_cosines")
    turned = along(b, a, axis, -sines, f"{name}_sines")
    if imaginary is None:
        return real, turned
    parts = along(b, imaginary, axis, sines, f"{name}_real"), along(b, imaginary, axis, cosines, f"{name}_imaginary")
    return b.emit("add", real, parts[0], suffix=f"{name}_a"), b.emit("add", parts[1], turned, suffix=f"{name}_b")


def _parts(x: Any) -> Complex:
    real, imaginary = x
    if not isinstance(real, Node):
        raise NotLowered("a transform whose real part is a constant")
    if isinstance(imaginary, Node):
        return real, imaginary
    if as_array(imaginary).any():
        raise NotLowered("a transform whose imaginary part is a constant")
    return real, None


@lowers_op("FFT", "FFT2")
def fft(b: Builder, op: Any, x: Any) -> list[Node]:
    parts = _parts(x)
    for axis in (-1, -2) if type(op).__name__ == "FFT2" else (-1,):
        parts = _transform(b, parts, axis, int(parts[0].shape[axis] or 0))
    real, imaginary = parts
    assert imaginary is not None, "a transform has made it"
    return [real, imaginary]


@lowers_op("RFFT")
def rfft(b: Builder, op: Any, x: Node) -> list[Node]:
    length = int(x.shape[-1] or 0)
    wanted = op.fft_length or length
    if wanted < length:
        x = slice_axis(b, x, len(x.shape) - 1, 0, wanted, "part")
    elif wanted > length:
        x = pad(b, x, [(0, 0)] * (len(x.shape) - 1) + [(0, wanted - length)], suffix="padded")
    return list(_transform(b, (x, None), -1, wanted // 2 + 1))


@lowers_op("STFT")
def stft(b: Builder, op: Any, x: Node) -> list[Node]:
    """A convolution with windowed waves, of one channel for each frequency and part."""
    if len(x.shape) != 2:
        raise NotLowered("short transforms of several channels")
    size, length, count = op.fft_length, op.sequence_length, op.fft_length // 2 + 1
    if op.center:
        x = pad(b, x, ((0, 0), (size // 2, size // 2)), "reflect", suffix="centred")
    kernel = np.concatenate([part * sign for part, sign in zip(waves(size, count), (1, -1), strict=True)], axis=1)
    kernel = kernel * _window(op.window, length, size)[:, None]
    y = convolve(
        b,
        reshape(b, x, (*x.shape, 1), "samples"),
        kernel[:, None].astype(np.float32),
        np.zeros(2 * count, np.float32),
        op.sequence_stride,
        "valid",
        1,
    )
    y = from_2d(b, y, 3)
    return [slice_axis(b, y, 2, 0, count, "real"), slice_axis(b, y, 2, count, 2 * count, "imaginary")]


def _window(window: Any, length: int, size: int) -> np.ndarray:
    """Of an STFT [size]: by name (periodic) or as given, in the middle of zeros; 1 for none."""
    if window is None:
        return np.ones(size)
    if isinstance(window, str):
        a = {"hann": 0.5, "hamming": 0.54}[window]
        values = a - (1 - a) * np.cos(2 * np.pi * np.arange(length) / length)
    else:
        values = np.asarray(keras.ops.convert_to_numpy(window), np.float64)
    left = (size - length) // 2
    return np.pad(values, (left, size - length - left))
