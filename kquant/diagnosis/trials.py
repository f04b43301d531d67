"""What figure 9 of the white paper tries, as a table: which config, when it applies; and higher bits for the worst."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kquant.config.quant_config import QuantConfig
from kquant.config.specs import Rule
from kquant.diagnosis.records import Sensitivity, TensorRecord
from kquant.diagnosis.switches import ACTIVATIONS, WEIGHTS
from kquant.graph.decisions import decisive
from kquant.graph.ir import Graph
from kquant.quantize.layer_specs import resolve
from kquant.quantize.plan import is_final
from kquant.targets.target import get_target

Applies = Callable[[QuantConfig, Mapping[str, bool], Graph], bool]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One change of a config.

    Attributes:
        name, question: of its stage.
        of: what it cures, "weights" or "activations".
        applies: (config, which steps the pipeline took, the graph) -> whether it changes anything.
        change: config -> config.
        always: a step of the pipeline, which costs nothing later: tried even where the score is within noise of the
            float model's, and kept unless it costs more than noise. A few samples are no reason against it.
        elsewhere: it needs another target, so it is measured and advised, but not recommended.
    """

    name: str
    question: str
    of: str
    applies: Applies
    change: Callable[[QuantConfig], QuantConfig]
    always: bool = False
    elsewhere: bool = False


def _weights(config: QuantConfig, **changes: Any) -> QuantConfig:
    return replace(config, weights=config.weights and config.weights.override(changes))


def _method(method: str, *others: str) -> dict[str, Any]:
    """Fields of a trial of a range method for activations."""

    def change(config: QuantConfig) -> QuantConfig:
        return replace(config, activations=config.activations and config.activations.override({"method": method}))

    def applies(config: QuantConfig, taken: Mapping[str, bool], graph: Graph) -> bool:
        return config.activations is not None and config.activations.method not in (method, *others)

    return {"of": ACTIVATIONS, "applies": applies, "change": change}


def one_scale(config: QuantConfig) -> bool:
    """Whether weights have one scale per tensor."""
    return config.weights is not None and not config.weights.per_channel


def _per_channel(config: QuantConfig) -> QuantConfig:
    target = config.target if get_target(config.target).per_channel_weights else "litert"
    return replace(_weights(config, per_channel=True), target=target)


def _not_taken(step: str) -> Applies:
    return lambda config, taken, graph: not taken.get(step, False)


def _has_logits(graph: Graph) -> bool:
    return any(n.op == "softmax" and is_final(graph, n) for n in graph)


def _bits_of_outputs(bits: int) -> dict[str, Any]:
    """Fields of a trial of more bits for what decides: logits and boxes."""

    def applies(config: QuantConfig, taken: Mapping[str, bool], graph: Graph) -> bool:
        target = get_target(config.target)
        if bits > 8 and bits not in target.mixed_activation_bits:
            return False
        specs = resolve(graph, config)
        found = [specs[n].activations for n in decisive(graph) if graph[n].op not in target.fixed_outputs]
        return any(spec is not None and spec.bits < bits for spec in found)

    rule = Rule(position="outputs", activations={"bits": bits})
    return {"of": ACTIVATIONS, "applies": applies, "change": lambda c: replace(c, rules=(*c.rules, rule))}


TRIALS = (
    Trial(
        name="equalize",
        question="Does cross-layer equalization help?",
        of=WEIGHTS,
        applies=lambda config, taken, graph: one_scale(config) and not taken.get("equalize", False),
        change=lambda config: replace(config, equalize=True),
        always=True,
    ),
    Trial(
        name="per channel",
        question="Would one scale per channel do?",
        of=WEIGHTS,
        applies=lambda config, taken, graph: one_scale(config) and get_target(config.target).per_channel_weights,
        change=_per_channel,
    ),
    Trial(
        name="per channel, on another target",
        question="Would hardware with one scale per channel do?",
        of=WEIGHTS,
        applies=lambda config, taken, graph: one_scale(config) and not get_target(config.target).per_channel_weights,
        change=_per_channel,
        always=True,
        elsewhere=True,
    ),
    Trial(
        name="weight ranges by mse",
        question="Do weight ranges of least squared error help?",
        of=WEIGHTS,
        applies=lambda config, taken, graph: config.weights is not None and config.weights.method == "min_max",
        change=lambda config: _weights(config, method="mse"),
    ),
    Trial(
        name="bias correction",
        question="Does bias correction help?",
        of=WEIGHTS,
        applies=lambda c, taken, graph: not taken.get("correct_bias", False) and not taken.get("adaround", False),
        change=lambda config: replace(config, correct_bias=True),
        always=True,
    ),
    Trial(
        name="AdaRound",
        question="Does optimized rounding help?",
        of=WEIGHTS,
        applies=_not_taken("adaround"),
        change=lambda config: replace(config, adaround=True),
    ),
    Trial(name="ranges by mse", question="Do ranges of least squared error help?", **_method("mse")),
    Trial(
        name="ranges by percentile",
        question="Do ranges without the outermost values help?",
        **_method("percentile", "mse"),
    ),  # fmt: skip
    Trial(
        name="cross entropy on logits",
        question="Does a range of the logits that keeps the classes' probabilities help?",
        of=ACTIVATIONS,
        applies=lambda config, taken, graph: config.logits != "cross_entropy" and _has_logits(graph),
        change=lambda config: replace(config, logits="cross_entropy"),
    ),
    Trial(
        name="equalize activations",
        question="Does cross-layer equalization help the activations?",
        of=ACTIVATIONS,
        applies=_not_taken("equalize"),
        change=lambda config: replace(config, equalize=True),
    ),
    Trial(name="8 bits for the outputs", question="Do outputs of 8 bits help?", **_bits_of_outputs(8)),
    Trial(name="16 bits for the outputs", question="Do outputs of 16 bits help?", **_bits_of_outputs(16)),
)


def more_bits(config: QuantConfig, ranked: Sequence[Sensitivity | TensorRecord], count: int) -> QuantConfig | None:
    """A config with higher bits for the `count` worst layers: 8 where there are fewer, else 16 for activations.

    Args:
        config: what to change; rules are added.
        ranked: quantizers, worst first.
        count: of layers.

    Returns:
        None where fewer than `count` layers can have more bits on the target.
    """
    target = get_target(config.target)
    wide = 16 in target.mixed_activation_bits
    changes: dict[str, dict[str, Any]] = {}
    for record in ranked:
        if record.op in target.fixed_outputs or record.op == "input":
            continue  # the first have the target's grid, the other the config's `inputs`
        bits = 8 if record.bits < 8 else 16 if record.kind == ACTIVATIONS and wide and record.bits < 16 else None
        if bits is None or (record.layer not in changes and len(changes) == count):
            continue
        changes.setdefault(record.layer, {})[record.kind] = {"bits": bits}
    if len(changes) < count:
        return None
    added = tuple(Rule(name=f"^{re.escape(layer)}$", **kinds) for layer, kinds in changes.items())
    return replace(config, rules=(*config.rules, *added))
