"""`pack_tflite`, `unpack_tflite`: a .tflite file, or any bytes, in as few bytes as possible for transport.

A container is the magic number with the version, a CRC-32 of all that follows, the kind, the size and the CRC-32 of the
file, and the streams. What a .tflite file has of numbers is taken out of it and coded by models that fit (`weights`,
`numbers`); what is left, names, shapes and tables, is compressed as bytes (LZMA). A file that cannot be read as a
.tflite file is bytes.
"""

from __future__ import annotations

import lzma
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kquant.errors import PackError
from kquant.targets.storage.packing.bytes_io import Reader, Writer
from kquant.targets.storage.packing.decoder import Decoder
from kquant.targets.storage.packing.encoder import Encoder
from kquant.targets.storage.packing.sections import NOT_A_FILE, Section, sections

MAGIC = b"KQZ\x01"
_HEAD = struct.Struct("<4sIBQI")  # magic, CRC of what follows, kind, size, CRC of the file
_BYTES, _TFLITE = 0, 1
_LARGEST = 1 << 31  # of a flatbuffer
_SMALL = 8192  # bytes, of files that are packed both ways
_MOST, _MOST_CODED = 8192, 1024  # times: LZMA does not compress further; nor are arrays coded in less
# preset, lc, lp, pb of LZMA
_WORDS, _PLAIN, _AS_IT_IS = 0, 1, 2
_SETTINGS = ((6, 0, 0, 2), (9 | lzma.PRESET_EXTREME, 3, 0, 2))


def pack_tflite(source: bytes | str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> bytes:
    """Pack a file for transport, without loss.

    Args:
        source: the file's bytes, or its path. Of any tool; what is no .tflite file is packed as bytes.
        path: where to write the container; None only returns it.

    Returns:
        The container: `unpack_tflite` gives every byte of the file back.

    Raises:
        PackError: there is no such file, or it is larger than a .tflite file can be (2 GiB).
    """
    content = _read(source, "file")
    if len(content) >= _LARGEST:
        raise PackError(f"a .tflite file has less than 2 GiB, this one {len(content):,} bytes; pack its parts")
    structured = _structured(content)
    streams = [] if structured is None else [(_TFLITE, structured)]
    if not streams or len(content) < _SMALL or len(content) > _MOST_CODED * len(streams[0][1]):
        streams = [*streams[: len(content) < _SMALL], (_BYTES, _stored(content, _PLAIN))]
    kind, body = min(streams, key=lambda s: len(s[1]))
    head = _HEAD.pack(MAGIC, 0, kind, len(content), zlib.crc32(content))
    checked = zlib.crc32(head[8:] + body)
    packed = head[:4] + checked.to_bytes(4, "little") + head[8:] + body
    if path is not None:
        Path(path).write_bytes(packed)
    return packed


def unpack_tflite(packed: bytes | str | os.PathLike[str]) -> bytes:
    """The file in a container.

    Args:
        packed: the container's bytes, or its path.

    Raises:
        PackError: it is no container, of another version, or damaged. Nothing is given back then.
    """
    container = _read(packed, "container")
    if len(container) < _HEAD.size or container[:3] != MAGIC[:3]:
        raise PackError("this is no packed file: kquant.pack_tflite makes one")
    _, crc, kind, size, of_content = _HEAD.unpack_from(container)
    if container[3] != MAGIC[3]:
        raise PackError(f"the packed file has version {container[3]}, this kquant reads version {MAGIC[3]}; update it")
    if zlib.crc32(container[8:]) != crc:
        raise PackError("the packed file is damaged: it has changed since it was packed; transfer it again")
    if size >= _LARGEST or size > (_MOST_CODED if kind == _TFLITE else _MOST) * len(container):
        raise PackError(f"the packed file is damaged: it claims to hold {size:,} bytes")
    body = container[_HEAD.size :]
    if kind == _BYTES:
        content = _restored(body, size)
    elif kind == _TFLITE:
        content = _from_structured(body, size)
    else:
        raise PackError(f"the packed file is damaged: it is of an unknown kind {kind}")
    if len(content) != size or zlib.crc32(content) != of_content:
        raise PackError("the packed file is damaged: what it holds is not what was packed; transfer it again")
    return content


@dataclass(frozen=True)
class PackedPart:
    """A part of a file, and about what it takes in its container.

    Attributes:
        name: of the tensor; "" for what is between the arrays of numbers.
        kind: "integers" (weights), "numbers" (biases), "scales", "floats" or "structure".
        bytes: in the file.
        packed: in the container.
    """

    name: str
    kind: str
    bytes: int
    packed: int


def inspect_packed(source: bytes | str | os.PathLike[str]) -> tuple[PackedPart, ...]:
    """What the parts of a file take in its container; the last part is all that is no array of numbers.

    Args:
        source: the file or its container, as bytes or a path.

    Raises:
        PackError: there is no such file, or the container is damaged.
    """
    content = _read(source, "file")
    if content[:3] == MAGIC[:3]:
        content = unpack_tflite(content)
    try:
        parts = sections(content)
    except NOT_A_FILE:
        parts = ()
    values, encoder = np.frombuffer(content, np.uint8), Encoder()
    coded = [p for p in parts if p.kind != "floats"]
    for part in coded:
        encoder.section(values, part)
    costs = dict(zip(coded, encoder.costs() if coded else (), strict=True))
    rows = []
    for part in parts:
        if part.kind == "floats":
            costs[part] = len(_floats(values, [part]))
        rows.append(PackedPart(part.name, part.kind, part.size, round(costs[part])))
    left = len(content) - sum(row.bytes for row in rows)
    rest = len(pack_tflite(content)) - sum(row.packed for row in rows)
    return (*rows, PackedPart("", "structure", left, rest))


def _read(source: bytes | str | os.PathLike[str], what: str) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if not Path(source).is_file():
        raise PackError(f"There is no {what} {os.fspath(source)!r}.")
    return Path(source).read_bytes()


def _structured(content: bytes) -> bytes | None:
    """The streams of a .tflite file; None where it is none, or keeps no numbers."""
    try:
        parts = sections(content)
        left = bytearray(content)
        for part in parts:
            left[part.start : part.start + part.size] = bytes(part.size)
        if not parts or sections(bytes(left)) != parts:
            return None  # an array lies over what tells where arrays lie
    except NOT_A_FILE:
        return None
    values, encoder = np.frombuffer(content, np.uint8), Encoder()
    for part in parts:
        if part.kind != "floats":
            encoder.section(values, part)
    header, coded = encoder.finish()
    header = _gaps(parts) + header
    streams = [_stored(header + _without(content, parts), _WORDS), _floats(values, parts)]
    head = Writer()
    head.number(len(header))
    for stream in streams:
        head.number(len(stream))
    return head.content() + b"".join(streams) + coded


def _gaps(parts: Sequence[Section]) -> bytes:
    """Where the sections are: what lies between them, and whether the length in front of each counts words."""
    gaps, end = Writer(), 0
    gaps.number(len(parts))
    for part in parts:
        gaps.number(2 * (part.start - end) + (part.kind == "scales"))
        end = part.start + part.size
    return gaps.content()


def _without(content: bytes, parts: Sequence[Section]) -> bytes:
    ends = [0, *(p.start + p.size for p in parts)]
    starts = [*(p.start for p in parts), len(content)]
    return b"".join(content[a:b] for a, b in zip(ends, starts, strict=True))


def _with_gaps(left: bytes, header: Reader, size: int) -> bytes:
    """The file with zeros where its sections are."""
    made, at = bytearray(), 0
    for _ in range(header.at_most(size)):
        gap, words = divmod(header.number(), 2)
        made += left[at : at + gap]
        at += gap
        length = int.from_bytes(made[-4:], "little") << (2 * words)
        if at > len(left) or len(made) + length > size:
            raise PackError("the packed file is damaged: its arrays are longer than the whole")
        made += bytes(length)
    return bytes(made + left[at:])


def _from_structured(body: bytes, size: int) -> bytes:
    head = Reader(body)
    in_header, sizes = head.number(), [head.number(), head.number()]
    rest = head.rest()
    if sum(sizes) > len(rest) or in_header > _MOST * len(body):
        raise PackError("the packed file is damaged: its parts are longer than the whole")
    stored = _restored(rest[: sizes[0]], in_header + size)
    header = Reader(stored[:in_header])
    left = _with_gaps(stored[in_header:], header, size)
    if len(left) != size:
        raise PackError("the packed file is damaged: some of it is missing")
    content = np.frombuffer(left, np.uint8).copy()
    try:
        parts = sections(left)
    except NOT_A_FILE as error:
        raise PackError("the packed file is damaged: what it holds is no .tflite file") from error
    floats = [p for p in parts if p.kind == "floats"]
    try:
        decoder = Decoder(content, [p for p in parts if p.kind != "floats"], header)
        decoder.run(rest[sum(sizes) :])
    except PackError:
        raise
    except (ValueError, IndexError, OverflowError) as error:
        raise PackError(f"the packed file is damaged: {error}") from error
    _put_floats(content, floats, rest[sizes[0] : sum(sizes)])
    return content.tobytes()


def _floats(values: np.ndarray, parts: Sequence[Section]) -> bytes:
    """Floats as they are, or by planes (the lowest bytes of all first), whichever is shorter; a byte says which."""
    arrays = [(values[p.start : p.start + p.size], p.bits // 8) for p in parts if p.kind == "floats"]
    if not arrays:
        return b""
    ways = (b"".join(a.tobytes() for a, _ in arrays), b"".join(a.reshape(-1, n).T.tobytes() for a, n in arrays))
    return min((bytes([k]) + _stored(way, _PLAIN) for k, way in enumerate(ways)), key=len)


def _put_floats(content: np.ndarray, parts: Sequence[Section], stream: bytes) -> None:
    if not parts:
        return
    size = sum(p.size for p in parts)
    numbers, at = np.frombuffer(_restored(stream[1:], size), np.uint8), 0
    if len(numbers) != size:
        raise PackError("the packed file is damaged: some of its numbers are missing")
    for part in parts:
        found = numbers[at : at + part.size]
        planes = found.reshape(part.bits // 8, -1).T.reshape(-1) if stream[0] else found
        content[part.start : part.start + part.size] = planes
        at += part.size


def _filters(how: int, size: int) -> list[dict[str, Any]]:
    preset, lc, lp, pb = _SETTINGS[how]
    dictionary = min(1 << 26, max(1 << 12, 1 << size.bit_length()))
    return [{"id": lzma.FILTER_LZMA1, "preset": preset, "lc": lc, "lp": lp, "pb": pb, "dict_size": dictionary}]


def _stored(content: bytes, how: int) -> bytes:
    """A byte that says how, and the bytes: by LZMA, or as they are where that is shorter."""
    made = lzma.compress(content, lzma.FORMAT_RAW, filters=_filters(how, len(content)))
    return bytes([how]) + made if len(made) < len(content) else bytes([_AS_IT_IS]) + content


def _restored(stored: bytes, most: int) -> bytes:
    """The way back.

    Raises:
        PackError: it is damaged, or longer than `most`.
    """
    if not stored or stored[0] > _AS_IT_IS:
        raise PackError("the packed file is damaged: a part is stored in an unknown way")
    if stored[0] == _AS_IT_IS:
        content = stored[1:]
    else:
        reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_filters(stored[0], most))
        try:
            content = reader.decompress(stored[1:], max_length=most + 1)
        except (lzma.LZMAError, EOFError) as error:
            raise PackError(f"the packed file is damaged: {error}") from error
    if len(content) > most:
        raise PackError(f"the packed file is damaged: a part has more than {most} bytes")
    return content
