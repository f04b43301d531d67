"""Pack a TFLite file for transport, without loss; unpack it; or show what its parts take.

kquant-pack --input=model.tflite --output=model.kqz
kquant-pack --action=unpack --input=model.kqz --output=model.tflite
kquant-pack --action=inspect --input=model.tflite
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

from . import common

ACTION = flags.DEFINE_enum("action", "pack", ["pack", "unpack", "inspect"], "What to do.")
INPUT = flags.DEFINE_string("input", None, "The file to read: a .tflite file, or what it was packed into.")


def main(argv: list[str]) -> None:
    """Pack, unpack or inspect."""
    if INPUT.value is None:
        raise app.UsageError("Say what to read: --input=FILE.")
    if ACTION.value == "inspect":
        inspect(INPUT.value)
        return
    output = common.writable(common.OUTPUT.value, ".kqz" if ACTION.value == "pack" else ".tflite")
    if output is None:
        raise app.UsageError("Say where to write: --output=FILE.kqz to pack, --output=FILE.tflite to unpack.")
    import kquant

    if ACTION.value == "pack":
        after = len(kquant.pack_tflite(INPUT.value, output))
    else:
        content = kquant.unpack_tflite(INPUT.value)
        after = len(content)
        Path(output).write_bytes(content)
    print(f"{INPUT.value}: {Path(INPUT.value).stat().st_size:,} bytes -> {output}: {after:,} bytes")


def inspect(source: str) -> None:
    """Print a table of the parts of a file."""
    from kquant.config.text import table
    from kquant.targets.storage.packing.container import inspect_packed

    parts = inspect_packed(source)
    rows = [(p.name or "everything else", p.kind, p.bytes, p.packed) for p in parts]
    rows.append(("total", "", sum(p.bytes for p in parts), sum(p.packed for p in parts)))
    print(table(("tensor", "kind", "bytes", "packed"), rows))


def run() -> None:
    """Console script."""
    common.launch(main, __doc__, [ACTION, INPUT, common.OUTPUT])


if __name__ == "__main__":
    run()
