"""Sections of a file to a header and coded bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kquant.targets.storage.packing import format as fmt
from kquant.targets.storage.packing import levels, numbers, rans, weights
from kquant.targets.storage.packing.bytes_io import Writer
from kquant.targets.storage.packing.distributions import Profile, Tables
from kquant.targets.storage.packing.sections import Section

Array = np.ndarray

_ARRAY_HEAD = 5  # bytes, about


@dataclass(eq=False)
class _Plan:
    """What is coded: arrays of numbers, then stage after stage of the weights."""

    arrays: list[numbers.Numbers] = field(default_factory=list)
    models: list[weights.Model] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=lambda: [numbers.PROFILE])

    def profile(self, profile: Profile) -> int:
        """Its index."""
        if profile not in self.profiles:
            self.profiles.append(profile)
        return self.profiles.index(profile)

    @property
    def symbols(self) -> int:
        return sum(a.coded for a in self.arrays) + sum(int(np.prod(m.shape)) for m in self.models)


class Encoder:
    """Codes sections."""

    def __init__(self) -> None:
        self._plan, self._head = _Plan(), Writer()
        self._symbols: list[Array] = []
        self._bits: list[Array] = []
        self._values: list[Array] = []
        self._owners: list[tuple[int, int]] = []  # how many arrays and models there were before each section

    def section(self, content: Array, section: Section) -> None:
        """Take one section of a file (uint8); not of kind "floats"."""
        self._owners.append((len(self._plan.arrays), len(self._plan.models)))
        if section.kind == "scales":
            self._scales(content, section)
        elif section.kind == "numbers":
            self._array(content[section.start : section.start + section.size].view("<i4").astype(np.int64))
        else:
            values = fmt.unpacked(content, section)
            if values.size < fmt.FEW:
                self._array(values.reshape(-1))
            else:
                self._weights(values)

    def _scales(self, content: Array, section: Section) -> None:
        own = content[section.start : section.start + section.size].view("<u4")
        if section.product is not None:
            same = np.array_equal(fmt.product(content, section), own)
            self._head.byte(fmt.PRODUCT if same else fmt.CODED)
            if same:
                return
        self._array(own.astype(np.int64))

    def _array(self, values: Array) -> None:
        made, symbols, low = numbers.fit(values)
        self._head.signed(made.least)
        self._head.byte(made.shift)
        self._head.byte(made.mean)
        self._head.byte(made.width)
        self._plan.arrays.append(made)
        self._symbols.append(symbols)
        if made.coded and made.shift:
            self._bits.append(numbers.to_bits(low, made.shift))

    def _weights(self, values: Array) -> None:
        found = levels.find(values)
        if found is not None:
            values = found.ranks(values)
        low, high = (0, found.table.shape[1] - 1) if found is not None else (int(values.min()), int(values.max()))
        model = weights.fit(values, low, high)
        flags = (
            (fmt.TAPS if model.taps.any() else 0)
            | (fmt.INPUTS if model.inputs.any() else 0)
            | (0 if model.coefficients is None else fmt.COEFFICIENTS)
            | (0 if found is None else fmt.LEVELS)
        )
        self._head.byte(self._plan.profile(model.profile))
        self._head.byte(flags)
        if found is not None:
            self._head.number(len(found.table))
            self._head.number(found.table.shape[1])
            for column in found.table.T:
                self._array(column)
        self._array(model.outputs)
        if flags & fmt.TAPS:
            self._array(model.taps)
        if flags & fmt.INPUTS:
            self._array(model.inputs)
        if model.coefficients is not None:
            self._array(model.coefficients.reshape(-1))
        self._plan.models.append(model)
        self._values.append(values)

    def finish(self) -> tuple[bytes, bytes]:
        """Header and coded bytes."""
        plan = self._plan
        bits = np.packbits(np.concatenate(self._bits)) if self._bits else np.zeros(0, np.uint8)
        lanes = rans.lanes_for(plan.symbols)
        payload = np.zeros(2 * lanes, np.uint8)
        carried = min(len(bits), 2 * lanes)
        payload[:carried] = bits[:carried]
        tables, runs = Tables(plan.profiles, slots=False), []
        if any(a.coded for a in plan.arrays):
            rows = tables.rows(np.concatenate([a.contexts for a in plan.arrays]))
            runs.append(rows * 256 + np.concatenate(self._symbols))
        for stage in range(max((m.stages for m in plan.models), default=0)):
            contexts, found = [], []
            for model, values in zip(plan.models, self._values, strict=True):
                if stage < model.stages:
                    contexts.append(model.contexts(stage, values) + plan.profile(model.profile) * fmt.CONTEXTS)
                    found.append(values[model.at(stage)].reshape(-1) - model.profile.low)
            runs.append(tables.rows(np.concatenate(contexts)) * 256 + np.concatenate(found))
        freq, start = (t.reshape(-1).astype(np.uint16) for t in (tables.freq, tables.start))
        coded = [(freq.take(place), start.take(place)) for place in runs]
        states, words = rans.encode(coded, lanes, payload.view("<u2"))
        head = Writer()
        head.number(len(plan.profiles) - 1)
        for profile in plan.profiles[1:]:
            fmt.write_profile(head, profile)
        head.byte(lanes.bit_length())
        head.number(len(words))
        head.number(len(bits))
        coded_bytes = b"".join(
            (states.astype("<u4").tobytes(), words.astype("<u2").tobytes(), bits[carried:].tobytes())
        )
        return head.content() + self._head.content(), coded_bytes

    def costs(self) -> list[float]:
        """About the bytes that each section takes, its part of the header included."""
        plan, tables = self._plan, Tables(self._plan.profiles, slots=False)

        def coded(contexts: Array, symbols: Array) -> float:
            rows = tables.rows(contexts)
            return float(rans.BITS * len(symbols) - np.sum(np.log2(tables.freq[rows, symbols])))

        arrays = [
            8 * _ARRAY_HEAD + a.coded * a.shift + (coded(a.contexts, s) if a.coded else 0.0)
            for a, s in zip(plan.arrays, self._symbols, strict=True)
        ]
        models = []
        for model, values in zip(plan.models, self._values, strict=True):
            profile = plan.profile(model.profile) * fmt.CONTEXTS
            stages = [(model.contexts(s, values) + profile, values[model.at(s)]) for s in range(model.stages)]
            models.append(sum(coded(c, v.reshape(-1) - model.profile.low) for c, v in stages))
        ends = [*self._owners[1:], (len(arrays), len(models))]
        return [(sum(arrays[a:c]) + sum(models[b:d])) / 8 for (a, b), (c, d) in zip(self._owners, ends, strict=True)]
