"""The target "ethos_u": Arm Ethos-U55, U65 and U85.

Their compiler takes what LiteRT's kernels take, with weights in int8 tensors: it encodes them, and fewer distinct
values take fewer bits of flash. There is no simulator of the hardware here: numbers come from LiteRT's reference
kernels, which the hardware is made to follow.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from kquant.targets.ethos_u.vela import compile_file
from kquant.targets.litert.kernels import REFERENCE_KERNELS
from kquant.targets.litert.runtime import TFLiteModel
from kquant.targets.litert.target import INTERPRETER, LITERT
from kquant.targets.runtime import Footprint

ACCELERATORS = ("ethos-u55-128", "ethos-u85-256")  # that `verify_tflite` compiles for


def _measure(content: bytes) -> tuple[Footprint, ...]:
    made = [compile_file(content, accelerator) for accelerator in ACCELERATORS]
    return tuple(
        Footprint(
            device=c.accelerator,
            memory=c.sram,
            flash=c.flash,
            cycles=c.cycles,
            left_out=tuple(map(str, c.cpu_operators)),
            layers=tuple((layer.name, layer.cycles) for layer in c.layers),
        )
        for c in made
    )


COMPILED = replace(
    INTERPRETER,
    name="Vela and LiteRT",
    package="kquant[ethos-u]",
    module="ethosu",
    open=partial(TFLiteModel, kernels="reference"),
    other=TFLiteModel,
    exact=True,
    timed=False,
    samples=20,
    measure=_measure,
)
ETHOS_U = replace(
    LITERT,
    name="ethos_u",
    kernels=REFERENCE_KERNELS,
    packed_weights=False,
    fixed_batch=True,
    runtime=COMPILED,
    storage={},
)
