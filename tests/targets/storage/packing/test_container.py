"""Packing: every byte comes back; what is damaged is refused by name."""

from __future__ import annotations

import lzma
import random
import zlib
from pathlib import Path

import pytest

from kquant.errors import PackError
from kquant.targets.litert.writer import write_tflite
from kquant.targets.storage.packing import container
from kquant.targets.storage.packing.container import inspect_packed, pack_tflite, unpack_tflite
from kquant.targets.tflm.target import TFLM
from tests.support.toy import toy_qgraph

OLDER = Path(__file__).parents[3] / "keras" / "files" / "quantized_0.1.0.tflite"


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Files of every kind: integers of 8, 4 and 2 bits, ternary, clustered, float, half precision, compressed."""
    made = {"older": OLDER.read_bytes()}
    for preset in ("w8a8", "w4a8", "w4a8-kmeans", "w2a8-ternary"):
        qgraph = toy_qgraph(preset)
        made[preset], _ = write_tflite(qgraph)
        made[f"{preset} compressed"], _ = write_tflite(qgraph, target=TFLM, compress="tflm")
    for mode in ("float32", "float16", "dynamic_range"):
        made[mode], _ = write_tflite(qgraph, mode=mode)
    return made


def with_crc(packed: bytes) -> bytes:
    """A container whose first checksum fits again."""
    return packed[:4] + zlib.crc32(packed[8:]).to_bytes(4, "little") + packed[8:]


def test_every_file_comes_back_and_is_smaller_than_by_xz(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        packed = pack_tflite(content)
        assert unpack_tflite(packed) == content, name
        xz = len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
        assert len(packed) < xz, (name, len(packed), xz)


@pytest.mark.parametrize("content", [b"", b"a", b"TFL3" * 5, bytes(100_000), bytes(range(256)) * 40])
def test_what_is_no_file_is_packed_as_bytes(content: bytes) -> None:
    assert unpack_tflite(pack_tflite(content)) == content


def test_damaged_files_are_packed_too(files: dict[str, bytes]) -> None:
    """Offsets that lead anywhere, arrays over each other, cut ends."""
    chance = random.Random(0)
    for name in ("w8a8", "w4a8-kmeans", "float16"):
        for _ in range(40):
            content = bytearray(files[name])
            for _ in range(chance.randint(1, 30)):
                content[chance.randrange(min(len(content), 4000) if chance.random() < 0.5 else len(content))] = (
                    chance.randrange(256)
                )
            cut = bytes(content[: chance.randrange(len(content))] if chance.random() < 0.3 else content)
            assert unpack_tflite(pack_tflite(cut)) == cut


def test_packing_is_the_same_each_time_and_written_where_asked(files: dict[str, bytes], tmp_path: Path) -> None:
    source, path = tmp_path / "m.tflite", tmp_path / "m.kqz"
    source.write_bytes(files["w8a8"])
    packed = pack_tflite(source, path)
    assert packed == path.read_bytes() == pack_tflite(files["w8a8"])
    assert unpack_tflite(path) == files["w8a8"]


def mutations(packed: bytes, count: int, seed: int) -> list[bytes]:
    chance, made = random.Random(seed), []
    for _ in range(count):
        changed = bytearray(packed)
        kind = chance.random()
        if kind < 0.7:
            for _ in range(chance.choice((1, 1, 2, 8))):
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        elif kind < 0.85:
            del changed[chance.randrange(len(changed)) :]
        else:
            at = chance.randrange(len(changed))
            changed[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 9)))
        made.append(bytes(changed))
    return made


def outcome(packed: bytes, content: bytes) -> bool:
    """Whether it was refused by name; otherwise the content must be right."""
    try:
        assert unpack_tflite(packed) == content
    except PackError as error:
        assert str(error)
        return True
    return False


def test_ten_thousand_mutations_are_refused(files: dict[str, bytes]) -> None:
    content = files["w8a8"]
    packed = pack_tflite(content)
    refused = sum(outcome(m, content) for m in mutations(packed, 10_000, seed=1))
    assert refused == 10_000


@pytest.mark.parametrize("name", ["w8a8", "w4a8-kmeans", "float16"])
def test_mutations_behind_the_first_checksum_are_refused_too(files: dict[str, bytes], name: str) -> None:
    packed = pack_tflite(files[name])
    for mutated in mutations(packed, 60, seed=2):
        outcome(with_crc(mutated), files[name])


@pytest.mark.slow
def test_thousands_of_mutations_behind_the_first_checksum(files: dict[str, bytes]) -> None:
    for content in files.values():
        packed = pack_tflite(content)
        for mutated in mutations(packed, 250, seed=3):
            outcome(with_crc(mutated), content)


@pytest.mark.parametrize(
    "packed, message",
    [(b"", "no packed file"), (b"PK\x03\x04" + bytes(30), "no packed file"),
     (b"KQZ\x02" + bytes(30), "version 2, this kquant reads version 1"),
     (with_crc(b"KQZ\x01" + bytes(4) + container._HEAD.pack(b"", 0, 0, 1 << 40, 0)[8:] + b"x"), "claims to hold"),
     (with_crc(b"KQZ\x01" + bytes(4) + container._HEAD.pack(b"", 0, 9, 1, 0)[8:] + b"x"), "unknown kind 9"),
     ("nowhere.kqz", "There is no container 'nowhere.kqz'")],
    ids=["empty", "zip", "version", "size", "kind", "path"],
)  # fmt: skip
def test_errors_say_what_is_wrong(packed: bytes | str, message: str) -> None:
    with pytest.raises(PackError, match=message):
        unpack_tflite(packed)


def test_the_parts_add_up(files: dict[str, bytes]) -> None:
    for name in ("w8a8", "float16"):
        parts = inspect_packed(files[name])
        assert sum(p.bytes for p in parts) == len(files[name])
        assert sum(p.packed for p in parts) == len(pack_tflite(files[name]))
        assert parts == inspect_packed(pack_tflite(files[name]))
    kinds = {p.kind for p in inspect_packed(files["w8a8"])}
    assert kinds == {"integers", "numbers", "scales", "structure"}
