"""What runs or checks the files of a target: records that the verifier reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import numpy as np

from kquant.targets.builtin import Reference


class Runner(Protocol):
    """A file that is ready to run."""

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs, as stored, of one batch: an array per input, as stored or float32, which is quantized."""

    def predict_batches(self, batches: Iterable[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Real-valued outputs, concatenated, for a stream of batches."""

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors of the last run that are readable, as stored, by name."""


@dataclass(frozen=True, kw_only=True)
class KernelSet:
    """Kernels whose every tensor can be compared.

    Attributes:
        name: of the kernels, for reports.
        open: a file -> what runs it, keeping every tensor readable. It raises ExportError where the kernels do not
            accept the file.
        reference: operator of the file -> the same arithmetic in numpy, bit for bit.
    """

    name: str
    open: Callable[[bytes], Runner]
    reference: Mapping[str, Reference]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a file takes on a device.

    Attributes:
        device: whose compiler or interpreter says so.
        memory: bytes of memory that is written.
        flash: bytes that are only read.
        cycles: of one inference, where the compiler estimates them.
        left_out: operators that do not run on the device's accelerator, with the reason.
        layers: (name, cycles) of each operation, where the compiler estimates them.
    """

    device: str
    memory: int
    flash: int
    cycles: int | None = None
    left_out: tuple[str, ...] = ()
    layers: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        cycles = "" if self.cycles is None else f", {self.cycles:,} cycles (estimated)"
        return f"{self.device}: {self.memory:,} bytes of memory, {self.flash:,} of flash{cycles}"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What runs the files of a target.

    Attributes:
        name: of the runtime, for messages.
        package: what to `pip install` for it.
        module: the module that is there once it is installed.
        open: a file -> what runs it as the device does. It raises ExportError where the runtime does not accept it.
        checks: kernels to compare every tensor with; the first that accept a file are taken. None where only the
            outputs can be read.
        other: other kernels of the runtime, whose agreement with `open` is the floor for the simulation's; None where
            there are none.
        exact: the outputs of `open` equal those of the numpy reference, bit for bit.
        samples: how many are run by default.
        timed: its files take as long on a device as LiteRT's default kernels need there, which can be measured here.
        measure: a file -> what it takes on each device; None where nothing tells.
    """

    name: str
    package: str
    module: str
    open: Callable[[bytes], Runner]
    checks: tuple[KernelSet, ...] = ()
    other: Callable[[bytes], Runner] | None = None
    exact: bool = False
    samples: int = 1000
    timed: bool = False
    measure: Callable[[bytes], tuple[Footprint, ...]] | None = None

    @property
    def installed(self) -> bool:
        """Whether `open` can be called."""
        return find_spec(self.module) is not None
