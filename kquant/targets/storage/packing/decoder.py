"""A header and coded bytes to the sections of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kquant.errors import PackError
from kquant.targets.storage.packing import format as fmt
from kquant.targets.storage.packing import levels, numbers, rans, weights
from kquant.targets.storage.packing.bytes_io import Reader
from kquant.targets.storage.packing.distributions import Tables
from kquant.targets.storage.packing.sections import Section

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class _Announced:
    """A tensor of weights as the header describes it; arrays are indices, -1 where there is none."""

    section: Section
    profile: int
    table: tuple[int, ...]
    outputs: int
    taps: int
    inputs: int
    coefficients: int


@dataclass(frozen=True, eq=False)
class _Live:
    """A tensor of weights that is being read."""

    section: Section
    profile: int
    model: weights.Model
    values: Array
    levels: levels.Levels | None


class Decoder:
    """Reads what an Encoder wrote.

    Args:
        content: the file (uint8), its sections still zeros.
        parts: the sections that are coded.
        head: the header.

    Raises:
        PackError: the header is damaged.
    """

    def __init__(self, content: Array, parts: Sequence[Section], head: Reader) -> None:
        self._content = content
        self._arrays: list[numbers.Numbers] = []
        self._places: list[tuple[Section, int]] = []
        self._products: list[Section] = []
        self._weights: list[_Announced] = []
        self._profiles = [numbers.PROFILE] + [fmt.read_profile(head) for _ in range(head.at_most(255))]
        lanes, self._words, self._bits = head.byte(), head.number(), head.number()
        if not 4 <= lanes <= 13:
            raise PackError("the packed file is damaged: it has a number of lanes that cannot be")
        self._lanes = 1 << (lanes - 1)
        for section in parts:
            self._announce(section, head)

    def _announce(self, section: Section, head: Reader) -> None:
        if section.kind == "scales" and section.product is not None and head.byte() == fmt.PRODUCT:
            self._products.append(section)
        elif section.kind != "integers" or section.count < fmt.FEW:
            self._places.append((section, self._array(head, section.count)))
        else:
            self._weights.append(self._of_weights(section, head))

    def _array(self, head: Reader, size: int, whole: bool = False) -> int:
        made = numbers.checked(size, head.signed(), head.byte(), head.byte(), head.byte())
        if whole and made.shift:
            raise PackError("the packed file is damaged: it describes factors that cannot be")
        self._arrays.append(made)
        return len(self._arrays) - 1

    def _of_weights(self, section: Section, head: Reader) -> _Announced:
        profile, flags, table = head.byte(), head.byte(), []
        outputs, taps, inputs, _ = section.shape
        if profile >= len(self._profiles):
            raise PackError("the packed file is damaged: it names a distribution that is not there")
        if flags & fmt.LEVELS:
            rows, count = head.number(), head.at_most(256)
            if rows not in (1, outputs):
                raise PackError("the packed file is damaged: it lists values for rows that are not there")
            table = [self._array(head, rows, whole=True) for _ in range(count)]
        sizes = [outputs, taps if flags & fmt.TAPS else 0, inputs if flags & fmt.INPUTS else 0]
        sizes.append(taps * weights.NEIGHBOURS if flags & fmt.COEFFICIENTS else 0)
        arrays = [self._array(head, size, whole=True) if size else -1 for size in sizes]
        return _Announced(section, profile, tuple(table), *arrays)

    def run(self, coded: bytes) -> None:
        """Fill the sections.

        Raises:
            PackError: it is damaged.
        """
        if 4 * self._lanes + 2 * self._words > len(coded):
            raise PackError("the packed file is damaged: its coded part is too short")
        states = np.frombuffer(coded, "<u4", self._lanes)
        words = np.frombuffer(coded, "<u2", self._words, 4 * self._lanes)
        decoder, tables = rans.Decoder(states, words), Tables(self._profiles, slots=True)
        symbols = _run(decoder, tables, [a.contexts for a in self._arrays])
        live = [self._live(w, symbols) for w in self._weights]
        for stage in range(max((w.model.stages for w in live), default=0)):
            now = [w for w in live if stage < w.model.stages]
            contexts = [w.model.contexts(stage, w.values) + w.profile * fmt.CONTEXTS for w in now]
            for w, found in zip(now, _run(decoder, tables, contexts), strict=True):
                at = w.model.at(stage)
                w.values[at] = found.reshape(w.values[at].shape).astype(np.int64) + w.model.profile.low
        tail = np.frombuffer(coded, np.uint8)[4 * self._lanes + 2 * self._words :]
        bits = np.concatenate([decoder.payload().astype("<u2").view(np.uint8)[: self._bits], tail])
        self._fill(symbols, np.unpackbits(bits), live)

    def _live(self, w: _Announced, symbols: Sequence[Array]) -> _Live:
        def array(index: int, size: int) -> Array:
            return np.zeros(size, np.int64) if index < 0 else self._arrays[index].join(symbols[index], 0)

        outputs, taps, inputs, _ = w.section.shape
        coefficients = None
        if w.coefficients >= 0:
            coefficients = array(w.coefficients, 0).reshape(taps, -1)
        model = weights.Model(
            (outputs, taps, inputs),
            array(w.outputs, outputs),
            array(w.taps, taps),
            array(w.inputs, inputs),
            coefficients,
            self._profiles[w.profile],
        )
        table = levels.checked(np.stack([array(k, 0) for k in w.table], axis=1)) if w.table else None
        if table is not None and not 0 <= model.profile.low <= model.profile.high < table.table.shape[1]:
            raise PackError("the packed file is damaged: it ranks values that are not there")
        return _Live(w.section, w.profile, model, np.zeros(model.shape, np.int64), table)

    def _fill(self, symbols: Sequence[Array], bits: Array, live: Sequence[_Live]) -> None:
        arrays, used = {}, 0
        for k, (array, found) in enumerate(zip(self._arrays, symbols, strict=True)):
            size = array.coded * array.shift
            if used + size > len(bits):
                raise PackError("the packed file is damaged: its last bits are missing")
            low = bits[used : used + size]
            arrays[k] = array.join(found, numbers.from_bits(low, array.shift) if size else 0)
            used += size
        for section, k in self._places:
            if section.kind == "integers":
                self._put(section, fmt.packed(arrays[k].reshape(section.shape[:3]), section))
            else:
                self._put(section, arrays[k].astype("<i8").astype("<u4").view(np.uint8))
        for w in live:
            values = w.values if w.levels is None else w.levels.values(w.values)
            self._put(w.section, fmt.packed(values, w.section))
        for section in self._products:
            self._put(section, fmt.product(self._content, section).view(np.uint8))

    def _put(self, section: Section, content: Array) -> None:
        self._content[section.start : section.start + section.size] = content


def _run(decoder: rans.Decoder, tables: Tables, contexts: Sequence[Array]) -> list[Array]:
    """One run of symbols, apart for each array of contexts."""
    together = np.concatenate(contexts) if contexts else np.zeros(0, np.int64)
    rows = tables.rows(together)
    found = decoder.run(rows, tables.slots, tables.freq, tables.start)
    return np.split(found, np.cumsum([len(c) for c in contexts])[:-1]) if contexts else []
