"""The targets whose files run on LiteRT.

They describe the integer kernels of LiteRT 2.3 (TensorFlow 2.21), as measured: a combination that a kernel takes but
computes wrongly is not offered. "simulation" also takes what no kernel computes, float weights with integer
activations, to tell the effects of the two apart.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from kquant.targets.litert.flatbuffer import for_reference_kernels
from kquant.targets.litert.kernels import KERNELS, OPTIMIZED, REFERENCE
from kquant.targets.litert.runtime import TFLiteModel
from kquant.targets.litert.storage import densify
from kquant.targets.runtime import KernelSet, Runtime
from kquant.targets.target import Target


def _reference(content: bytes) -> TFLiteModel:
    return TFLiteModel(for_reference_kernels(content), "reference", keep_tensors=True)


INTERPRETER = Runtime(
    name="LiteRT",
    package="ai-edge-litert",
    module="ai_edge_litert",
    open=TFLiteModel,
    timed=True,
    other=partial(TFLiteModel, kernels="builtin"),
    checks=(
        KernelSet(name="reference", open=_reference, reference=REFERENCE),
        KernelSet(name="builtin", open=partial(TFLiteModel, kernels="builtin", keep_tensors=True), reference=OPTIMIZED),
    ),
)
LITERT = Target(
    name="litert", kernels=KERNELS, activation_bits=(8, 16), runtime=INTERPRETER, storage={"densify": densify}
)
LITERT_PER_TENSOR = replace(LITERT, name="litert_per_tensor", activation_bits=(8,), per_channel_weights=False)
SIMULATION = replace(LITERT, name="simulation", float_weights=True, runtime=None, storage={})
