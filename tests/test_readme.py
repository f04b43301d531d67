"""What the README shows works as it stands: its Python, its command lines, its links and make targets.

A code block behind the comment <!-- skip --> is not run.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from kquant_tools import common

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?P<skip><!-- skip -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


def blocks(language: str) -> list[str]:
    """The code blocks of a language, in order."""
    found = [m for m in BLOCK.finditer(README) if m["language"] == language and not m["skip"]]
    assert found, f"the README has no block of {language}"
    return [m["code"] for m in found]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A scratch folder that sees the repository's models, as the root of a clone does."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_python_runs(checkout, capsys):
    namespace: dict[str, object] = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), namespace)
    out = capsys.readouterr().out
    assert "every operation is an integer operation" in out
    assert "parity holds" in out
    assert float(re.search(r"^(0\.\d+|1\.0)$", out, re.M)[0]) > 0.95  # the accuracy of the file
    assert re.search(r"^culprit: \w+", out, re.M)  # of the diagnosis
    assert {"digits.tflite", "digits_quantized.keras", "mixed.yaml", "digits_qat.tflite", "diagnosis.html"} <= {
        p.name for p in checkout.iterdir()
    }


def test_the_example_is_ten_lines():
    lines = [
        line for line in blocks("python")[0].splitlines() if line.strip() and not line.startswith(("import", "from"))
    ]
    assert len(lines) <= 10


def test_the_command_lines_run(checkout, capsys):
    lines = [line for code in blocks("sh") for line in code.splitlines() if line.startswith("kquant-")]
    assert len(lines) >= 4
    for line in lines:
        script, *arguments = shlex.split(line)
        app = importlib.import_module(f"kquant_tools.{script.removeprefix('kquant-')}")
        with flagsaver.flagsaver():
            flags.FLAGS.unparse_flags()
            rest = flags.FLAGS([script, *arguments])
            try:
                common.guarded(app.main, rest)
            except SystemExit as stop:
                assert not stop.code, f"{line}\n{capsys.readouterr().err}"
    assert "parity holds" in capsys.readouterr().out


def test_make_targets_and_links_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z]+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
