"""What is remembered of how a network was quantized: one record, with its (de)serialization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kquant.config.quant_config import QuantConfig
from kquant.config.specs import Training


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the pipeline.

    Attributes:
        name: field of `QuantConfig` that switches it, or what it sets.
        taken: whether it was.
        note: what it did, or why it was left out.
    """

    name: str
    taken: bool
    note: str


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A node that stays float, and why; `layer` is the user's."""

    node: str
    layer: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A tensor that quantization destroys.

    Attributes:
        tensor: the node.
        layer: the user's.
        sqnr: its signal-to-quantization-noise ratio in dB.
        cause: why.
        remedy: what to do.
        widen: the tensor that holds it in 16 bits; empty where more bits of one tensor are no remedy.
    """

    tensor: str
    layer: str
    sqnr: float
    cause: str
    remedy: str
    widen: str = ""

    def __str__(self) -> str:
        return f"{self.tensor!r} (layer {self.layer!r}, {self.sqnr:.1f} dB): {self.cause}. Remedy: {self.remedy}."


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a network was quantized. Grids and integers are not part of it: they are the network's own.

    Attributes:
        config: what was asked for; its target is the hardware.
        seed: of what was drawn at random.
        steps: of the pipeline, in order, taken or not.
        skipped: the nodes that stay float.
        shared: node -> the first of the tensors that are on one grid with it, where that is another.
        fixed: nodes whose grid the target dictates.
        zero: nodes (the first of each grid) whose values were all zero over the calibration data.
        damage: what it destroyed, as far as calibration data showed it; of a network in training, before that.
        training: how the grids learn; None for a network that is not prepared for training.
    """

    config: QuantConfig
    seed: int = 0
    steps: tuple[Step, ...] = ()
    skipped: tuple[Skip, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    damage: tuple[Damage, ...] = ()
    training: Training | None = None

    @property
    def target(self) -> str:
        """The name of the target."""
        return self.config.target

    @property
    def taken(self) -> dict[str, bool]:
        """Step -> whether it was taken."""
        return {step.name: step.taken for step in self.steps}

    def __getitem__(self, key: str) -> Any:
        """An entry of `to_dict`, or of the dict that version 0.1.0 had in its place ("float": what stays float)."""
        return self.to_dict()[{"float": "skipped"}.get(key, key)]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers: `from_dict` gives the same record back."""
        return {
            "config": self.config.to_dict(),
            "seed": self.seed,
            "steps": [asdict(step) for step in self.steps],
            "skipped": [asdict(skip) for skip in self.skipped],
            "shared": dict(self.shared),
            "fixed": list(self.fixed),
            "zero": list(self.zero),
            "damage": [asdict(damage) for damage in self.damage],
            "training": None if self.training is None else asdict(self.training),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quantization:
        """The inverse of `to_dict`; reads what version 0.1.0 wrote, too."""
        rows = {row["node"]: row["shared"] for row in values.get("layers", ()) if row["shared"]}  # version 0.1.0
        dictated = "fixed by the target"
        training = values.get("training")
        return cls(
            config=QuantConfig.from_dict(values.get("config") or {"target": values["target"]}),
            seed=values.get("seed", 0),
            steps=tuple(Step(**step) for step in values.get("steps", ())),
            skipped=tuple(Skip(**skip) for skip in values.get("skipped", values.get("float", ()))),
            shared=values.get("shared", {k: v for k, v in rows.items() if v != dictated}),
            fixed=tuple(values.get("fixed", [k for k, v in rows.items() if v == dictated])),
            zero=tuple(values.get("zero", ())),
            damage=tuple(Damage(**damage) for damage in values.get("damage", ())),
            training=None if training is None else Training(**training),
        )
