"""`profile`: what a file costs, layer by layer."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TypeAlias

import keras

from kquant.budget.latency import LatencyTable, measured
from kquant.budget.records import DeviceCost, LayerCost, Profile
from kquant.errors import ModelError
from kquant.graph.quantized import QuantizedGraph
from kquant.graph.transforms import prepare_graph
from kquant.keras.export import export_tflite
from kquant.keras.model import QuantizedModel
from kquant.targets.litert.reader import Program, file_content, read
from kquant.targets.litert.sizes import sizes
from kquant.targets.litert.timing import seconds
from kquant.targets.litert.writer import write_tflite
from kquant.targets.runtime import Footprint
from kquant.targets.target import Target, get_target

Source: TypeAlias = keras.Model | bytes | str | os.PathLike[str]


def profile(
    source: Source,
    target: str = "litert",
    *,
    latency: LatencyTable | str | os.PathLike[str] | bool = True,
    cache: str | os.PathLike[str] | None = None,
    threads: int = 1,
) -> Profile:
    """What a file costs: bytes, multiplications, latency, and what its target's compiler or interpreter says.

    Bytes are exact: those of the operators and of the file's structure add up to its size. Latency on LiteRT is that of
    files of one operator each, measured on this machine once for every signature and kept; the whole file is measured
    beside it. The arena of TensorFlow Lite Micro is its own recorder's; what Vela says is its estimate.

    Args:
        source: a .tflite file, its bytes, or a model: the file of a quantized one as `export_tflite` writes it, the
            float32 file of another.
        target: for which target; the quantized model's own where `source` is one, and this is "litert".
        latency: True measures on this machine; a table, or the path of one, is used as it is; False leaves it out. Only
            for targets that LiteRT's default kernels run.
        cache: where measured latencies are kept (JSON); the user's cache folder by default.
        threads: of the measurement.

    Returns:
        A record; print it, or use `to_json`, `save_html`.

    Raises:
        ExportError: the file is missing, corrupt, or not accepted by the target.
        ModelError: `source` is no model and no file.
        ConfigError: the target is unknown, or the table of latencies cannot be read.
    """
    content, name = _content(source)
    if isinstance(source, QuantizedModel) and target == "litert":
        target = source.quantization.target
    hardware, program = get_target(target), read(content)
    table = _table(content, hardware, latency, cache, threads)
    whole = seconds(content, threads) if table is not None and latency is True else None
    devices, footprints, notes = _devices(content, hardware)
    return _record(name, hardware, content, program, table, whole, devices, footprints, notes)


def _content(source: Source) -> tuple[bytes, str]:
    """The file, and a name for it."""
    if isinstance(source, QuantizedModel):
        return export_tflite(source).content, source.name
    if isinstance(source, keras.Model):
        content, _ = write_tflite(QuantizedGraph(prepare_graph(source), {}, {}), mode="float32")
        return content, source.name
    if isinstance(source, bytes | bytearray | memoryview):
        return file_content(bytes(source)), "model"
    if isinstance(source, str | os.PathLike):
        return file_content(source), Path(source).stem
    raise ModelError(f"profile takes a model, a .tflite file, or its bytes, found {type(source).__name__}.")


def _table(
    content: bytes,
    target: Target,
    latency: LatencyTable | str | os.PathLike[str] | bool,
    cache: str | os.PathLike[str] | None,
    threads: int,
) -> LatencyTable | None:
    if isinstance(latency, LatencyTable):
        return latency
    if isinstance(latency, str | os.PathLike):
        return LatencyTable.load(latency)
    runs_here = target.runtime is not None and target.runtime.timed
    return measured([content], cache=cache, threads=threads) if latency and runs_here else None


def _devices(content: bytes, target: Target) -> tuple[tuple[DeviceCost, ...], tuple[Footprint, ...], tuple[str, ...]]:
    """What the target's runtime says, and a note where it is not installed."""
    runtime = target.runtime
    if runtime is None or runtime.measure is None:
        return (), (), ()
    if not runtime.installed:
        return (), (), (f"{runtime.name} is not installed: pip install '{runtime.package}' for memory and cycles.",)
    footprints = runtime.measure(content)
    devices = tuple(
        DeviceCost(
            device=f.device,
            memory=f.memory,
            flash=f.flash,
            cycles=f.cycles,
            estimated=f.cycles is not None,
            left_out=f.left_out,
        )
        for f in footprints
    )
    return devices, footprints, ()


def _record(
    name: str,
    target: Target,
    content: bytes,
    program: Program,
    table: LatencyTable | None,
    whole: float | None,
    devices: tuple[DeviceCost, ...],
    footprints: tuple[Footprint, ...],
    notes: tuple[str, ...],
) -> Profile:
    cycles = Counter[str]()
    for layer, count in footprints[0].layers if footprints else ():
        cycles[layer] += count
    layers = tuple(
        LayerCost(
            name=op.outputs[0].name if op.outputs else "",
            op=op.code,
            bytes=size.constants + size.parameters,
            macs=size.macs,
            bit_operations=size.bit_operations,
            weight_bits=size.weight_bits,
            seconds=None if table is None else table.of(op),
            cycles=cycles[op.outputs[0].name] if cycles and op.outputs else None,
        )
        for op, size in zip(program.operators, sizes(program), strict=True)
    )
    times = [x.seconds for x in layers]
    known = None if table is None or None in times else table.start + sum(t for t in times if t is not None)
    unknown = sum(t is None for t in times) if table is not None else 0
    if unknown:
        notes = (*notes, f"the latency of {unknown} operators is not known, so there is no sum.")
    return Profile(
        name=name,
        target=target.name,
        bytes=len(content),
        structure=len(content) - sum(x.bytes for x in layers),
        seconds=known,
        measured_seconds=whole,
        latency_device="" if table is None else table.device,
        devices=devices,
        layers=layers,
        notes=notes,
    )
