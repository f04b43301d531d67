"""Weights as the operator DECODE of TensorFlow Lite Micro unpacks them, each in the shortest of its ways.

DECODE writes the weights into the arena right before the operator that reads them: a shorter file takes more of the
arena, by the largest such tensor or so, and time for each inference.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kquant.targets.storage import constants
from kquant.targets.storage.constants import Stored, Weight
from kquant.targets.storage.decode_operator import (
    CUSTOM_CODE,
    KINDS,
    Code,
    Encoded,
    encode_pruned,
    encode_table,
    encode_tables,
    huffman_code,
)

# what else a file needs, about: for DECODE and its first tensor, and for the second tensor, which may be shared
_OPERATOR, _ANCILLARY = 76, 48
_FEWEST = 64  # values that are worth it

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class _Group:
    """Tensors that share a Huffman code."""

    members: tuple[int, ...]
    counts: Array
    code: Code
    bytes: int


def decode_operators(model: Any) -> tuple[Stored, ...]:
    """Store weights for DECODE where that is shorter, all that it needs counted.

    Args:
        model: a schema.ModelT, changed in place.

    Returns:
        How each tensor of weights is stored.
    """
    found = [w for w in constants.weights(model) if w.values.size >= _FEWEST and w.axis in (0, w.values.ndim - 1)]
    chosen = _choose(found)
    _write(model, found, chosen)
    seen: set[bytes] = set()
    report = []
    for weight, encoded in zip(found, chosen, strict=True):
        if encoded is None:
            report.append(Stored(weight.name, "plain", weight.plain, weight.plain))
            continue
        own = 0 if encoded.ancillary in seen else len(encoded.ancillary)
        seen.add(encoded.ancillary)
        report.append(Stored(weight.name, KINDS[encoded.kind], weight.plain, len(encoded.values) + own))
    return tuple(report)


def _choose(weights: Sequence[Weight]) -> list[Encoded | None]:
    """The shortest way for each; None for as it is."""
    best: list[Encoded | None] = []
    costs: list[int] = []
    for weight in weights:
        ways = [e for e in _ways(weight) if e is not None]
        cost = {id(e): _OPERATOR + _ANCILLARY + len(e.values) + len(e.ancillary) for e in ways}
        way = min(ways, key=lambda e: cost[id(e)])
        better = cost[id(way)] < weight.plain
        best.append(way if better else None)
        costs.append(cost[id(way)] if better else weight.plain)
    for group in _groups(weights, costs):
        for member in group.members:
            best[member] = group.code.encode(weights[member].values)
    return best


def _ways(weight: Weight) -> tuple[Encoded | None, ...]:
    """The ways in which a tensor can be stored by itself, Huffman codes apart."""
    own = encode_tables(weight.values, weight.last) if weight.channels > 1 else None
    return encode_table(weight.values), own, encode_pruned(weight.values)


def _groups(weights: Sequence[Weight], costs: Sequence[int]) -> list[_Group]:
    """Groups of tensors with one Huffman code, which save the most against `costs`: merged two by two."""
    singles = [_group((k,), _counts(w.values)) for k, w in enumerate(weights)]
    groups = [g for g in singles if g is not None and g.bytes < 1.2 * costs[g.members[0]]]
    while True:
        pairs = [(_saved(a, b), i, j) for i, a in enumerate(groups) for j, b in enumerate(groups[:i])]
        merged = None
        for _, i, j in sorted(pairs, reverse=True)[:3]:
            merged = _group(groups[i].members + groups[j].members, groups[i].counts + groups[j].counts)
            if merged is not None and merged.bytes < groups[i].bytes + groups[j].bytes:
                groups = [g for k, g in enumerate(groups) if k not in (i, j)] + [merged]
                break
            merged = None
        if merged is None:
            break
    kept = []
    for group in groups:
        own = [_OPERATOR + group.code.bits(_present(_counts(weights[k].values))) // 8 for k in group.members]
        members = tuple(k for k, cost in zip(group.members, own, strict=True) if cost < costs[k])
        saved = sum(costs[k] - cost for k, cost in zip(group.members, own, strict=True) if cost < costs[k])
        if saved > _ANCILLARY + len(group.code.ancillary):
            kept.append(_Group(members, group.counts, group.code, group.bytes))
    return kept


def _group(members: tuple[int, ...], counts: Array) -> _Group | None:
    present = _present(counts)
    code = huffman_code(present)
    if code is None:
        return None
    size = _ANCILLARY + len(code.ancillary) + _OPERATOR * len(members) + code.bits(present) // 8
    return _Group(members, counts, code, size)


def _saved(a: _Group, b: _Group) -> float:
    """About the bytes that one code for both saves: a table, less what the mixture costs by its entropy."""
    mixed = _information(a.counts + b.counts) - _information(a.counts) - _information(b.counts)
    return min(len(a.code.ancillary), len(b.code.ancillary)) - mixed / 8


def _information(counts: Array) -> float:
    """Bits of values with these counts at their entropy."""
    c = counts[counts > 0]
    return float(np.sum(c * np.log2(c.sum() / c)))


def _counts(values: Array) -> Array:
    return np.bincount(values.reshape(-1).astype(np.int64) + 128, minlength=256)


def _present(counts: Array) -> Counter[int]:
    return Counter({int(k) - 128: int(counts[k]) for k in np.flatnonzero(counts)})


def _write(model: Any, weights: Sequence[Weight], chosen: Sequence[Encoded | None]) -> None:
    graph = model.subgraphs[0]
    ancillaries: dict[bytes, int] = {}
    before: dict[int, list[Any]] = {}
    for weight, encoded in zip(weights, chosen, strict=True):
        if encoded is None:
            continue
        tensor = graph.tensors[weight.tensor]
        tensor.buffer, tensor.type = 0, schema.TensorType.INT8
        first = _add_tensor(model, encoded.values)
        if encoded.ancillary not in ancillaries:
            ancillaries[encoded.ancillary] = _add_tensor(model, encoded.ancillary)
        for k, reader in enumerate(weight.readers):
            made = weight.tensor
            if k:  # what DECODE wrote may be gone after the next operator
                graph.tensors.append(copy.copy(tensor))
                graph.tensors[-1].name = f"{weight.name}_{k}"
                made = len(graph.tensors) - 1
                op = graph.operators[reader]
                op.inputs = [made if i == weight.tensor else int(i) for i in op.inputs]
            decode = schema.OperatorT()
            decode.opcodeIndex = constants.add_code(model, schema.BuiltinOperator.CUSTOM, custom=CUSTOM_CODE)
            decode.inputs, decode.outputs = [first, ancillaries[encoded.ancillary]], [made]
            before.setdefault(reader, []).append(decode)
    constants.insert(model, before)
    constants.drop_unused_buffers(model)


def _add_tensor(model: Any, content: bytes) -> int:
    """A tensor of bytes without a name."""
    tensor = schema.TensorT()
    tensor.type, tensor.shape = schema.TensorType.UINT8, [len(content)]
    tensor.buffer = constants.add_buffer(model, content)
    model.subgraphs[0].tensors.append(tensor)
    return len(model.subgraphs[0].tensors) - 1
