"""LiteRT's kernels, by operation, and their arithmetic in numpy, by operator of the file.

`KERNELS` compute what the default interpreter does (XNNPACK, and LiteRT's optimized kernels for what that leaves),
`REFERENCE_KERNELS` on int8 tensors what the portable reference kernels do, from which those of microcontrollers come.

Every record was run on LiteRT's kernels (XNNPACK, optimized, and reference, which lack ELU); what is not among them
cannot be exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from kquant.targets.builtin import Reference
from kquant.targets.kernel import Kernel
from kquant.targets.litert import activations, elementwise, functions, layout, linear, normalization, reductions

_FAMILIES = (linear, elementwise, activations, functions, normalization, reductions, layout)
KERNELS: Mapping[str, Kernel] = MappingProxyType({k.op: k for family in _FAMILIES for k in family.KERNELS})
_ROUNDING = {op: {8: arithmetic} for family in _FAMILIES for op, arithmetic in family.REFERENCE.items()}
REFERENCE_KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        op: replace(k, arithmetic={**k.arithmetic, **_ROUNDING.get(op, {})}, slowdown={}, variants={})
        for op, k in KERNELS.items()
    }
)
_BUILTINS = {name: b for kernel in KERNELS.values() for name, b in kernel.operators.items()}
REFERENCE: Mapping[str, Reference] = MappingProxyType({k: b.reference for k, b in _BUILTINS.items() if b.reference})
OPTIMIZED: Mapping[str, Reference] = MappingProxyType(
    {k: found for k, b in _BUILTINS.items() if (found := b.optimized or b.reference)}
)
