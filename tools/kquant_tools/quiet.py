"""Libraries without the notices that their native code writes when it is loaded, before it reads any setting."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class QuietImport(MetaPathFinder):
    """Finds one module, once, as usual, and lets it load with `stderr_held_back`.

    Args:
        name: of the module.
    """

    def __init__(self, name: str):
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _QuietLoader(spec.loader)
        return spec


class _QuietLoader(Loader):
    def __init__(self, loader: Any):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # type: ignore[union-attr, assignment]
        with stderr_held_back():
            self._loader.exec_module(module)


@contextlib.contextmanager
def stderr_held_back() -> Iterator[None]:
    """What is written to the process's standard error in the block is dropped, or written behind it if it fails."""
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (AttributeError, OSError):  # there is none
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(saved, 2)
            held.seek(0)
            os.write(2, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def load_delegate() -> None:
    """Have LiteRT load its delegate, which it announces at the first file of a process and not again."""
    from kquant import TFLiteModel
    from kquant.targets.litert.flatbuffer import FlatbufferBuilder

    smallest = FlatbufferBuilder()
    x, y = (smallest.tensor(name, (1, 1), "FLOAT32") for name in "xy")
    smallest.operator("RELU", [x], [y])
    with stderr_held_back():
        TFLiteModel(smallest.finish({"x": x}, {"y": y}))
