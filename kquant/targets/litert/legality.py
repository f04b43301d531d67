"""What would run but compute something else, or not run at all: refused before it is written."""

from __future__ import annotations

import numpy as np

from kquant.errors import ExportError
from kquant.graph.ir import Node
from kquant.graph.ops import op_of
from kquant.grids.grid import Grid
from kquant.targets.litert.emitter import Emitter
from kquant.targets.target import Target

# the kernels of sums shift their operands left by so many bits; a larger factor aborts the process, or computes garbage
_SUM_BITS = {8: 19, 16: 14}
_REPLAN = "make the plan again with kquant.quantize_model"


def check(e: Emitter, node: Node) -> None:
    """Refuse a node that the kernels would not compute as the simulation does.

    Raises:
        ExportError: names the node, what was found and the remedy.
    """
    if node.op in ("input", "const", "float"):
        if (q := e.grid(node.name)) is not None:
            _check_grid(node, q)
        return
    if node.op not in e.target.kernels:
        raise ExportError(
            f"{node.name!r}: {e.target.name} has no operator for {node.op!r}, in float neither; "
            "take it out of the model, or use another target."
        )
    kernel = e.kernel(node)
    rank = max((len(n.shape) for n in (node, *(e.graph[i] for i in node.inputs))), default=0)
    if kernel.max_rank is not None and rank > kernel.max_rank:
        raise ExportError(
            f"{node.name!r}: {node.op} takes at most {kernel.max_rank} axes, found {rank}; reshape before it."
        )
    q = e.grid(node.name)
    if q is None:
        return
    _check_grid(node, q)
    container = q.container
    if container not in kernel.arithmetic:
        raise ExportError(
            f"{node.name!r}: {node.op} has no kernel for int{container} activations; "
            "use 8 bits or keep the layer float."
        )
    _check_inputs(e, node, q)
    _check_scale(e, node)
    _check_output(e.target, node, q)
    if node.op in ("add", "sub"):
        _check_sum(e, node, q)
    w = e.weight_grid(node.name)
    if op_of(node).linear and w is not None and np.any(w.zero_point):
        raise ExportError(
            f"{node.name!r}: weights with zero point {np.ravel(w.zero_point)[np.argmax(np.ravel(w.zero_point) != 0)]} "
            "are computed wrongly by the kernels; set symmetric=True and signed=True for them."
        )


def _check_grid(node: Node, q: Grid) -> None:
    if np.size(q.scale) != 1:
        raise ExportError(f"{node.name!r}: an activation needs one scale, found {np.size(q.scale)}; {_REPLAN}.")
    if not (np.isfinite(q.scale) and q.scale > 0):
        raise ExportError(f"{node.name!r}: scale {float(q.scale)} is not a positive number; calibrate again.")
    if not q.qmin <= int(q.zero_point) <= q.qmax or q.qmin < -32768 or q.qmax > 32767:
        raise ExportError(
            f"{node.name!r}: zero point {int(q.zero_point)} on [{q.qmin}, {q.qmax}] does not fit 16 bits or its grid; "
            f"{_REPLAN}."
        )
    if q.container == 16 and int(q.zero_point) != 0:
        raise ExportError(
            f"{node.name!r}: int16 activations need zero point 0, found {int(q.zero_point)}; "
            "set symmetric=True for them."
        )


def _check_inputs(e: Emitter, node: Node, q: Grid) -> None:
    tied = node.op in e.target.same_scale or node.op in e.target.inputs_share_output
    for name in node.inputs:
        source = e.grid(name)
        if source is None:
            if node.op == "requantize" or e.graph[name].dtype != "float32":
                continue
            raise ExportError(
                f"{node.name!r} runs in integers but reads {name!r}, which is float; put a requantize between them."
            )
        if node.op != "requantize" and source.container != q.container:
            raise ExportError(
                f"{node.name!r} makes int{q.container} but reads int{source.container} from {name!r}; "
                "put a requantize between them."
            )
        if tied and not same_grid(source, q):
            raise ExportError(
                f"{node.name!r}: {node.op} needs the same grid for input and output, found {_text(source)} in {name!r} "
                f"and {_text(q)}; put a requantize between them."
            )


def _check_scale(e: Emitter, node: Node) -> None:
    source = e.grid(node.inputs[0]) if node.inputs else None
    if source is not None and float(source.scale) < e.target.least_scale(node.op, source.container):
        raise ExportError(
            f"{node.name!r}: the kernel of {node.op} aborts on {node.inputs[0]!r} with {_text(source)}, too fine a "
            "grid; give that tensor a wider range, or keep the layer float."
        )


def _check_sum(e: Emitter, node: Node, q: Grid) -> None:
    for name in node.inputs:
        source = e.grid(name)
        if source is not None and float(source.scale) >= float(q.scale) * 2.0 ** _SUM_BITS[q.container]:
            raise ExportError(
                f"{node.name!r}: the kernels of {node.op} cannot take {name!r} with {_text(source)} to {_text(q)}, "
                "which is too much finer; give the layer a wider range, or keep it float."
            )


def _check_output(target: Target, node: Node, q: Grid) -> None:
    fixed = target.fixed_output(node.op, q.container)
    if fixed is not None and (np.float32(q.scale), int(q.zero_point)) != (np.float32(fixed[0]), fixed[1]):
        raise ExportError(
            f"{node.name!r}: the kernel of {node.op} writes on scale {fixed[0]:g}, zero point {fixed[1]}, "
            f"found {_text(q)}; put a requantize behind it."
        )


def same_grid(a: Grid, b: Grid) -> bool:
    """Whether the integers of two grids mean the same numbers."""
    return np.float32(a.scale) == np.float32(b.scale) and int(a.zero_point) == int(b.zero_point)


def _text(q: Grid) -> str:
    return f"scale {float(q.scale):.6g}, zero point {int(q.zero_point)}"
