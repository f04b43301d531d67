"""Compiling a TFLite file for an Arm Ethos-U by Vela, and what Vela says about it.

Cycles, and so the time, are the compiler's own estimates, by which it makes decisions: good for comparing files on
one accelerator, not for predicting a device.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kquant.errors import ExportError, MissingPackageError
from kquant.targets.litert.reader import file_content, read

# family -> the system configuration (of Arm's vela.ini) in which weights lie in flash and activations in SRAM
SYSTEMS: Mapping[str, str] = {
    "ethos-u55": "Ethos_U55_High_End_Embedded",
    "ethos-u65": "Ethos_U65_Embedded",
    "ethos-u85": "Ethos_U85_SYS_Flash_High",
}
MEMORY_MODE = "Shared_Sram"
_SIZES: Mapping[str, tuple[int, ...]] = {
    "ethos-u55": (32, 64, 128, 256),
    "ethos-u65": (256, 512),
    "ethos-u85": (128, 256, 512, 1024, 2048),
}
ACCELERATORS = tuple(f"{family}-{macs}" for family, sizes in _SIZES.items() for macs in sizes)
_REMEDY = 'Quantize and export with config={"target": "ethos_u"}, or take the operation out of the model.'


@dataclass(frozen=True, kw_only=True)
class CpuOperator:
    """An operator that the accelerator leaves to the CPU: its type, its output's name, the compiler's reason."""

    code: str
    output: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.code} (making {self.output!r})" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """A row of the compiler's table: an operation, where it runs, its cycles and multiplications."""

    name: str
    op: str
    runs_on: str
    cycles: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What Vela made of a file.

    Attributes:
        accelerator: for example "ethos-u55-128": the family, and its multiplications per cycle.
        system_config: clock and memories.
        memory_mode: where weights and activations lie.
        cpu_operators: what is left to the CPU; () where all of it runs on the accelerator.
        npu_operators: how many run there.
        sram: bytes of on-chip memory.
        dram: bytes of off-chip memory that is read and written.
        flash: bytes of the encoded weights and commands, where they lie in flash.
        cycles: estimated, of one inference.
        seconds: these at the accelerator's clock.
        macs: multiplications of one inference.
        layers: a row for each operation, in order.
        content: the compiled file.
    """

    accelerator: str
    system_config: str
    memory_mode: str
    cpu_operators: tuple[CpuOperator, ...]
    npu_operators: int
    sram: int
    dram: int
    flash: int
    cycles: int
    seconds: float
    macs: int
    layers: tuple[LayerCost, ...] = field(repr=False)
    content: bytes = field(repr=False)

    def __str__(self) -> str:
        lines = [
            f"{self.accelerator} ({self.system_config}, {self.memory_mode}): {self.sram:,} bytes of SRAM, "
            f"{self.flash:,} of flash, {self.dram:,} of DRAM, {self.cycles:,} cycles (estimated), "
            f"{self.npu_operators} operators, {len(self.cpu_operators)} on the CPU"
        ]
        return "\n".join([*lines, *(f"  on the CPU: {op}" for op in self.cpu_operators)])


def compile_file(
    source: bytes | str | os.PathLike[str],
    accelerator: str = "ethos-u55-128",
    *,
    system_config: str | None = None,
    memory_mode: str = MEMORY_MODE,
) -> Compiled:
    """Compile a TFLite file.

    Args:
        source: the file's path or its bytes.
        accelerator: one of `ACCELERATORS`.
        system_config: a section of Arm's vela.ini; by default the family's with flash (`SYSTEMS`).
        memory_mode: likewise.

    Returns:
        What Vela says; operators that it leaves to the CPU are no error.

    Raises:
        ExportError: the file is missing or corrupt, the accelerator unknown, or Vela fails: with its message.
        MissingPackageError: Vela is not installed.
    """
    content = file_content(source)
    if accelerator not in ACCELERATORS:
        raise ExportError(f"Unknown accelerator {accelerator!r}; known are {', '.join(ACCELERATORS)}.")
    if importlib.util.find_spec("ethosu") is None or importlib.util.find_spec("ethosu.vela") is None:
        raise MissingPackageError("Vela is not installed: pip install 'kquant[ethos-u]' (or pip install ethos-u-vela).")
    system = system_config or SYSTEMS[accelerator.rsplit("-", 1)[0]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.tflite")
        path.write_bytes(content)
        options = [f"--accelerator-config={accelerator}", f"--system-config={system}", f"--memory-mode={memory_mode}"]
        config, output = "--config=Arm/vela.ini", f"--output-dir={folder}"
        # A process of its own: on what it does not expect, the compiler dies of a signal.
        done = subprocess.run(
            [sys.executable, "-m", "ethosu.vela", str(path), *options, config, output, "--verbose-performance"],
            capture_output=True,
            text=True,
            cwd=folder,
        )
        made = Path(folder, "model_vela.tflite")
        if done.returncode or not made.exists():
            raise ExportError(_failure(content, done, accelerator))
        compiled = made.read_bytes()
        summary = _rows(Path(folder), "model_summary_*.csv")[0]
        layers = tuple(_layer(row) for row in _rows(Path(folder), "model_per-layer.csv"))
    on_cpu = _cpu_operators(content, compiled, done.stdout)
    counted = re.search(r"NPU operators = (\d+)", done.stdout)
    return Compiled(
        accelerator=accelerator,
        system_config=system,
        memory_mode=memory_mode,
        cpu_operators=on_cpu,
        npu_operators=int(counted[1]) if counted else 0,
        sram=_bytes(summary, "sram"),
        dram=_bytes(summary, "dram"),
        flash=_bytes(summary, "on_chip_flash") + _bytes(summary, "off_chip_flash"),
        cycles=round(float(summary["cycles_total"])),
        seconds=float(summary["inference_time"]),
        macs=round(float(summary["nn_macs"])),
        layers=layers,
        content=compiled,
    )


def _rows(folder: Path, pattern: str) -> list[dict[str, str]]:
    found = sorted(folder.glob(pattern))
    if not found:
        return []
    with found[0].open(newline="") as file:
        return list(csv.DictReader(file))


def _bytes(summary: Mapping[str, str], memory: str) -> int:
    return round(1024 * float(summary[f"{memory}_memory_used"]))


def _layer(row: Mapping[str, str]) -> LayerCost:
    return LayerCost(
        name=row["Name"],
        op=row["Original Operator"],
        runs_on=row["Target"],
        cycles=round(float(row["Op Cycles"])),
        macs=round(float(row["MAC Count"])),
    )


def _cpu_operators(content: bytes, compiled: bytes, said: str) -> tuple[CpuOperator, ...]:
    """The operators of the compiled file that are those of the original: the accelerator's are one custom operator."""
    reasons = dict(re.findall(r"operator: \w+, ofm: '(.*)'\nReason: (.*)", said))
    original = {op.outputs[0].name: op.code for op in read(content).operators if op.outputs}
    left = [op for op in read(compiled).operators if op.code != "CUSTOM"]
    names = [op.outputs[0].name if op.outputs else "" for op in left]
    return tuple(
        CpuOperator(code=original.get(name, op.code), output=name, reason=reasons.get(name, ""))
        for op, name in zip(left, names, strict=True)
    )


def _failure(content: bytes, done: subprocess.CompletedProcess[str], accelerator: str) -> str:
    """Why Vela failed, as far as one can tell."""
    packed = [
        str(op)
        for op in read(content).operators
        if any(t is not None and t.type in ("INT4", "INT2") for t in op.inputs)
    ]
    if packed:
        more = f" and {len(packed) - 1} others" if len(packed) > 1 else ""
        return f"Vela has no kernel for weights in int4 or int2 tensors, found in {packed[0]}{more}. {_REMEDY}"
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [k for k, line in enumerate(lines) if "rror:" in line]
    reason = " ".join(lines[errors[0] :] if errors else lines[-3:]) or f"exit status {done.returncode}"
    return f"Vela cannot compile the file for {accelerator}: {reason}. {_REMEDY}"
