"""Apps run in the process of the tests, and what their own processes need."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from absl import flags
from absl.testing import flagsaver

from kquant_tools import common

ROOT = Path(__file__).parents[2]


def checkout_environment() -> dict[str, str]:
    """The environment of a process that imports from the checkout, whatever is installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tools")))}


def run_app(module: Any, **values: object) -> int:
    """Run an app in this process with the given flags; returns its exit status."""
    arguments = ["app", *(f"--{name}={value}" for name, value in values.items())]
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        rest = flags.FLAGS(arguments)
        try:
            common.guarded(module.main, rest)
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0
