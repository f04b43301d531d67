"""The layout that one can read: few entries, short modules, short functions, tests that do not lean on each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENTRIES, MODULE_LINES, FUNCTION_LINES = 12, 400, 60
MODULES = sorted((ROOT / "kquant").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(source: str) -> Iterator[tuple[str, int]]:
    """(name, lines without the docstring) of every function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = node.lineno
            if ast.get_docstring(node) is not None:
                start += node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, node.end_lineno - start + 1


def test_few_entries() -> None:
    entries = [p.name for p in (ROOT / "kquant").iterdir() if p.name != "__pycache__"]
    assert len(entries) <= ENTRIES, sorted(entries)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_modules_and_functions_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MODULE_LINES
    assert [(f, lines) for f, lines in functions(source) if lines > FUNCTION_LINES] == []


def test_a_long_function_would_be_found() -> None:
    source = 'def f():\n    """One.\n\n    Two.\n    """\n' + "    x = 1\n" * 61
    assert list(functions(source)) == [("f", 62)]


@pytest.mark.parametrize("path", TESTS, ids=name)
def test_no_test_module_imports_another(path: Path) -> None:
    imported = re.findall(r"^\s*(?:from|import) .*\btest_\w+.*$", path.read_text(encoding="utf-8"), re.M)
    assert imported == []


@pytest.mark.parametrize("op", ["avg_pool2d", "embedding", "depthwise_conv2d", "prelu"])
def test_an_operation_has_few_homes(op: str) -> None:
    """Its meaning, its kernel, its lowering, and at most one more."""
    named = [name(path) for path in MODULES if f'"{op}"' in path.read_text(encoding="utf-8")]
    assert 0 < len(named) <= 4, named


# what Keras has got since 3.8, the oldest version that is supported: asked for by name, never as an attribute
NEWER = frozenset(
    {f"Adaptive{kind}Pooling{n}D" for kind in ("Average", "Max") for n in (1, 2, 3)}
    | {"AugMix", "ContrastLimitedAdaptiveHistogramEqualization", "CutMix", "RMSNormalization", "RandomElasticTransform"}
    | {"RandomErasing", "RandomGaussianBlur", "RandomInvert", "RandomPerspective", "ReversibleEmbedding"}
    | {"cbrt", "depth_to_space", "fmax", "fmin", "hypot", "ptp"}
    | {"layer_normalization", "rms_normalization", "space_to_depth", "sparse_sigmoid", "nansum", "nanmax"}
)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_nothing_is_taken_for_granted_that_the_oldest_keras_lacks(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = re.compile(r"^(L|layers|k|K|ops|keras\.layers|keras\.ops)\.(\w+)$")
    texts = (ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    used = {match[2] for text in texts if (match := found.match(text))}
    assert not used & NEWER, f"use known_layers or getattr for {sorted(used & NEWER)}"
