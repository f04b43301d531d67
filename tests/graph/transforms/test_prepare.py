"""The whole preparation on the real models: the function stays, only the known operations are left."""

from __future__ import annotations

import os
from pathlib import Path

import keras
import pytest

from kquant.graph.transforms import prepare_graph
from tests.support.tracing import assert_equal, ops

DATA = Path(os.environ.get("KQUANT_DATA", "../shared/data"))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(DATA.glob("models/*.keras")), ids=lambda p: p.stem)
def test_real_models(path: Path) -> None:
    model = keras.saving.load_model(path, compile=False)
    graph = prepare_graph(model)
    assert_equal(graph, model, 1e-4)
    assert not {"affine", "clip", "float"} & set(ops(graph))
