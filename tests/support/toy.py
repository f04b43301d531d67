"""A small hand-made graph with one of most things, and data for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from kquant.config.quant_config import QuantConfig
from kquant.graph.ir import Graph, Node
from kquant.graph.quantized import QuantizedGraph
from kquant.quantize.calibrate import quantize_graph
from kquant.quantize.data import CalibrationData
from kquant.quantize.plan import make_plan
from kquant.quantize.record import Quantization

SPATIAL = {"strides": [1, 1], "padding": "same", "dilation": [1, 1]}


def toy_graph(seed: int = 0) -> Graph:
    """conv+relu -> depthwise+relu6 -> add -> concat -> average pool -> mean -> dense -> softmax."""
    rng = np.random.default_rng(seed)

    def f(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32) * 0.3

    def node(name: str, op: str, inputs: tuple[str, ...], shape: Any, layer: str, **kw: Any) -> Node:
        return Node(name=name, op=op, inputs=inputs, shape=shape, origin=name, origin_type=layer, **kw)

    image = (None, 8, 8, 8)
    nodes = [
        node("in", "input", (), (None, 8, 8, 3), "InputLayer"),
        node(
            *("c1", "conv2d", ("in",), image, "Conv2D"),
            attrs={**SPATIAL, "groups": 1, "clip": [0.0, None]},
            weights={"kernel": f(3, 3, 3, 8), "bias": f(8)},
        ),
        node(
            *("dw", "depthwise_conv2d", ("c1",), image, "DepthwiseConv2D"),
            attrs={**SPATIAL, "clip": [0.0, 6.0]},
            weights={"kernel": f(3, 3, 8, 1), "bias": f(8)},
        ),
        node("add", "add", ("c1", "dw"), image, "Add"),
        node("cat", "concat", ("add", "dw"), (None, 8, 8, 16), "Concatenate", attrs={"axis": 3}),
        node(
            *("pool", "avg_pool2d", ("cat",), (None, 4, 4, 16), "AveragePooling2D"),
            attrs={"pool_size": [2, 2], "strides": [2, 2], "padding": "valid"},
        ),
        node(
            *("mean", "mean", ("pool",), (None, 16), "GlobalAveragePooling2D"),
            attrs={"axes": [1, 2], "keepdims": False},
        ),
        node("fc", "dense", ("mean",), (None, 5), "Dense", weights={"kernel": f(16, 5), "bias": f(5)}),
        node("sm", "softmax", ("fc",), (None, 5), "Softmax"),
    ]
    return Graph({n.name: n for n in nodes}, ("in",), ("sm",), ("x",), ("y",), "toy")


def toy_data(samples: int = 64, seed: int = 1) -> np.ndarray:
    """Inputs of the toy graph."""
    return np.random.default_rng(seed).normal(size=(samples, 8, 8, 3)).astype(np.float32)


def calibration(x: np.ndarray, batch_size: int = 16) -> CalibrationData:
    """The data as the calibration wants it."""
    return CalibrationData(x, [("x", (None, *x.shape[1:]), "float32")], batch_size=batch_size)


def config(name: str = "w8a8", **changes: Any) -> QuantConfig:
    """A preset with overrides."""
    return QuantConfig.load({"preset": name, **changes})


def asked(target: str) -> Quantization:
    """The record of a network of which nothing is known but its target."""
    return Quantization(config=QuantConfig(target=target))


@cache
def _quantized(name: str) -> QuantizedGraph:
    return quantize_graph(make_plan(toy_graph(), config(name)), calibration(toy_data()), progress=False)


def toy_qgraph(name: str = "w8a8", **changes: Any) -> QuantizedGraph:
    """The quantized toy graph; that of a preset is made once, since nothing can change it."""
    if not changes:
        return _quantized(name)
    return quantize_graph(make_plan(toy_graph(), config(name, **changes)), calibration(toy_data()), progress=False)
