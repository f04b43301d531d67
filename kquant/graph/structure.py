"""The structure of a model's inputs and outputs.

A structure is a nest of dicts, lists and tuples whose leaves are positions in the flat order of the graph:
{"box": 0, "extra": [1, 2]}. None is the usual one: a tensor for one, a list for several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def is_plain(structure: Any) -> bool:
    """Whether it is one tensor or a flat list of them."""
    return (
        structure is None or not isinstance(structure, Mapping) and all(isinstance(s, int) for s in _items(structure))
    )


def pack(structure: Any, leaves: Sequence[Any]) -> Any:
    """The leaves, which are in flat order, in the structure."""
    if structure is None:
        return leaves[0] if len(leaves) == 1 else list(leaves)
    if isinstance(structure, int):
        return leaves[structure]
    if isinstance(structure, Mapping):
        return {key: pack(part, leaves) for key, part in structure.items()}
    packed = [pack(part, leaves) for part in structure]
    return tuple(packed) if isinstance(structure, tuple) else packed


def unpack(structure: Any, names: Sequence[str], nest: Any) -> list[Any]:
    """The leaves of `nest` in flat order.

    Args:
        structure: of the nest.
        names: of the leaves, in flat order.
        nest: in that structure, or a dict by the names, or the flat sequence, or (where there is one leaf) the leaf.

    Raises:
        ValueError: it is none of them; the message says what was expected.
    """
    if isinstance(nest, Mapping) and nest.keys() == set(names):
        return [nest[name] for name in names]
    if not is_plain(structure) and (leaves := _leaves(structure, nest)) is not None:
        return [leaves[k] for k in sorted(leaves)]
    flat = list(nest) if isinstance(nest, list | tuple) else [nest]
    if isinstance(nest, Mapping) or len(flat) != len(names):
        found = f"the keys {list(nest)}" if isinstance(nest, Mapping) else f"{len(flat)} arrays"
        raise ValueError(
            f"Expected {len(names)} arrays, in this order or in a dict by the names {list(names)}: found {found}."
        )
    return flat


def paths(structure: Any, names: Sequence[str]) -> list[str]:
    """A name for every leaf: its keys and positions, joined by "/" where the structure is nested, else `names`."""
    if is_plain(structure):
        return list(names)
    found: dict[int, str] = {}

    def walk(part: Any, path: tuple[str, ...]) -> None:
        if isinstance(part, int):
            found[part] = "/".join(path) if path else names[part]
            return
        pairs = part.items() if isinstance(part, Mapping) else enumerate(part)
        for key, item in pairs:
            walk(item, (*path, str(key)))

    walk(structure, ())
    return [found[k] for k in sorted(found)]


def _items(structure: Any) -> Sequence[Any]:
    return structure if isinstance(structure, list | tuple) else [structure]


def _leaves(structure: Any, nest: Any) -> dict[int, Any] | None:
    """Position -> leaf; None where `nest` is built otherwise."""
    if isinstance(structure, int):
        return {structure: nest}
    if isinstance(structure, Mapping):
        if not isinstance(nest, Mapping) or nest.keys() != structure.keys():
            return None
        pairs = [(structure[key], nest[key]) for key in structure]
    else:
        if not isinstance(nest, list | tuple) or len(nest) != len(structure):
            return None
        pairs = list(zip(structure, nest, strict=True))
    found: dict[int, Any] = {}
    for part, item in pairs:
        leaves = _leaves(part, item)
        if leaves is None:
            return None
        found.update(leaves)
    return found
