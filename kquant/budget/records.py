"""What a file costs: plain records, printed, as JSON, and as a page."""

from __future__ import annotations

import os
import pathlib
from dataclasses import asdict, dataclass, field
from typing import Any

from kquant.config.text import table
from kquant.diagnosis import serialize


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one operator of a file costs.

    Attributes:
        name: of its output, which is the node's for the last operator of a node.
        op: the operator.
        bytes: its constants and their scales, as stored; what operators share is the first one's.
        macs: multiplications of one inference.
        bit_operations: these times the bits of weights and activations.
        weight_bits: bits of the widest weight, 0 where it has none.
        seconds: its time; None where it is not known.
        cycles: the compiler's estimate; None where there is none.
    """

    name: str
    op: str
    bytes: int
    macs: int
    bit_operations: int
    weight_bits: int
    seconds: float | None = None
    cycles: int | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceCost:
    """What the file takes on a device of the target; `estimated`: as its compiler guesses, not as measured.

    Attributes:
        device: whose compiler or interpreter says so.
        memory: bytes that are written: the arena, SRAM.
        flash: bytes that are read only.
        cycles: of one inference; None where nothing tells. Always an estimate.
        estimated: memory and flash are the compiler's, too.
        left_out: operators that do not run on the device's accelerator.
    """

    device: str
    memory: int
    flash: int
    cycles: int | None = None
    estimated: bool = False
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a file costs in all, and by operator.

    Attributes:
        name: of the model or file.
        target: the name of the target.
        bytes: size of the file: the sum of its `layers` and of its `structure`.
        structure: bytes that are no layer's: tables of tensors and operators, names, alignment.
        seconds: time of one inference, the sum of its operators and the start; None where an operator's is not known.
        measured_seconds: of the whole file on this machine; None where it was not measured.
        latency_device: where the operators were measured, "" where they were not.
        devices: what the target's compiler or interpreter says; () where nothing does.
        layers: one for each operator, in order.
        notes: what a reader should know.
    """

    name: str
    target: str
    bytes: int
    structure: int
    seconds: float | None
    measured_seconds: float | None
    latency_device: str
    devices: tuple[DeviceCost, ...] = ()
    layers: tuple[LayerCost, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()

    @property
    def macs(self) -> int:
        """Multiplications of one inference."""
        return sum(layer.macs for layer in self.layers)

    @property
    def bit_operations(self) -> int:
        """Multiplications times the bits of both factors."""
        return sum(layer.bit_operations for layer in self.layers)

    def __str__(self) -> str:
        timed, cycles = self.latency_device != "", any(x.cycles is not None for x in self.layers)
        header: tuple[str, ...] = ("layer", "operator", "bytes", "MACs", "bit-ops", "bits")
        header += ("ms",) * timed + ("cycles (estimated)",) * cycles
        rows: list[tuple[Any, ...]] = []
        for x in self.layers:
            row = (x.name, x.op, f"{x.bytes:,}", f"{x.macs:,}", f"{x.bit_operations:,}", x.weight_bits or "")
            ends = ("" if x.seconds is None else f"{1e3 * x.seconds:.4f}",) * timed
            rows.append(row + ends + ("" if x.cycles is None else f"{x.cycles:,}",) * cycles)
        rows.append(("(structure of the file)", "", f"{self.structure:,}") + ("",) * (len(header) - 3))
        return "\n".join([*self.summary, "", table(header, rows), *(f"note: {note}" for note in self.notes)])

    @property
    def summary(self) -> tuple[str, ...]:
        """The totals, a line each."""
        lines = [
            f"{self.name} for {self.target}: {self.bytes:,} bytes, {self.macs:,} MACs, {self.bit_operations:,} bit-ops"
        ]
        if self.seconds is not None:
            whole = "" if self.measured_seconds is None else f", {1e3 * self.measured_seconds:.3f} ms as a whole"
            lines.append(f"latency: {1e3 * self.seconds:.3f} ms by operators{whole} ({self.latency_device})")
        for d in self.devices:
            said = f"{d.device}: {d.memory:,} bytes of memory, {d.flash:,} of flash"
            said += "" if d.cycles is None else f", {d.cycles:,} cycles"
            lines.append(said + (" (the compiler's estimate)" if d.estimated else ""))
            lines += [f"  not on the accelerator: {op}" for op in d.left_out]
        return tuple(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return asdict(self)

    def to_json(self) -> str:
        """A JSON document, which `from_json` reads."""
        return serialize.to_json(self, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """The inverse of `to_json`.

        Raises:
            DiagnosisError: the text is no such document.
        """
        return serialize.from_json(cls, text)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write a page with bars that opens offline."""
        from kquant.budget.page import profile_page

        pathlib.Path(path).write_text(profile_page(self), encoding="utf-8")
