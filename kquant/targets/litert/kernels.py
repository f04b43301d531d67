"""LiteRT's kernels, by operation, and their arithmetic in numpy, by operator of the file.

Every record was run on LiteRT's kernels (XNNPACK, optimized, and reference, which lack ELU); what is not among them
cannot be exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kquant.targets.builtin import Reference
from kquant.targets.kernel import Kernel
from kquant.targets.litert import activations, elementwise, layout, linear, reductions

KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {k.op: k for family in (linear, elementwise, activations, reductions, layout) for k in family.KERNELS}
)
_BUILTINS = {name: b for kernel in KERNELS.values() for name, b in kernel.operators.items()}
REFERENCE: Mapping[str, Reference] = MappingProxyType({k: b.reference for k, b in _BUILTINS.items() if b.reference})
OPTIMIZED: Mapping[str, Reference] = MappingProxyType(
    {k: found for k, b in _BUILTINS.items() if (found := b.optimized or b.reference)}
)
