"""Apps of the command line, run in this process."""

from types import ModuleType

from absl import flags
from absl.testing import flagsaver

from tools import common


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
