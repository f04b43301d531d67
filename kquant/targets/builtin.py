"""The operators of a TFLite file: one record for each, made in the file of the kernel that is written with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_COLUMN = {"INT8": 1, "UINT8": 1, "INT16": 2}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An operator in numpy, bit for bit with kernels of a runtime.

    Attributes:
        compute: f(operator of the file, values of its inputs as stored, None for an absent one) -> its output, or a
            tuple of its outputs.
        any_type: it moves values of any type; others compute on integers only.
    """

    compute: Callable[..., Any]
    any_type: bool = False


@dataclass(frozen=True, kw_only=True)
class Use:
    """How an operator is used, as far as its version depends on it.

    Attributes:
        dtype: type of the data (see `Builtin.typed_by`).
        weight_dtype: type of its weights, "" if it has none.
        per_channel: these (or the data of DEQUANTIZE) have a scale per channel.
        rank: axes of the data.
        fields: of its options table.
    """

    dtype: str
    weight_dtype: str = ""
    per_channel: bool = False
    rank: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Builtin:
    """An operator of the file.

    Versions are the least that tell an older runtime that it lacks the kernel. Source: GetBuiltinOperatorVersion in
    LiteRT's op_version.cc, except for FULLY_CONNECTED with per-channel int8 weights, where that function answers 4
    although runtimes before version 12 use the first scale for all channels.

    Attributes:
        options: name of its options table; None for none, or an empty one that the runtime does not read.
        versions: for (float32, int8, int16) data.
        weight_versions: (type of the data, type of the weights) -> version.
        least: the smallest version that a use allows.
        typed_by: index of the input whose type says the version; -1 for the output.
        reference: the runtime's reference kernel in numpy.
        optimized: its optimized kernel, where that computes something else.
    """

    options: str | None = None
    versions: tuple[int, int, int] = (1, 1, 1)
    weight_versions: Mapping[tuple[str, str], int] = field(default_factory=dict)
    least: Callable[[Use], int] = lambda use: 1
    typed_by: int = 0
    reference: Reference | None = None
    optimized: Reference | None = None

    def version(self, use: Use) -> int:
        """The version to write."""
        plain = self.versions[_COLUMN.get(use.dtype, 0)]
        return max(self.weight_versions.get((use.dtype, use.weight_dtype), plain), self.least(use))
