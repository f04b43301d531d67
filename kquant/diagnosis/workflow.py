"""Figure 9 of the white paper, executed: every box is a measurement, and the next one depends on what it found.

float model sound? -> simulation without quantizers = float? -> simulation, file -> weights or activations?
-> grids and calibration as they should be? -> trials for what is to blame -> layer by layer -> higher bits
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from kquant.config.quant_config import QuantConfig
from kquant.diagnosis import findings as rules
from kquant.diagnosis.analysis import tensor_records
from kquant.diagnosis.case import Case, Results, extremes, grids, majority
from kquant.diagnosis.experiments import Measured, Outcome
from kquant.diagnosis.records import Finding, Sensitivity, Stage, TensorRecord
from kquant.diagnosis.samples import Samples, predict
from kquant.diagnosis.sensitivity import sensitivity
from kquant.diagnosis.summary import decimals
from kquant.diagnosis.switches import ACTIVATIONS, WEIGHTS, Switches
from kquant.diagnosis.target import compare_with_target
from kquant.diagnosis.trials import TRIALS, Trial, more_bits
from kquant.errors import CalibrationError, ConfigError, ExportError
from kquant.graph.decisions import decisive

SAME_DECISIONS = 30.0  # dB: one in a thousand, which are ties but for rounding
SAME = 60.0  # dB: float32 rounding, and folding in another order, stay far below -60 dB of the output
LOOKED_AT = 256  # samples at most for the records of tensors
LSB_SAMPLES = 16  # for the comparison of every tensor with the file
WORST = (1, 2, 4, 8)  # layers that get higher bits, until it is enough
GUILTY = 0.25  # of the larger drop: what costs less beside it is not to blame
UNITS = {"accuracy": " points", "agreement": " points", "sqnr": " dB", "kl": " nats"}


class Workflow:
    """One run of the workflow.

    Args:
        case: what is diagnosed.
        progress: show a bar over the stages.
    """

    def __init__(self, case: Case, progress: bool = True) -> None:
        self.case, self.lab = case, case.lab
        self.progress = progress
        self.plain = Switches.of(case.plain, case.model.target)
        self.actual = self.plain if case.plain is case.qgraph else Switches.of(case.qgraph, case.model.target)
        self.one_scale = [q.node for q in self.plain.quantizers if q.kind == WEIGHTS and q.grid.axis is None]
        self.fixed = case.model.target.fixed_outputs
        self.bar = tqdm(desc="diagnosis", unit="stage", disable=not progress, leave=False)

    def run(self) -> Results:
        """All stages that are needed."""
        with self.bar:
            self.results = found = Results(simulation=self.lab.measure(self.case.model))
            if not self._float_model() or not self._float_check():
                return found
            self._simulation()
            self._file()
            if found.culprit == "target":
                return found
            found.tensors = tensor_records(self.plain, self._few(self.case.metric.samples), progress=self.progress)
            lost = self.lab.worse(self.lab.float_model, found.simulation)
            guilty = self._shares() if lost else (WEIGHTS, ACTIVATIONS)
            if lost and self._grids_and_calibration():
                self._try_all(guilty)
            if self.case.sensitivity:
                self._layer_by_layer(guilty)
            if lost:
                self._explain(guilty)
                self._what_remains(guilty)
            self._conclude(lost)
            return found

    # --- is it quantization at all? ---

    def _float_model(self) -> bool:
        score, metric = self.lab.float_model, self.case.metric
        question = "Does the float model work?"
        if metric.kind != "accuracy" or score.right is None:
            self._note("float model", question, None, "Its outputs are finite; whether they are right is not known.")
            return True
        chance = 100 * majority(metric)
        error = 100 * float(np.std(score.right)) / len(score.right) ** 0.5
        if score.score > chance + 2 * error:
            self._note("float model", question, None, f"It does: chance would be {chance:.1f} %.")
            return True
        text = f"It reaches {score.score:.2f} %, and always naming the commonest class {chance:.2f} %."
        self._note("float model", question, None, text, ok=False)
        self._blame("float model", f"{text} Nothing that quantization does matters until the float model works here: "
                    "check its weights, the labels and the preprocessing of the data.")  # fmt: skip
        return False

    def _float_check(self) -> bool:
        """All quantizers off."""
        question = "Does the simulation without quantizers equal the float model?"
        if self.case.quantization.training is not None:
            self._note("FP32 check", question, None, "It was trained on, so it need not.")
            return True
        model = self.plain.model
        outputs = predict(model, self.case.metric.samples)
        sqnr, score = self.case.metric.sqnr(outputs), self.case.metric.of_run(model, outputs)
        decides = any(y.dtype.kind in "iub" for y in outputs)
        least = SAME_DECISIONS if decides else SAME
        if sqnr >= least:
            self._note("FP32 check", question, score, "It does, up to float32 rounding.")
            return True
        text = f"No: the outputs differ by {sqnr:.0f} dB, where rounding leaves {least:.0f} dB and more."
        self._note("FP32 check", question, score, text, ok=False)
        self._blame("simulation", f"{text} The quantized model was made from another model or changed since: quantize "
                    "this float model anew. If it was not, a layer is traced wrongly, which is a bug.")  # fmt: skip
        return False

    def _simulation(self) -> None:
        a, b = self.lab.float_model, self.results.simulation
        lost, noise = self.lab.drop(a, b), self.lab.threshold(a, b)
        ok = not self.lab.worse(a, b)
        text = f"{self._amount(lost)}, {'within' if ok else 'beyond'} what counts as noise ({self._amount(noise)})."
        self._note("simulation", "How much does all quantization cost?", None, text, ok)

    def _file(self) -> None:
        case, found = self.case, self.results
        question = "Does the file compute what the simulation does?"
        if case.content is None:
            self._note("target", question, None, f"There is no file for the target {case.config.target!r}.")
            return
        graph = case.qgraph.graph
        found.file = self.lab.measure_file(case.content, graph)
        few = case.metric.samples.first(LSB_SAMPLES)
        arrays = [np.concatenate(column) for column in zip(*few.batches, strict=True)]
        data = arrays[0] if len(arrays) == 1 else arrays
        found.target = compare_with_target(case.model, case.content, data, progress=self.progress)
        floats = [n.name for n in graph if case.qgraph.activations.get(n.name) is None]
        odd = rules.deviating(found.target, floats)
        gap = self.lab.drop(found.simulation, found.file)
        lost = self.lab.worse(found.simulation, found.file)
        if odd is None and not lost:
            self._note("target", question, None, "At every operation, within 1 LSB.")
            return
        text = f"The file scores {self._amount(gap)} below the simulation"
        if odd is not None:
            text += f"; {odd.node!r} ({odd.op}) is the first operation that differs, by up to {odd.alone:.0f} LSB"
            worst = (odd.node, *(r.node for r in found.target if r.alone > 1 and r is not odd))
            remedy = (
                "Export again with export_tflite; a file that was edited or converted elsewhere computes other things."
            )
            found.findings.append(Finding(kind="file_differs", nodes=worst, text=f"{text}.", remedy=remedy))
        self._note("target", question, None, f"{text}.", ok=False)
        before = self.lab.drop(self.lab.float_model, found.simulation)
        if (lost and gap > before) or (odd is not None and not self.lab.worse(self.lab.float_model, found.simulation)):
            self._blame("target", f"{text}. The simulation is fine: the file is not what it simulates.")

    # --- what is to blame? ---

    def _shares(self) -> tuple[str, ...]:
        """Weights only, activations only: the kinds that are to blame."""
        drops, significant = {}, {}
        for kind, switches in ((WEIGHTS, self.actual), (ACTIVATIONS, self.plain)):
            names = [q.name for q in switches.quantizers if q.kind == kind]
            if not names:
                continue
            measured = self._switched(switches, names)
            drops[kind] = self.lab.drop(self.lab.float_model, measured)
            significant[kind] = self.lab.worse(self.lab.float_model, measured)
            text = f"{self._amount(drops[kind])}{'' if significant[kind] else ', within noise'}."
            question = f"How much do quantized {kind} cost alone?"
            self._note(f"{kind} only", question, measured.score, text, not significant[kind])
        most = max(drops.values())
        guilty = tuple(k for k, d in drops.items() if significant[k] and d >= GUILTY * most)
        self.drops = drops
        guilty = guilty or tuple(k for k, d in drops.items() if d == most)
        self.results.culprit = " and ".join(guilty)
        return guilty

    def _grids_and_calibration(self) -> bool:
        """Whether the grids are those of the config, and the calibration data is like the evaluation data."""
        found, case = self.results, self.case
        start = found.file if found.file is not None else found.simulation
        found.best = Outcome(
            config=case.config, qgraph=case.qgraph, quantization=case.quantization, content=case.content, measured=start
        )
        if case.expected is not None:
            actual, expected = (grids(q, self.actual.quantizers) for q in (case.qgraph, case.expected))
            found.findings += rules.bad_scales(actual, expected)
            if found.findings:
                self._attempt("quantized anew", "Does the config itself, run anew, do better?", case.config)
        return not (case.is_own_calibration and self._other_domain())

    def _other_domain(self) -> bool:
        """Whether the calibration data is from elsewhere, and that is what costs."""
        case, found, graph = self.case, self.results, self.case.qgraph.graph
        judged = [t for t in found.tensors if t.kind == ACTIVATIONS and t.op not in (*self.fixed, "const")]
        grids = {t.node: (t.low, t.high) for t in judged}  # as wide as the calibration data, or about that
        seen = {t.node: (t.seen_low, t.seen_high) for t in judged}
        grids |= dict(zip(graph.inputs, extremes(self.lab.calibration), strict=True))
        seen |= dict(zip(graph.inputs, extremes(case.metric.samples), strict=True))
        nodes, text = rules.other_domain(grids, seen, graph.inputs)
        question = "Is the calibration data like the evaluation data?"
        self._note("calibration data", question, None, text or "Its ranges are.", not nodes)
        if not nodes:
            return False
        question = "Does calibration on the evaluation data do better?"
        own = self._attempt("calibrated on evaluation data", question, case.config, case.metric.samples)
        if own is None or found.best is None or not self.lab.worse(own.measured, found.best.measured):
            return False
        remedy = "Calibrate with samples of the domain that the model will see, preprocessed in the same way."
        found.findings.append(Finding(kind="calibration_domain", nodes=nodes, text=text, remedy=remedy))
        found.advice.append("No config makes up for calibration data from elsewhere. " + remedy)
        return not self.lab.worse(self.lab.float_model, own.measured)

    def _try_all(self, guilty: Sequence[str]) -> None:
        """The trials of the table, each on top of what helped before."""
        for trial in TRIALS:
            best = self.results.best
            if best is None or trial.of not in guilty:
                continue
            if not trial.applies(best.config, best.quantization.taken, best.qgraph.graph):
                continue
            if trial.always or self.lab.worse(self.lab.float_model, best.measured):
                self._try(trial, best)

    def _try(self, trial: Trial, best: Outcome) -> None:
        config = trial.change(self.case.config if trial.elsewhere else best.config)
        outcome = self._attempt(trial.name, trial.question, config, keep=not trial.elsewhere, may_lose=trial.always)
        if trial.elsewhere and outcome is not None:
            text = f"One scale per channel (target {config.target}) scored {self._number(outcome.measured.score)}."
            self.results.advice.append(text)

    def _attempt(
        self,
        name: str,
        question: str,
        config: QuantConfig,
        calibration: Samples | None = None,
        keep: bool = True,
        may_lose: bool = False,
    ) -> Outcome | None:
        """Run a config; the better of it and the best so far is kept, unless it had other calibration data.

        `may_lose`: it is kept unless it is worse by more than noise.
        """
        found = self.results
        try:
            outcome = self.lab.run(config, calibration)
        except (ConfigError, ExportError, CalibrationError) as error:
            self._note(name, question, None, f"It cannot be tried: {str(error).splitlines()[0]}", ok=False)
            return None
        best = found.best
        gain = 0.0 if best is None else self.lab.drop(outcome.measured, best.measured)
        noise = best is not None and abs(gain) <= self.lab.threshold(best.measured, outcome.measured)
        text = f"It brings {self._amount(gain)}" if gain >= 0 else f"It costs {self._amount(-gain)}"
        self._note(name, question, outcome.measured.score, text + (", within noise." if noise else "."), gain > 0)
        if keep and calibration is None and (gain > 0 or (may_lose and noise)):
            found.best = outcome
        return outcome

    # --- where, and what is left? ---

    def _layer_by_layer(self, guilty: Sequence[str]) -> None:
        case, found = self.case, self.results
        names = [q.name for q in self.plain.quantizers if q.kind in guilty]
        options: dict[str, Any] = {"executor": case.executor, "checkpoint": case.checkpoint}
        found.sensitivity = sensitivity(
            self.plain, case.metric, names=names, alone_off=False, progress=self.progress, **options
        )
        if found.sensitivity:
            worst = list(dict.fromkeys(f"{s.node} ({s.kind})" for s in found.sensitivity))[:3]
            text = f"The worst alone: {', '.join(worst)}."
            self._note("layer by layer", "Which quantizers cost most alone?", None, text)

    def _explain(self, guilty: Sequence[str]) -> None:
        """Findings about the tensors of what is to blame, those of the most sensitive first."""
        found = self.results
        costly = self._costly(guilty)
        outputs = decisive(self.case.qgraph.graph)
        new = rules.few_bits(found.tensors, costly, outputs)
        new += rules.of_tensors(found.tensors, guilty, self.one_scale, self.fixed)
        if WEIGHTS in guilty:
            new += rules.dead_channels(found.tensors, self.one_scale)
        found.findings += [f for f in new if f.kind != "saturation" or not found.findings]

    def _costly(self, guilty: Sequence[str]) -> list[str]:
        """Names of the quantizers that cost score alone."""
        found, samples = self.results, len(self.case.metric.samples)
        reference = self.lab.float_model.score
        costly = []
        for s in found.sensitivity:
            a, b = Measured(reference), Measured(s.alone_on)
            flipped = reference - s.alone_on > 400 / samples or self.case.metric.kind not in ("accuracy", "agreement")
            if self.lab.worse(a, b) and flipped:  # two errors of n flips of one sign are 2 sqrt(n): n above 4
                costly.append(f"{s.node}:{s.kind}")
        if ACTIVATIONS in guilty and not found.sensitivity:
            costly += self._costly_logits()
        return costly

    def _costly_logits(self) -> list[str]:
        names = [f"{n}:{ACTIVATIONS}" for n in decisive(self.case.qgraph.graph)]
        names = [n for n in names if n in self.plain.names]
        measured = self._switched(self.plain, names)
        return names if self.lab.worse(self.lab.float_model, measured) else []

    def _what_remains(self, guilty: Sequence[str]) -> None:
        """Higher bits for the worst layers, as few as bring the score within noise; else training."""
        found = self.results
        if found.best is None or found.culprit == "none":
            return
        records: Sequence[Sensitivity | TensorRecord] = found.sensitivity
        ranked = [r for r in records or sorted(found.tensors, key=lambda t: t.sqnr) if r.kind in guilty]
        if not any(f.kind == "calibration_domain" for f in found.findings):
            start = found.best
            for count in WORST:
                if not self.lab.worse(self.lab.float_model, found.best.measured):
                    return
                if (config := more_bits(start.config, ranked, count)) is not None:
                    layers = f"the {count} worst layers" if count > 1 else "the worst layer"
                    self._attempt(f"more bits for {layers}", f"Do higher bits for {layers} help?", config)
        if self.lab.worse(self.lab.float_model, found.best.measured):
            found.advice.append("Train for what is left: kquant.prepare_qat(model, calibration_data, config).")

    def _conclude(self, lost: bool) -> None:
        found = self.results
        if not lost:
            found.best = None
            cost = self.lab.drop(self.lab.float_model, found.simulation)
            text = f"costs {self._amount(cost)}, which is within noise" if cost > 0 else "costs nothing"
            found.verdict = f"Nothing is wrong: quantization {text}."
            return
        base = found.file if found.file is not None else found.simulation
        if found.best is not None:
            better = self.lab.drop(found.best.measured, base) > 0
            cured = better and not self.lab.worse(self.lab.float_model, found.best.measured)
            if not cured and not self.lab.worse(found.best.measured, base):
                found.best = None
        total = self.lab.drop(self.lab.float_model, found.simulation)
        shares = ", ".join(f"{kind} alone {self._number(d)}" for kind, d in self.drops.items())
        parts = [f"Quantization costs {self._amount(total)}: {shares}."]
        parts.append(found.findings[0].text if found.findings else "No single tensor carries it.")
        if found.best is not None:
            parts.append(
                f"The recommended config brings back {self._amount(self.lab.drop(found.best.measured, base))}."
            )
        found.verdict = " ".join(parts)

    # --- helpers ---

    def _note(self, name: str, question: str, score: float | None, verdict: str, ok: bool = True) -> None:
        self.results.stages.append(Stage(name=name, question=question, score=score, verdict=verdict, ok=ok))
        self.bar.update()
        self.bar.set_postfix_str(name)

    def _blame(self, culprit: str, verdict: str) -> None:
        self.results.culprit, self.results.verdict = culprit, verdict

    def _switched(self, switches: Switches, names: Sequence[str]) -> Measured:
        """The score with some quantizers on."""
        switches.switch(names)
        measured = self.lab.measure(switches.model)
        switches.switch(())
        return measured

    def _few(self, samples: Samples) -> Samples:
        return samples.first(LOOKED_AT)

    def _number(self, value: float) -> str:
        return f"{value:.{decimals(self.lab.float_model.score)}f}"

    def _amount(self, value: float) -> str:
        return self._number(value) + UNITS.get(self.case.metric.kind, "")
