"""Frozen records to strict JSON and back: numbers that JSON lacks travel as "NaN", "Infinity" and "-Infinity"."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from kquant.errors import DiagnosisError

T = TypeVar("T")


def to_json(record: Any, indent: int | None = None) -> str:
    """A dataclass of numbers, strings, tuples, mappings and dataclasses as a JSON document."""
    return json.dumps(_plain(record), indent=indent, allow_nan=False)


def from_json(kind: type[T], text: str) -> T:
    """The inverse of `to_json`, told the fields' types by the dataclass `kind`.

    Raises:
        DiagnosisError: the text is no JSON, or not of such a record; names the field.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DiagnosisError(f"This is no {kind.__name__} in JSON: {error}.") from error
    return _build(kind, values, kind.__name__)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value.item() if hasattr(value, "item") else value  # a numpy scalar


def _build(kind: Any, value: Any, where: str) -> Any:
    """A value of the annotated type `kind`; `where` is its path, for messages."""
    if is_dataclass(kind):
        return _record(kind, value, where)
    origin = get_origin(kind)
    if origin in (types.UnionType, Union):
        inner = next(k for k in get_args(kind) if k is not type(None))
        return None if value is None else _build(inner, value, where)
    if origin is tuple:
        items, args = _expect(list, value, where), get_args(kind)
        inner_kinds = [args[0]] * len(items) if args[-1] is Ellipsis else args
        if len(items) != len(inner_kinds):
            raise DiagnosisError(f"{where} must hold {len(inner_kinds)} values, found {len(items)}.")
        return tuple(_build(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(inner_kinds, items, strict=True)))
    if kind is float:
        return float(value if value in ("NaN", "Infinity", "-Infinity") else _expect((int, float), value, where))
    return _expect({Mapping: dict}.get(origin, kind), value, where)


def _record(kind: Any, value: Any, where: str) -> Any:
    values, hints = _expect(dict, value, where), get_type_hints(kind)
    if set(values) != set(hints):
        names = sorted(set(values) ^ set(hints))
        raise DiagnosisError(f"{where}: unknown or missing: {', '.join(names)}; save it with this version of kquant.")
    return kind(**{name: _build(hint, values[name], f"{where}.{name}") for name, hint in hints.items()})


def _expect(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DiagnosisError(f"{where} must be {expected}, found {value!r}.")
    return value
