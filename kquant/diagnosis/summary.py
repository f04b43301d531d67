"""A diagnosis in the terminal: what is wrong, where the score goes, and what to do, in at most 40 lines."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from kquant.config.text import table

if TYPE_CHECKING:
    from kquant.diagnosis.records import Diagnosis

SCORES, FINDINGS, CONFIG, ADVICE = 8, 3, 9, 2  # rows of each part at most; the report has all of it


def decimals(score: float) -> int:
    """Digits behind the point that show a score of this size to four digits: 68.23 or 0.6823."""
    return 4 if not math.isfinite(score) or score == 0 else min(6, max(0, 3 - math.floor(math.log10(abs(score)))))


def waterfall(diagnosis: Diagnosis) -> list[tuple[str, float, str]]:
    """(name, score, kind) of every network that was measured, from float to the last; kind is "float", "stage",
    "quantized", "target" or "recommended"."""
    d = diagnosis
    rows: list[tuple[str, float | None, str]] = [("float model", d.float_score, "float")]
    rows += [(stage.name, stage.score, "stage") for stage in d.stages]
    rows += [("quantized, simulation", d.quantized_score, "quantized"), (".tflite file", d.target_score, "target")]
    rows.append(("recommended config", d.recommended_score, "recommended"))
    return [(name, score, kind) for name, score, kind in rows if score is not None]


def changes(config: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config dict differs from another, one level down: the rest is as in `base`."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and isinstance(old := base.get(key), Mapping):
            value = {k: v for k, v in value.items() if k not in old or v != old[k]}
            if value:
                found[key] = value
        elif key not in base or value != base[key]:
            found[key] = value
    return found


def to_yaml(config: Mapping[str, Any]) -> str:
    """A config dict as YAML, as `QuantConfig.to_yaml` writes it."""
    return yaml.safe_dump(dict(config), sort_keys=False)


def summary(diagnosis: Diagnosis) -> str:
    """The outcome as text, at most 40 lines."""
    d, width = diagnosis, max(60, min(100, shutil.get_terminal_size().columns))
    lines = [f"{d.model}: {d.metric} on {d.samples:,} samples, {d.seconds:.0f} s", f"culprit: {d.culprit}"]
    lines += _wrap(d.verdict, width) + [""] + _scores(d)
    if d.findings:
        lines += ["", "findings:"] + _listed([finding.text for finding in d.findings], FINDINGS, width)
    if d.recommendation is not None:
        lines += ["", _reached(d)] + _config(d)
    if d.advice:
        lines += ["advice:"] + _listed(d.advice, ADVICE, width, 1)
    return "\n".join(lines)


def _scores(d: Diagnosis) -> list[str]:
    digits, rows = decimals(d.float_score), waterfall(d)
    left_out = len(rows) - SCORES
    if left_out > 0:  # of the stages in the middle: the start and the outcome say most
        kept = [row for row in rows if row[2] != "stage"]
        stages = [row for row in rows if row[2] == "stage"][: SCORES - len(kept)]
        rows = [kept[0], *stages, *kept[1:]]
    cells = [(name, f"{score:.{digits}f}", f"{score - d.float_score:+.{digits}f}") for name, score, _ in rows]
    note = [f"({left_out} more stages in the report)"] if left_out > 0 else []
    return table(("network", d.metric, "to float"), cells).splitlines() + note


def _reached(d: Diagnosis) -> str:
    score = d.recommended_score
    reached = "" if score is None else f" reached {score:.{decimals(d.float_score)}f}"
    return f"recommended config{reached}; it changes"


def _config(d: Diagnosis) -> list[str]:
    text = to_yaml(changes(d.recommendation or {}, d.config)).splitlines()
    return _cut([f"  {line}" for line in text], CONFIG, "  ...")


def _listed(texts: Sequence[str], limit: int, width: int, height: int = 2) -> list[str]:
    """At most `height` lines each."""
    lines = [line for text in texts[:limit] for line in _wrap(text, width, "* ", height)]
    return lines + ([f"* ({len(texts) - limit} more in the report)"] if len(texts) > limit else [])


def _wrap(text: str, width: int, lead: str = "", limit: int = 2) -> list[str]:
    lines = textwrap.wrap(" ".join(text.split()), width, initial_indent=lead, subsequent_indent=" " * len(lead))
    if len(lines) > limit:
        lines = [*lines[: limit - 1], lines[limit - 1][: width - 4].rstrip() + " ..."]
    return lines


def _cut(lines: list[str], limit: int, mark: str) -> list[str]:
    return lines if len(lines) <= limit else [*lines[: limit - 1], mark]
