"""How weights are written: layouts, containers, biases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kquant.errors import ExportError
from kquant.graph.ir import Node
from kquant.graph.ops import op_of, weight_of, weight_view
from kquant.grids.grid import BIAS_MAX, Grid, quantize_bias
from kquant.targets.kernel import Layout
from kquant.targets.litert.emitter import Emitter, Sink
from kquant.targets.litert.flatbuffer import FileGrid


@dataclass(frozen=True)
class Weights:
    """Tensors of an operation's weights."""

    kernel: int
    bias: int = -1
    per_channel: bool = False


def weights(e: Emitter, node: Node, x: int, out: Sink) -> Weights:
    """Write the kernel and the bias of a linear operation (the alpha of a prelu, the table of an embedding).

    Args:
        e: the emitter.
        node: the operation.
        x: its input tensor.
        out: its output, which says whether it runs in integers.
    """
    layout, q = layout_of(e, node), e.weight_grid(node.name)
    name, view = f"{node.name}/{weight_of(node).name}", weight_view(node)
    if q is None:
        if out.q is not None:
            raise ExportError(
                f"{node.name!r} runs in integers but its weights have no grid; quantize them or keep the layer float."
            )
        kernel, per_channel = _float_kernel(e, name, layout.to_file(view)), False
        e.weight_types[node.name] = "FLOAT16" if e.mode == "float16" else "FLOAT32"
    else:
        hybrid = is_hybrid(e, node, out)
        kernel = _integer_kernel(e, node, name, q, out.q, expand=hybrid)
        per_channel = hybrid or q.axis is not None
        e.weight_types[node.name] = e.builder.dtype(kernel)
        if out.q is None and not hybrid:
            kernel = _dequantized(e, node, name, kernel, view, layout, per_channel)
            per_channel = False
    return Weights(kernel, _bias(e, node, q, out), per_channel)


def is_hybrid(e: Emitter, node: Node, out: Sink) -> bool:
    """Whether a float kernel takes the weight in integers: one that quantizes its input, or that reads rows at ids."""
    q = e.weight_grid(node.name)
    if out.q is not None or q is None or np.any(q.zero_point) or not layout_of(e, node).hybrid:
        return False
    return e.mode == "dynamic_range" or op_of(node).lookup


def layout_of(e: Emitter, node: Node) -> Layout:
    """How the target stores the weight of an operation."""
    layout = e.kernel(node).layout
    if layout is None:
        raise AssertionError(f"the kernel of {node.op} of {e.target.name} has no layout for its weight")
    return layout


def _float_kernel(e: Emitter, name: str, values: np.ndarray) -> int:
    if e.mode != "float16":
        return e.constant(name, values, "FLOAT32")
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest > float(np.finfo(np.float16).max):
        raise ExportError(f"{name!r} has a weight of {largest:.3g}, too large for float16; use another mode.")
    small = e.constant(f"{name}/float16", values, "FLOAT16")
    kernel = e.builder.tensor(name, values.shape, "FLOAT32")
    e.op("DEQUANTIZE", [small], [kernel])
    return kernel


def _integer_kernel(e: Emitter, node: Node, name: str, q: Grid, out: Grid | None, expand: bool) -> int:
    layout = layout_of(e, node)
    values = layout.to_file(e.integers(node.name))
    activation = 8 if out is None else out.container
    own = node if out is not None else node.with_attrs(kernel="")  # variants are for integers
    container = e.target.weight_container(own, q.width, activation)
    blocks = q.scale.ndim == 2
    if expand or blocks:
        container = next(bits for bits in sorted(layout.blocks if blocks else layout.hybrid) if q.width <= bits)
    elif out is None and container == 2:
        container = 8  # DEQUANTIZE
    limit = 2 ** (container - 1)
    if q.qmin < -limit or q.qmax >= limit:
        raise ExportError(
            f"{node.name!r}: weights on [{q.qmin}, {q.qmax}] do not fit int{container}; use at most 8 bits, symmetric."
        )
    scale, zero_point = q.scale, q.zero_point
    if q.block is not None and blocks:
        grid = FileGrid(scale, axis=layout.axis, block=q.block)
        if not expand:  # DEQUANTIZE takes no blocks, and does not say so: each is a row
            values, grid = values.reshape(-1, q.block), FileGrid(scale.reshape(-1))
        else:
            e.constant_bytes += 2 * scale.size
        return e.constant(name if expand else f"{name}/int{container}", values, f"INT{container}", grid)
    if expand and q.axis is None:  # these kernels read one scale per channel
        scale = np.full(values.shape[layout.axis], q.scale, np.float32)
    suffix = "" if out is not None or expand else f"/int{container}"
    return e.constant(name + suffix, values, f"INT{container}", FileGrid(scale, zero_point, layout.axis))


def _dequantized(
    e: Emitter, node: Node, name: str, kernel: int, view: np.ndarray, layout: Layout, per_channel: bool
) -> int:
    shape, stored = layout.to_file(view).shape, e.builder.shape(kernel)
    made = result = e.builder.tensor(name, shape, "FLOAT32")
    if stored != shape:  # rows of blocks
        made = e.builder.tensor(f"{name}/rows", stored, "FLOAT32")
    e.op("DEQUANTIZE", [kernel], [made], per_channel=per_channel)
    if made != result:
        e.op("RESHAPE", [made, e.indices(node, "kernel_shape", shape)], [result])
    return result


def _bias(e: Emitter, node: Node, q: Grid | None, out: Sink) -> int:
    key = op_of(node).bias
    if key is None or key not in node.weights:
        return -1
    name, bias = f"{node.name}/{key}", node.weights[key]
    if out.q is None:
        return e.constant(name, bias, "FLOAT32")
    source = e.grid(node.inputs[0])
    assert source is not None and q is not None, "checked before"
    stored = quantize_bias(bias, source.scale, q.scale)
    if np.abs(stored).max(initial=0) >= BIAS_MAX:
        raise ExportError(
            f"{node.name!r}: a bias of {np.abs(bias).max():.3g} does not fit 32 bits at the scale of its products; "
            "raise the scale of the weights (kquant.grids.grid.fit_bias) or keep the layer float."
        )
    scale = np.float32(source.scale) * np.asarray(q.scale, np.float32)
    return e.constant(name, stored, "INT64" if out.q.container == 16 else "INT32", FileGrid(scale, 0))
