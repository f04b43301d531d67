"""Apps of the command line, run in this process, and what processes of their own need."""

import os
from pathlib import Path
from types import ModuleType

from absl import flags
from absl.testing import flagsaver

from kquant_tools import common

ROOT = Path(__file__).parents[2]


def checkout_environment() -> dict[str, str]:
    """The environment of a process that imports from the checkout, whatever is installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tools")))}


def run_app(module: ModuleType, **values: object) -> int:
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
