"""Operations that move values: reshaping, slices, padding, concatenation, rows of a table; and resizing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from kquant.graph.ir import Node
from kquant.graph.ops import compute
from kquant.grids.gradients import exact, round_ste
from kquant.targets.builtin import Builtin, Reference, Use
from kquant.targets.kernel import Arithmetic, Kernel, Layout
from kquant.targets.litert.elementwise import move, real
from kquant.targets.litert.emitter import Emitter, Sink
from kquant.targets.litert.fixed_point import Tensor, divide_by_power, integers, with_gradient_of
from kquant.targets.litert.reference import layout
from kquant.targets.litert.weights import is_hybrid, weights
from kquant.targets.operand import Call


def _resize(interpolate: Callable[[Call], Tensor]) -> Callable[[Call], Tensor]:
    """Nearest neighbour moves integers; `interpolate` is for bilinear."""

    def arithmetic(call: Call) -> Tensor:
        return move(call) if call.node.attrs["method"] == "nearest" else interpolate(call)

    return arithmetic


def _bilinear(call: Call) -> Tensor:
    """Weights of 11 bits, rounded half up (XNNPACK)."""
    attrs, x = call.node.attrs, call.inputs[0].centered
    total = tf.cast(x, tf.float64)
    for axis, size in zip((1, 2), attrs["size"], strict=True):
        n, positions = np.float32(x.shape[axis]), np.arange(size, dtype=np.float32)
        ratio, half = n / np.float32(size), np.float32(0.5)
        positions = (positions + half) * ratio - half if attrs["half_pixel_centers"] else positions * ratio
        positions = np.clip(positions, 0, n - 1).astype(np.float32)
        low = positions.astype(np.int64)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        shape = [-1 if k == axis else 1 for k in range(4)]
        weight = np.rint((positions - low.astype(np.float32)) * np.float32(2048)).astype(np.float64).reshape(shape)
        total = tf.gather(total, low, axis=axis) * (2048 - weight) + tf.gather(total, high, axis=axis) * weight
    return exact(move(call), tf.cast(tf.floor(total / 2.0**22 + 0.5), tf.float32))


def _fixed_point_bilinear(call: Call) -> Tensor:
    """Weights of 10 bits on the stored integers, zero point included, rounded half away from zero (LiteRT's own)."""
    attrs, x = call.node.attrs, call.inputs[0]
    zero_point = tf.cast(x.zero_point, tf.int64)
    total, half_pixel = integers(x) + zero_point, attrs["half_pixel_centers"]
    for axis, size in zip((1, 2), attrs["size"], strict=True):
        n = x.centered.shape[axis]
        scale = ((n << 10) + size // 2) // size
        positions = np.arange(size) * scale + ((scale // 2) - (1 << 9) if half_pixel else 0)
        low = np.maximum(positions >> 10, 0)
        high = np.minimum((positions + 1023) >> 10, n - 1)
        shape = [-1 if k == axis else 1 for k in range(4)]
        weight = (positions - (low << 10)).reshape(shape)
        total = tf.gather(total, low, axis=axis) * (1024 - weight) + tf.gather(total, high, axis=axis) * weight
    rounded = divide_by_power(total, tf.constant(20, tf.int64))
    return with_gradient_of(move(call), rounded - zero_point)


fixed_point_resize = _resize(_fixed_point_bilinear)


def _rows(call: Call) -> Tensor:
    """Rows of the table, which is on the grid of the output."""
    return round_ste(compute(call.node, [call.inputs[0].centered], call.weights) / call.out.scale)


def _write_reshape(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    shape = [-1 if d is None else d for d in e.shape(node)]
    e.op("RESHAPE", [x[0], e.indices(node, "shape", shape)], [out.tensor])


def _write_transpose(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("TRANSPOSE", [x[0], e.indices(node, "perm", list(node.attrs["perm"]))], [out.tensor])


def _write_slice(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    begin, end, strides = (list(node.attrs[k]) for k in ("begin", "end", "strides"))
    masks = [sum(1 << k for k, v in enumerate(values) if v is None) for values in (begin, end)]
    operands = [
        e.indices(node, name, [default if v is None else v for v in values])
        for name, values, default in (("begin", begin, 0), ("end", end, 0), ("strides", strides, 1))
    ]
    e.op("STRIDED_SLICE", [x[0], *operands], [out.tensor], beginMask=masks[0], endMask=masks[1])


def _write_pad(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    paddings, mode = e.indices(node, "paddings", node.attrs["paddings"]), node.attrs["mode"]
    value = float(node.attrs.get("value") or 0.0)
    if mode != "constant":
        e.op("MIRROR_PAD", [x[0], paddings], [out.tensor], mode={"reflect": 0, "symmetric": 1}[mode])
    elif value == 0.0:
        e.op("PAD", [x[0], paddings], [out.tensor])
    else:
        e.op("PADV2", [x[0], paddings, e.real_constant(f"{node.name}/value", value, out.q)], [out.tensor])


def _write_concat(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op("CONCATENATION", x, [out.tensor], axis=node.attrs["axis"])


def _write_resize(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    builtin = "RESIZE_BILINEAR" if node.attrs["method"] == "bilinear" else "RESIZE_NEAREST_NEIGHBOR"
    size = e.indices(node, "size", list(node.attrs["size"]))
    e.op(builtin, [x[0], size], [out.tensor], halfPixelCenters=bool(node.attrs["half_pixel_centers"]))


def _write_embedding(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    """GATHER of rows of a table with the grid of the output; EMBEDDING_LOOKUP where rows have scales of their own."""
    ids = x[0]
    if e.builder.dtype(ids) != "INT32":
        ids = e.new_tensor(e.graph[node.inputs[0]], f"{node.name}/ids", e.builder.shape(x[0]), None, "INT32")
        e.op("CAST", [x[0]], [ids], inDataType=0, outDataType=2)
    if node.attrs.get("clamp"):
        clamped = e.builder.tensor(f"{node.name}/clamped", e.builder.shape(ids), "INT32")
        e.op("MINIMUM", [ids, e.indices(node, "last", len(node.weights["table"]) - 1)], [clamped])
        ids = clamped
    if out.q is not None:
        table = e.real_constant(f"{node.name}/table", node.weights["table"], out.q)
        e.weight_types[node.name] = e.builder.dtype(table)
    else:
        table = weights(e, node, ids, out).kernel
    if is_hybrid(e, node, out):
        _write_rows(e, node, table, ids, out)
    else:
        e.op("GATHER", [table, ids], [out.tensor], axis=0)


def _rows_least(use: Use) -> int:
    return 4 if use.dtype in ("INT4", "INT2") else 1


def _write_rows(e: Emitter, node: Node, table: int, ids: int, out: Sink) -> None:
    """EMBEDDING_LOOKUP, which takes a list of ids."""
    *shape, depth = e.shape(node)
    batch = int(np.prod([node.batch if d is None else d for d in shape]))
    count = None if None in shape else batch
    listed = e.builder.tensor(f"{node.name}/list", (count,), "INT32", batch=batch)
    e.op("RESHAPE", [ids, e.indices(node, "all", [-1])], [listed])
    rows = e.builder.tensor(f"{node.name}/rows", (count, depth), "FLOAT32", batch=batch)
    e.op("EMBEDDING_LOOKUP", [listed, table], [rows])
    e.op("RESHAPE", [rows, e.indices(node, "shape", [-1 if d is None else d for d in (*shape, depth)])], [out.tensor])


def _write_gather(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    e.op(
        "GATHER", [x[0], e.indices(node, "indices", list(node.attrs["indices"]))], [out.tensor], axis=node.attrs["axis"]
    )


def _write_take_along(e: Emitter, node: Node, x: Sequence[int], out: Sink) -> None:
    axis = len(e.builder.shape(x[1])) - 1
    e.op("GATHER", x, [out.tensor], axis=axis, batchDims=axis)


def _moved(compute: Callable[..., object]) -> Reference:
    return Reference(compute=compute, any_type=True)


def _many_axes(use: Use) -> int:
    return 4 if use.rank > 4 else 1


def _half_pixels(use: Use) -> int:
    return 3 if use.fields.get("halfPixelCenters") else 1


# operation -> what the reference kernels compute on int8 tensors, where that is something else
REFERENCE: Mapping[str, Arithmetic] = {"resize": fixed_point_resize}

KERNELS = (
    Kernel(
        op="reshape",
        arithmetic={8: move, 16: move},
        write=_write_reshape,
        operators={
            "RESHAPE": Builtin(reference=_moved(layout.reshape)),
            "SQUEEZE": Builtin(reference=_moved(layout.squeeze)),
            "EXPAND_DIMS": Builtin(reference=_moved(layout.expand_dims)),
        },
    ),
    Kernel(
        op="transpose",
        arithmetic={8: move, 16: move},
        write=_write_transpose,
        operators={
            "TRANSPOSE": Builtin(
                versions=(1, 2, 5),
                least=lambda use: 6 if use.rank > 5 else _many_axes(use),
                reference=_moved(layout.transpose),
            )
        },
        max_rank=6,
    ),
    Kernel(
        op="slice",
        arithmetic={8: move, 16: move},
        write=_write_slice,
        operators={
            "STRIDED_SLICE": Builtin(
                options="StridedSliceOptions",
                versions=(1, 2, 1),
                least=_many_axes,
                reference=_moved(layout.strided_slice),
            ),
            "SLICE": Builtin(reference=_moved(layout.slice_)),
            "SPLIT": Builtin(reference=_moved(layout.split)),
            "UNPACK": Builtin(reference=_moved(layout.unpack)),
        },
        max_rank=5,
    ),
    Kernel(
        op="pad",
        arithmetic={8: real, 16: real},  # of a value that need not be on the grid
        write=_write_pad,
        operators={
            "PAD": Builtin(versions=(1, 2, 3), least=_many_axes, reference=_moved(layout.pad)),
            "PADV2": Builtin(versions=(1, 2, 3), least=_many_axes, reference=_moved(layout.pad)),
            "MIRROR_PAD": Builtin(options="MirrorPadOptions", versions=(1, 2, 3), reference=_moved(layout.mirror_pad)),
        },
        max_rank=5,
    ),
    Kernel(
        op="concat",
        arithmetic={8: move, 16: move},
        write=_write_concat,
        operators={
            "CONCATENATION": Builtin(
                options="ConcatenationOptions", versions=(1, 2, 3), reference=_moved(layout.concatenation)
            ),
            "PACK": Builtin(options="PackOptions", reference=_moved(layout.pack)),
        },
    ),
    Kernel(
        op="resize",
        arithmetic={8: _resize(_bilinear), 16: fixed_point_resize},
        write=_write_resize,
        operators={
            "RESIZE_BILINEAR": Builtin(
                options="ResizeBilinearOptions",
                versions=(1, 2, 4),
                least=_half_pixels,
                reference=Reference(compute=layout.resize_bilinear),
            ),
            "RESIZE_NEAREST_NEIGHBOR": Builtin(
                options="ResizeNearestNeighborOptions",
                versions=(1, 2, 4),
                least=_half_pixels,
                reference=_moved(layout.resize_nearest_neighbor),
            ),
        },
    ),
    Kernel(
        op="embedding",
        arithmetic={8: _rows, 16: _rows},
        write=_write_embedding,
        layout=Layout(hybrid=(2, 4, 8), blocks=(2, 4)),
        operators={"EMBEDDING_LOOKUP": Builtin(versions=(1, 3, 1), typed_by=1, least=_rows_least)},
    ),
    Kernel(
        op="gather",
        arithmetic={8: move, 16: move},
        write=_write_gather,
        operators={
            "GATHER": Builtin(
                options="GatherOptions",
                versions=(1, 2, 4),
                least=lambda use: 5 if use.fields.get("batchDims") else 1,
                reference=_moved(layout.gather),
            )
        },
    ),
    Kernel(op="take_along", arithmetic={8: move, 16: move}, write=_write_take_along),
)
