"""The target "tflm": TensorFlow Lite Micro with its reference kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from kquant.targets.litert.target import LITERT
from kquant.targets.runtime import Footprint, KernelSet, Runtime
from kquant.targets.tflm.kernels import KERNELS, REFERENCE
from kquant.targets.tflm.runtime import MicroModel, arena
from kquant.targets.tflm.storage import decode_operators


def _measure(content: bytes) -> tuple[Footprint, ...]:
    return (Footprint(device="tflite-micro", memory=arena(content).total, flash=len(content)),)


MICRO = Runtime(
    name="TensorFlow Lite Micro",
    package="kquant[tflm]",
    module="tflite_micro",
    open=MicroModel,
    checks=(KernelSet(name="tflite-micro", open=partial(MicroModel, keep_tensors=True), reference=REFERENCE),),
    exact=True,
    samples=20,
    measure=_measure,
)
TFLM = replace(LITERT, name="tflm", kernels=KERNELS, runtime=MICRO, storage={"tflm": decode_operators})
