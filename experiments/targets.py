"""What the files of the targets take on their devices.

Each model is quantized for each target. The file for "tflm" runs on TensorFlow Lite Micro and must equal the integer
reference at its outputs, bit for bit; the file for "ethos_u" is compiled by Vela for two accelerators. Accuracies are
LiteRT's: of its own kernels ("builtin"), which compute the same with int4 and int8 weights of equal integers, and of
the default ones, which round int8 (XNNPACK) and int4 (their own) differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import kquant
from kquant.targets.ethos_u.target import ACCELERATORS
from kquant.targets.ethos_u.vela import compile_file
from kquant.targets.litert.reference.interpreter import IntegerReference
from kquant.targets.litert.runtime import as_stored
from kquant.targets.tflm.kernels import REFERENCE
from kquant.targets.tflm.runtime import MicroModel, arena

from . import zoo
from .tables import Options, Table

MICRO_SAMPLES = 20
HEADER = (
    *("model", "preset", "target", "bytes", "arena", "accelerator", "sram", "flash", "cycles", "cpu_operators"),
    *("top1", "top1_default", "samples"),
)


def targets(name: str, options: Options) -> Iterator[Sequence[Any]]:
    """The files of every preset and target: size, memory, cycles, accuracy."""
    model, data = zoo.load_model(name), zoo.calibration(name, options.calibration)
    for preset in options.configs:
        for target in ("litert", "tflm", "ethos_u"):
            config = {"preset": preset, "target": target}
            content = kquant.export_tflite(kquant.quantize_model(model, data, config, progress=False)).content
            batches = zoo.record(name).evaluation(options.samples)
            scores = [zoo.top1(content, batches, kernels) for kernels in ("builtin", "default")]
            ends = (*(score for score, _ in scores), scores[0][1])
            first = (name, preset, target, len(content))
            if target == "tflm":
                compare_on_micro(content, name)
                yield *first, arena(content).total, "", "", "", "", "", *ends
            elif target == "ethos_u":
                for accelerator in ACCELERATORS:
                    c = compile_file(content, accelerator)
                    yield *first, "", accelerator, c.sram, c.flash, c.cycles, len(c.cpu_operators), *ends
            else:
                yield *first, "", "", "", "", "", "", *ends


def compare_on_micro(content: bytes, name: str, samples: int = MICRO_SAMPLES) -> None:
    """Run samples on TensorFlow Lite Micro and on the integer reference.

    Raises:
        RuntimeError: an output differs.
    """
    micro, reference = MicroModel(content), IntegerReference(content, kernels=REFERENCE)
    batches = zoo.record(name).evaluation(samples)
    x = as_stored(np.concatenate([np.asarray(x) for x, _ in batches])[:samples], micro.inputs[0])
    made = reference.run([x])
    for output, found in zip(micro.outputs, micro.run([x]), strict=True):
        unequal = int(np.sum(made[output["name"]] != found))
        if unequal:
            raise RuntimeError(
                f"{name}: {unequal} of {found.size} elements of {output['name']!r} differ between TensorFlow Lite "
                f"Micro and the integer reference, {len(x)} samples"
            )


TABLES = {"targets": Table(targets, HEADER, ("model", "preset", "target", "accelerator"))}
