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
_HOPELESS = 1.2  # times the other ways' bytes: no shared table makes up for so much
_TRIED = 3  # pairs of groups

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class _Group:
    """Tensors that share a Huffman code."""

    members: tuple[int, ...]
    counts: Array
    code: Code
    bytes: float


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
        own = sum(len(part) for part in (encoded.values, encoded.ancillary) if part not in seen)
        seen |= {encoded.values, encoded.ancillary}
        report.append(Stored(weight.name, KINDS[encoded.kind], weight.plain, own))
    return tuple(report)


def _choose(weights: Sequence[Weight]) -> list[Encoded | None]:
    """The shortest way for each; None for as it is."""
    ways = [[e for e in _ways(weight) if e is not None] for weight in weights]
    readers = Counter(e.ancillary for of_one in ways for e in of_one)
    best: list[Encoded | None] = []
    costs: list[float] = []
    for weight, of_one in zip(weights, ways, strict=True):
        sizes = [
            _OPERATOR + len(e.values) / weight.sharers + (_ANCILLARY + len(e.ancillary)) / readers[e.ancillary]
            for e in of_one
        ]
        shortest = int(np.argmin(sizes))
        plain = weight.plain / weight.sharers
        best.append(of_one[shortest] if sizes[shortest] < plain else None)
        costs.append(min(sizes[shortest], plain))
    for group in _groups(weights, costs):
        for member in group.members:
            best[member] = group.code.encode(weights[member].values)
    return best


def _ways(weight: Weight) -> tuple[Encoded | None, ...]:
    """The ways in which a tensor can be stored by itself, Huffman codes apart."""
    own = encode_tables(weight.values, weight.last) if weight.channels > 1 else None
    return encode_table(weight.values), own, encode_pruned(weight.values)


def _groups(weights: Sequence[Weight], costs: Sequence[float]) -> list[_Group]:
    """Groups of tensors with one Huffman code, which save the most against `costs`: merged two by two."""
    singles = [_group(weights, (k,)) for k in range(len(weights))]
    groups = [g for g in singles if g is not None and g.bytes < _HOPELESS * costs[g.members[0]]]
    while (merged := _merged(weights, groups)) is not None:
        groups = [g for g in groups if not set(g.members) & set(merged.members)] + [merged]
    kept = []
    for group in groups:
        own = {k: _OPERATOR + _coded(group.code, weights[k]) for k in group.members}
        members = tuple(k for k in group.members if own[k] < costs[k])
        if sum(costs[k] - own[k] for k in members) > _ANCILLARY + len(group.code.ancillary):
            kept.append(_Group(members, group.counts, group.code, group.bytes))
    return kept


def _merged(weights: Sequence[Weight], groups: Sequence[_Group]) -> _Group | None:
    """Two groups as one, where that takes fewer bytes: of the pairs that promise most."""
    pairs = [(_saved(a, b), i, j) for i, a in enumerate(groups) for j, b in enumerate(groups[:i])]
    for _, i, j in sorted(pairs, reverse=True)[:_TRIED]:
        both = _group(weights, groups[i].members + groups[j].members)
        if both is not None and both.bytes < groups[i].bytes + groups[j].bytes:
            return both
    return None


def _group(weights: Sequence[Weight], members: tuple[int, ...]) -> _Group | None:
    counts = np.sum([_counts(weights[k].values) for k in members], axis=0)
    code = huffman_code({int(k) - 128: int(counts[k]) for k in np.flatnonzero(counts)})
    if code is None:
        return None
    size = _ANCILLARY + len(code.ancillary) + sum(_OPERATOR + _coded(code, weights[k]) for k in members)
    return _Group(members, counts, code, size)


def _coded(code: Code, weight: Weight) -> float:
    """Bytes of a tensor in a code."""
    counts = _counts(weight.values)
    return code.bits({int(k) - 128: int(counts[k]) for k in np.flatnonzero(counts)}) / 8 / weight.sharers


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
