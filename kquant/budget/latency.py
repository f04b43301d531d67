"""Latencies by the signature of an operator: measured here once and kept as JSON, or measured on another device."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from kquant.errors import ConfigError, ExportError
from kquant.targets.litert.reader import Operator, read
from kquant.targets.litert.timing import alone, overhead, seconds, signature

_SWEEPS = 3  # over all operators, the fastest of which counts: a machine is slower at times
_ENTIRE = "(start)"  # the entry of what a file takes beside its operators


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """What operators take on one device.

    Attributes:
        device: processor, runtime and threads.
        seconds: signature of an operator (`targets.litert.timing`) -> its time.
    """

    device: str
    seconds: Mapping[str, float] = field(repr=False)

    def of(self, op: Operator) -> float | None:
        """Time of an operator; None where the table does not have it."""
        return self.seconds.get(signature(op))

    @property
    def start(self) -> float:
        """Time of a file beside its operators."""
        return self.seconds.get(_ENTIRE, 0.0)

    def missing(self, operators: Iterable[Operator]) -> tuple[Operator, ...]:
        """The operators that are not in the table, each signature once."""
        found = {signature(op): op for op in operators}
        return tuple(op for key, op in found.items() if key not in self.seconds)

    def total(self, content: bytes) -> float:
        """Time of a file: the sum of its operators and the start.

        Raises:
            ConfigError: an operator is not in the table.
        """
        operators = read(content).operators
        if absent := self.missing(operators):
            raise ConfigError(
                f"The latencies of {self.device!r} lack {len(absent)} operators, such as {signature(absent[0])!r}: "
                "measure the file on that device with kquant-profile --latencies=..., and pass the table again."
            )
        return self.start + sum(self.seconds[signature(op)] for op in operators)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, replacing a file in one step."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + f".{os.getpid()}.part")
        part.write_text(json.dumps({"device": self.device, "seconds": dict(self.seconds)}, indent=1), encoding="utf-8")
        os.replace(part, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read what `save` wrote.

        Raises:
            ConfigError: there is no such file, or it is no such table.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(device=str(values["device"]), seconds={str(k): float(v) for k, v in values["seconds"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"Cannot read the latencies {os.fspath(path)!r}: {error!r}. Remove the file.") from error


def this_device(threads: int = 1) -> str:
    """A name for the processor, the runtime, and the number of threads."""
    return f"{_processor()}, ai-edge-litert {version('ai-edge-litert')}, {threads} thread{'s' * (threads > 1)}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cache_path(threads: int = 1) -> Path:
    """Where latencies of this device are kept: $XDG_CACHE_HOME/kquant, by default ~/.cache/kquant."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "".join(c if c.isalnum() else "_" for c in this_device(threads))
    return folder / "kquant" / f"latency_{name}.json"


def measured(
    contents: Iterable[bytes], *, cache: str | os.PathLike[str] | None = None, threads: int = 1
) -> LatencyTable:
    """The table of this device with every operator of some files; what it lacks is measured and kept.

    Args:
        contents: files.
        cache: the JSON file; `cache_path` by default.
        threads: number of threads.

    Raises:
        ConfigError: the file holds latencies of another device.
    """
    path, device = Path(cache or cache_path(threads)), this_device(threads)
    table = LatencyTable.load(path) if path.exists() else LatencyTable(device=device, seconds={})
    if table.device != device:
        raise ConfigError(
            f"{str(path)!r} holds latencies of {table.device!r}, and this is {device!r}: name another file, or pass "
            "LatencyTable.load(...) to use them as they are."
        )
    known = dict(table.seconds)
    absent = table.missing(op for content in contents for op in read(content).operators)
    if absent or _ENTIRE not in known:
        times: dict[str, list[float]] = {}
        for _ in range(_SWEEPS):
            times.setdefault(_ENTIRE, []).append(overhead(threads))
            for op in absent:
                try:
                    times.setdefault(signature(op), []).append(seconds(alone(op), threads))
                except ExportError:  # what cannot run alone, such as an operator on constants, is not known
                    continue
        start = known.setdefault(_ENTIRE, min(times.pop(_ENTIRE)))
        known |= {key: max(0.0, min(found) - start) for key, found in times.items() if found}
        table = LatencyTable(device=device, seconds=known)
        table.save(path)
    return table
