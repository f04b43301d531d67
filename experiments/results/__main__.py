"""The tables of README.md and of docs, made from the measured numbers beside this module.

python -m experiments.results --write     # make them anew
python -m experiments.results --check     # exit status 1 where a document shows something else
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags

from .views import VIEWS, filled

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/results.md", "docs/targets.md", "docs/smaller.md", "docs/scenes.md")
WRITE = flags.DEFINE_boolean("write", False, "Write the tables into the documents.")
CHECK = flags.DEFINE_boolean("check", False, "Fail where a document shows something else.")


def outdated(root: Path = ROOT) -> dict[Path, str]:
    """Document -> what it should say, for those that say something else."""
    texts = {root / name: (root / name).read_text(encoding="utf-8") for name in DOCUMENTS}
    return {path: wanted for path, text in texts.items() if (wanted := filled(text, VIEWS)) != text}


def main(argv: list[str]) -> None:
    """Write or check."""
    if WRITE.value == CHECK.value:
        raise app.UsageError("Pass --write or --check.")
    for path, text in (found := outdated()).items():
        if WRITE.value:
            path.write_text(text, encoding="utf-8")
        print(f"{path}: {'written' if WRITE.value else 'differs from experiments/results; run --write'}")
    sys.exit(1 if CHECK.value and found else 0)


if __name__ == "__main__":
    app.run(main)
