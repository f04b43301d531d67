"""Post-training quantization in the order of figure 8 of the white paper, with data or without.

    with data     equalize -> prune -> weight ranges -> AdaRound, or empirical bias correction -> activation ranges
    without data  equalize -> absorb high biases -> weight ranges -> analytic bias correction -> ranges from batch norm

The config switches each step on or off; where it says None, the step is taken where it helps: see `decide`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace

import numpy as np

from kquant.config.quant_config import QuantConfig
from kquant.config.specs import AdaRound, QuantSpec
from kquant.errors import CalibrationError, ConfigError
from kquant.graph.ir import Graph
from kquant.graph.moments import Moments
from kquant.graph.ops import op_of, weight_view
from kquant.graph.quantized import QuantizedGraph
from kquant.graph.transforms.absorb_bias import absorb_bias
from kquant.graph.transforms.equalize import equalize
from kquant.grids.grid import Grid, fake_quantize
from kquant.quantize.adaround import LayerRounding, adaround
from kquant.quantize.analytic_correction import correct_biases_analytically
from kquant.quantize.bias_correction import correct_biases
from kquant.quantize.calibrate import activation_ranges, all_zero, make_grids, observe, smallest_outputs, weight_grids
from kquant.quantize.channel_scales import prepare_channels
from kquant.quantize.data import CalibrationData
from kquant.quantize.input_moments import estimate_inputs
from kquant.quantize.inputs import declare_ranges
from kquant.quantize.kernels import choose_kernels
from kquant.quantize.masks import prepare_masks
from kquant.quantize.moments import propagate
from kquant.quantize.normalization import prepare_normalization
from kquant.quantize.plan import Plan, make_plan
from kquant.quantize.pooling import prepare_pooling
from kquant.quantize.prune import note_of, prune
from kquant.quantize.record import Quantization, Step
from kquant.quantize.sensitivity import allowed_errors
from kquant.quantize.small_values import prepare_small_values

# steps without a switch, in order
_PREPARATIONS = (
    ("masks", prepare_masks),
    ("channel scales", prepare_channels),
    ("normalization", prepare_normalization),
    ("pooling", prepare_pooling),
    ("small values", prepare_small_values),
)
_NAMED = 8  # at most so many tensors are listed in a message


def quantize_after_training(
    graph: Graph,
    config: QuantConfig,
    data: CalibrationData | None,
    *,
    seed: int = 0,
    progress: bool = True,
    wide: Set[str] = frozenset(),
) -> tuple[QuantizedGraph, Quantization, Graph]:
    """Quantize a float graph after training.

    Args:
        graph: batch normalization folded and activations fused (`transforms.prepare_graph`).
        config: what to do.
        data: calibration data, None for the data-free pipeline.
        seed: of whatever draws at random.
        progress: show progress bars.
        wide: tensors that get 16 bits where the config gives 8.

    Returns:
        The quantized graph, how it was quantized, and the float graph of the same tensors, before weights were rounded.

    Raises:
        ConfigError: the config is impossible for its target, or asks without data for what needs data.
        CalibrationError: the data is unusable, or ranges need data and there is none.
    """
    log = Log(decide(make_plan(graph, config), config, data))
    graph = prepared(graph, config, data, log, progress)
    plan = make_plan(_widened(graph, wide), config)
    reference = plan.graph
    if config.prune is not None:
        graph, pruned = prune(plan.graph, list(plan.weights), data, config.prune, seed=seed, progress=progress)
        plan = replace(plan, graph=graph)
        log.note("prune", note_of(pruned, graph))
    weights, integers = weight_grids(plan), {}
    plan, note = choose_kernels(plan, weights, config.prefer)
    if note:
        log.note("kernels", note)
    if config.keeps_zeros:
        _refuse_lost_zeros(plan.graph, weights)
    linear = {n: q for n, q in weights.items() if op_of(plan.graph[n]).matrix}
    if log.takes("adaround") and data is not None:
        graph, rows, said_of = _round(plan, linear, data, config, seed, progress)
        plan, weights = replace(plan, graph=graph), weights | {r.node: r.grid for r in rows}
        integers = {r.node: r.integers for r in rows}
        for name, note in said_of.items():
            log.note(name, note)
    if log.takes("correct_bias"):
        graph, note = _correct(plan, linear, data, progress)
        plan = replace(plan, graph=graph)
        log.note("correct_bias", note)
    if data is None:
        plan, said = declare_ranges(plan, {}, ())
        plan, statistics, notes = _without_data(plan)
    else:
        statistics, notes = (observe(plan, data, progress) if plan.observed else {}), _methods(plan)
        plan, said = declare_ranges(plan, statistics, data.byte_inputs)
    for note in said:
        log.note("inputs", note)
    for note in notes:
        log.note("activation ranges", note)
    ranges = activation_ranges(plan, statistics)
    record = replace(record_of(plan, config, seed, log.steps), zero=all_zero(ranges))
    return make_grids(plan, weights, ranges, integers), record, reference


def _round(
    plan: Plan, linear: Mapping[str, Grid], data: CalibrationData, config: QuantConfig, seed: int, progress: bool
) -> tuple[Graph, list[LayerRounding], dict[str, str]]:
    """AdaRound, on steps that a divergence decides where the config has one; and notes."""
    settings = config.adaround if isinstance(config.adaround, AdaRound) else AdaRound()
    allowed, notes = {}, {}
    if config.divergence is not None:
        chosen = [n for n in linear if _is_plain(plan.weights[n])]
        allowed = allowed_errors(plan.graph, chosen, data, config.divergence, seed=seed, progress=progress)
        notes["divergence"] = f"{config.divergence:g} nats over the steps of {len(chosen)} layers"
    graph, rows = adaround(
        plan.graph,
        linear,
        data,
        settings,
        seed=seed,
        progress=progress,
        input_bits=_input_bits(plan, linear),
        keep_zeros=config.keeps_zeros,
        specs=plan.weights,
        allowed=allowed,
    )
    ratio = np.mean([r.loss / r.nearest_loss for r in rows if r.nearest_loss > 0] or [1.0])
    compared = "" if allowed else f", {ratio:.2f} of nearest rounding's error on average"
    notes["adaround"] = f"{settings.solver}, {len(rows)} layers{compared}"
    return graph, rows, notes


def _is_plain(spec: QuantSpec) -> bool:
    """Whether its steps may be chosen: 8 bits that are not said to be anything else."""
    return (spec.bits, spec.format, spec.block) == (8, "uniform", None) and spec.symmetric and spec.signed


def prepared(graph: Graph, config: QuantConfig, data: CalibrationData | None, log: Log, progress: bool) -> Graph:
    """The float graph after all steps that come before the plan; they are noted."""
    if log.takes("equalize"):
        graph, note = _equalize(graph)
        log.note("equalize", note)
    if log.takes("absorb_bias"):
        graph, note = _absorb(graph, data, progress)
        log.note("absorb_bias", note)
    for name, prepare in _PREPARATIONS:
        graph, note = prepare(graph, config, data, progress)
        if note:
            log.note(name, note)
    return graph


def _widened(graph: Graph, wide: Set[str]) -> Graph:
    """Nodes that are marked as those of recurrent layers are which add up over many steps."""
    return graph.rebuild([n.with_attrs(wide=True) if n.name in wide else n for n in graph]) if wide else graph


def _refuse_lost_zeros(graph: Graph, weights: Mapping[str, Grid]) -> None:
    """Refuse grids without a zero for weights that have some."""
    for name, grid in weights.items():
        view = weight_view(graph[name])
        if fake_quantize(view, grid)[view == 0].any():
            raise ConfigError(
                f"The weights of {graph[name].origin or name!r} have zeros that are to stay (keep_zeros, prune), and "
                'their format has no zero. Use another there, e.g. format="uniform".'
            )


def _input_bits(plan: Plan, names: Iterable[str]) -> dict[str, int]:
    """Linear operation -> bits of the grid of its input, where that is in integers."""
    specs = {n: plan.activations.get(plan.graph[n].inputs[0]) for n in names if n in plan.activations}
    return {n: spec.bits for n, spec in specs.items() if spec is not None}


def record_of(plan: Plan, config: QuantConfig, seed: int, steps: Sequence[Step]) -> Quantization:
    """What is remembered of a plan and the steps that were taken."""
    return Quantization(
        config=config, seed=seed, steps=tuple(steps), skipped=plan.skipped, shared=plan.shared, fixed=plan.dictated
    )


class Log:
    """The steps so far.

    Args:
        left_out: step -> why it is left out, empty for a step to take.
    """

    def __init__(self, left_out: Mapping[str, str]) -> None:
        self.left_out = left_out
        self.steps: list[Step] = []

    def takes(self, name: str) -> bool:
        """Whether a step is to be taken; noted if not."""
        if why := self.left_out[name]:
            self.steps.append(Step(name=name, taken=False, note=why))
        return not why

    def note(self, name: str, text: str) -> None:
        """A step was taken."""
        self.steps.append(Step(name=name, taken=True, note=text))


def decide(plan: Plan, config: QuantConfig, data: CalibrationData | None) -> dict[str, str]:
    """Why each step that the config can switch is left out; empty for a step to take.

    Where the config says None: equalization where weights have one scale per tensor; absorption without data, where
    it narrows ranges that are guessed from statistics; AdaRound below 8 bits; bias correction always, but not
    for 8 bits per channel from data that can be read once only.

    Raises:
        ConfigError: AdaRound is asked for and there is no data.
    """
    specs = [s for n, s in plan.weights.items() if op_of(plan.graph[n]).matrix]
    per_tensor = any(not s.per_channel for s in specs)
    coarse = any(s.bits < 8 for s in specs) or config.divergence is not None
    has_data, once = data is not None, data is not None and not data.repeatable
    nothing = "" if specs else "no weights are quantized"
    estimated = plan.observed and not has_data
    ranges = "activation ranges come from data" if has_data else "no activation range is estimated"
    advice = {
        "equalize": nothing or ("" if per_tensor else "every channel has a scale of its own"),
        "absorb_bias": "" if estimated else ranges,
        "adaround": nothing or ("it needs data" if not has_data else "" if coarse else "8 bits round well enough"),
        "correct_bias": nothing or ("the data can be read once only" if once and not (per_tensor or coarse) else ""),
    }
    asked = {name: getattr(config, name) for name in advice}
    reasons = {n: why if asked[n] is None else "" if asked[n] else "switched off" for n, why in advice.items()}
    if config.divergence is not None and (reasons["adaround"] or not has_data):
        raise ConfigError(
            "divergence chooses the steps of weights by what the layers read, on the way of AdaRound: pass "
            f"calibration_data, and leave adaround switched on. AdaRound is not taken: {reasons['adaround']}."
        )
    if not reasons["adaround"]:
        if not has_data:
            raise ConfigError("adaround reconstructs the outputs of the layers: pass calibration_data, or remove it.")
        reasons["correct_bias"] = "AdaRound sets the biases too"
    return reasons


def _equalize(graph: Graph) -> tuple[Graph, str]:
    graph, report = equalize(graph)
    dead = report.dead.zero + report.dead.absorbed + report.dead.unread
    note = f"{len(report.regions)} regions in {report.sweeps} sweeps"
    return graph, note + (f", {dead} dead channels resolved" if dead else "")


def _absorb(graph: Graph, data: CalibrationData | None, progress: bool) -> tuple[Graph, str]:
    """With the smallest values seen where there is data, with batch normalization statistics otherwise."""
    lows = {} if data is None else smallest_outputs(graph, [n.name for n in graph if op_of(n).linear], data, progress)
    graph, report = absorb_bias(graph, lows=lows)
    counts = [n for c in report.absorbed.values() if (n := int(np.count_nonzero(c)))]
    note = f"{sum(counts)} channels of {len(counts)} layers"
    return graph, note + (f"; not possible in {len(report.skipped)} layers" if report.skipped else "")


def _correct(
    plan: Plan, weights: Mapping[str, Grid], data: CalibrationData | None, progress: bool
) -> tuple[Graph, str]:
    """Empirical bias correction with data, analytic without."""
    if data is None:
        graph, report = correct_biases_analytically(plan.graph, weights)
        skipped = [f"not {name!r}: {why}" for name, why in report.skipped.items()]
        return graph, "; ".join([f"analytic, {len(report.corrected)} layers", *_few(skipped)])
    graph, shifts = correct_biases(plan.graph, weights, data, progress=progress)
    if not shifts:
        return graph, "empirical, 0 layers"
    worst = max(shifts, key=shifts.__getitem__)
    return graph, f"empirical, {len(shifts)} layers, at most {shifts[worst]:.2g} standard deviations (in {worst!r})"


def _methods(plan: Plan) -> list[str]:
    names = [n for names in plan.observed.values() for n in names]
    counts = Counter(plan.activations[n].method for n in names)
    return ["from the data: " + ", ".join(f"{m} of {k} tensors" for m, k in counts.items())] if counts else []


def _without_data(plan: Plan) -> tuple[Plan, Mapping[str, Moments], list[str]]:
    """Activation ranges from batch normalization statistics (eq. 18-19): the plan, the moments, notes."""
    methods = {n: s if s.range else replace(s, method="batch_norm") for n, s in plan.activations.items()}
    plan = replace(plan, activations=methods)
    estimated = _known_inputs(plan)
    known, unknown = propagate(plan.graph, estimated)
    names = [n for names in plan.observed.values() for n in names]
    missing = [f"{n!r}: {unknown[n]}" for n in names if n in unknown]
    if missing:
        lines = "\n".join(f"  {line}" for line in _few(missing))
        raise CalibrationError(
            f"Without calibration data, {len(missing)} of {len(names)} activation ranges cannot be told:\n{lines}\n"
            "Pass calibration_data, a few hundred preprocessed samples, or fix the ranges: of an input with "
            'inputs={"range": [low, high]}, of a layer with a rule, or quantize the weights alone, e.g. with "w8".'
        )
    notes = [f"without data: batch_norm of {len(names)} tensors"] if names else []
    for name in [n for n in names if n in estimated]:
        low, high = float(estimated[name].low.min()), float(estimated[name].high.max())
        notes.append(f"{name!r} is estimated to be within [{low:.3g}, {high:.3g}]; inputs.range says it exactly")
    return plan, known, notes


def _known_inputs(plan: Plan) -> dict[str, Moments]:
    """Moments of the inputs, to derive ranges from: estimated, or else uniform within a range that the config fixes."""
    found = {}
    for name in plan.graph.inputs:
        spec = plan.activations.get(name)
        if spec is not None and spec.range is not None:
            low, high = np.multiply.outer(spec.range, np.ones(plan.graph[name].shape[-1] or 1))
            found[name] = Moments((low + high) / 2, (high - low) / np.sqrt(12), low, high)
    return found | estimate_inputs(plan.graph)


def _few(lines: list[str]) -> list[str]:
    """The first of many lines, and how many more there are."""
    return lines if len(lines) <= _NAMED else [*lines[:_NAMED], f"... and {len(lines) - _NAMED} more"]
