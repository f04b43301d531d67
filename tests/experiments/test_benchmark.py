"""The benchmark of single layers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.apps import ROOT, checkout_environment


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["depthwise 3x3, 96", "conv 1x1, 96 to 24"])
def test_the_benchmark_of_one_layer(layer, tmp_path):
    """In a process of its own, as the benchmark runs it: its flags are not those of the other tools."""
    command = [sys.executable, "-m", "experiments.benchmark", f"--worker={layer}", "--iterations=200"]
    env = checkout_environment()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    assert list(rows) == ["descent", "gram", "stochastic"]
    assert all(0 < row["error"] < 1 and row["seconds"] > 0 for row in rows.values())
    assert rows["descent"]["speed"] is None and rows["gram"]["speed"] > 0
