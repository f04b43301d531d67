"""The schedule of the learning rate."""

from __future__ import annotations

import numpy as np
import pytest

from kquant_tools.recipe import recipe


@pytest.mark.parametrize(("optimizer", "highest"), [("adam", 5e-4), ("sgd", 5e-3)])
def test_the_learning_rate_rises_and_falls_to_zero(optimizer, highest):
    schedule = recipe(200, optimizer)._learning_rate
    rates = [float(schedule(step)) for step in (0, 5, 10, 105, 200)]
    np.testing.assert_allclose(rates, [0, highest / 2, highest, highest / 2, 0], rtol=1e-5, atol=1e-9)
    assert float(recipe(3, optimizer, 0.1)._learning_rate(0)) == pytest.approx(0.1)
