"""What the encoder and the decoder of sections agree on."""

from __future__ import annotations

import numpy as np

from kquant.errors import PackError
from kquant.targets.storage.packing.bytes_io import Reader, Writer
from kquant.targets.storage.packing.distributions import CENTRES, ENDS, FAMILIES, WIDTHS, Profile
from kquant.targets.storage.packing.sections import Section

Array = np.ndarray

FEW = 64  # integers that get no model of their own
CODED, PRODUCT = 0, 1
TAPS, INPUTS, COEFFICIENTS, LEVELS = 1, 2, 4, 8
CONTEXTS = WIDTHS * CENTRES
LARGEST_TILT = 31


def unpacked(content: Array, section: Section) -> Array:
    """The integers of a section, int64 (outputs, taps, inputs)."""
    raw = content[section.start : section.start + section.size]
    if section.bits == 8:
        values = raw.view(np.int8).astype(np.int64)
    else:
        half = 1 << (section.bits - 1)
        shifts = np.arange(0, 8, section.bits)
        values = ((((raw[:, None] >> shifts) & (2 * half - 1)) ^ half).astype(np.int64) - half).reshape(-1)
    outputs, taps, inputs, last = section.shape
    return values.reshape(taps, outputs).T.reshape(outputs, taps, 1) if last else values.reshape(outputs, taps, inputs)


def packed(values: Array, section: Section) -> Array:
    """The way back, uint8."""
    flat = (values.reshape(values.shape[:2]).T if section.shape[3] else values).reshape(-1)
    if section.bits == 8:
        return flat.astype(np.int8).view(np.uint8)
    per = 8 // section.bits
    fields = flat.reshape(-1, per) & ((1 << section.bits) - 1)
    return (fields << np.arange(0, 8, section.bits)).sum(axis=1).astype(np.uint8)


def product(content: Array, section: Section) -> Array:
    """The scales of a bias that follow from two others, as uint32."""
    assert section.product is not None
    of_input, of_weights = section.product
    x = content[of_input : of_input + 4].view("<f4")
    w = content[of_weights : of_weights + section.size].view("<f4")
    with np.errstate(all="ignore"):
        return (x * w).astype("<f4").view("<u4")


def write_profile(head: Writer, profile: Profile) -> None:
    """Write a profile."""
    head.byte(profile.low + 128)
    head.byte(profile.high + 128)
    head.byte(profile.family)
    head.byte(profile.ends)
    head.byte(len(profile.tilt))
    for step in profile.tilt:
        head.byte(step + 128)


def read_profile(head: Reader) -> Profile:
    """Read a profile.

    Raises:
        PackError: it cannot be.
    """
    low, high, family, ends = head.byte() - 128, head.byte() - 128, head.byte(), head.byte()
    tilt = tuple(head.byte() - 128 for _ in range(head.byte()))
    if low > high or family >= FAMILIES or ends >= len(ENDS) or len(tilt) not in (0, high - low + 1):
        raise PackError("the packed file is damaged: it describes a distribution that cannot be")
    if any(abs(step) > LARGEST_TILT for step in tilt):
        raise PackError("the packed file is damaged: it describes frequencies that cannot be")
    return Profile(low, high, family, ends, tilt)
