"""What holds for every range method, rounding solver and layer, compared with sums written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kquant.config.specs import METHODS, AdaRound, QuantSpec
from kquant.graph.ir import Graph, Node
from kquant.graph.moments import Moments
from kquant.graph.ops import evaluate
from kquant.grids.grid import Grid, fake_quantize, grid_from_range, quantize
from kquant.grids.observers import Histogram, MinMax, Rows
from kquant.grids.ranges import activation_range
from kquant.quantize.adaround import SOLVERS, adaround

GRIDS = {"asymmetric": QuantSpec(bits=4), "symmetric": QuantSpec(bits=4, symmetric=True)}
RNG = np.random.default_rng(0)
TENSORS = {  # [samples, channels]
    "normal": RNG.normal(size=(300, 8)),
    "relu": np.maximum(RNG.normal(size=(300, 8)), 0),
    "far above zero": RNG.uniform(20, 21, size=(300, 8)),
    "far below zero": RNG.uniform(-21, -20, size=(300, 8)),
    "constant": np.full((300, 8), 5.0),
    "zeros": np.zeros((300, 8)),
    "outlier": np.concatenate([RNG.normal(size=(299, 8)), np.full((1, 8), 80.0)]),
}


def seen(method: str, batches: list[np.ndarray]) -> Any:
    """What a method looks at, after these batches."""
    if method == "batch_norm":  # there are no batches: statistics of all data
        x = np.concatenate(sorted(batches, key=lambda b: b.tobytes()))
        return Moments.normal(np.round(x.mean(0), 9), np.round(x.std(0), 9))
    observer = {"min_max": MinMax, "cross_entropy": Rows}.get(method, Histogram)("x")
    for batch in batches:
        observer.update(np.asarray(batch, np.float32))
    return observer


@pytest.mark.parametrize("method", [m for m in METHODS if m != "auto"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", TENSORS)
def test_every_range_makes_a_grid_with_zero_whatever_the_order_of_the_batches(method, grid, name):
    spec, batches = GRIDS[grid], np.array_split(TENSORS[name], 7)
    ranges = [activation_range(method, seen(method, b), spec) for b in (batches, batches[::-1], [TENSORS[name]])]
    assert len(set(ranges)) == 1
    q = grid_from_range(*ranges[0], spec)
    assert q.qmin <= q.zero_point <= q.qmax and fake_quantize(0.0, q) == 0 and q.scale > 0


# --- rounding ---------------------------------------------------------------------------------------------------------


def one_layer(activation: bool, seed: int = 0) -> tuple[Graph, np.ndarray]:
    """A dense layer, and inputs that are correlated."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(600, 16)) @ (np.eye(16) + 0.4 * rng.normal(size=(16, 16))) + 0.5).astype(np.float32)
    weights = {"kernel": rng.normal(size=(16, 6)).astype(np.float32), "bias": rng.normal(size=6).astype(np.float32)}
    attrs = {"clip": (0.0, None)} if activation else {}
    nodes = [
        Node(name="in", op="input", shape=(None, 16)),
        Node(name="fc", op="dense", inputs=("in",), shape=(None, 6), weights=weights, attrs=attrs, origin="fc"),
    ]
    return Graph({n.name: n for n in nodes}, ("in",), ("fc",), ("x",), ("y",), "one"), x


def grid_of(graph: Graph, bits: int = 3) -> Grid:
    spec = QuantSpec(bits=bits, symmetric=True, per_channel=True)
    kernel = graph["fc"].weights["kernel"]
    return grid_from_range(kernel.min(0), kernel.max(0), spec, axis=1)


def squared_error(a: Graph, b: Graph, x: np.ndarray) -> float:
    """E || y - y^ ||^2, summed over channels."""
    difference = np.asarray(evaluate(a, [x], ["fc"])[0], np.float64) - evaluate(b, [x], ["fc"])[0]
    return float(np.square(difference).sum(1).mean())


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_in_the_report_is_that_of_the_outputs(solver):
    """The quadratic form of the moments (eq. 31) against outputs of the network, and the solvers on one problem."""
    graph, x = one_layer(activation=False)
    grid = grid_of(graph)
    settings = AdaRound(solver=solver, iterations=1000, scales=(1.0,))
    out, (row,) = adaround(graph, {"fc": grid}, [(x[:400],), (x[400:],)], settings, progress=False)
    np.testing.assert_allclose(row.loss, squared_error(graph, out, x), rtol=1e-4)
    _, (best,) = adaround(graph, {"fc": grid}, [(x,)], AdaRound(scales=(1.0,)), progress=False)
    np.testing.assert_allclose(row.nearest_loss, best.nearest_loss, rtol=1e-6)
    assert 0.8 * best.loss < row.loss < min(1.25 * best.loss, 0.8 * row.nearest_loss)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [2, 4])
def test_no_solver_is_worse_than_nearest_and_all_stay_on_the_grid(bits, seed):
    graph, x = one_layer(activation=True, seed=seed)
    grid = grid_of(graph, bits)
    out, (row,) = adaround(graph, {"fc": grid}, [(x,)], AdaRound(damping=0.0, scales=(1.0,)), progress=False)
    assert row.loss <= row.nearest_loss * (1 + 1e-6)
    kernel = out["fc"].weights["kernel"]
    integers = quantize(kernel, grid)
    assert integers.min() >= grid.qmin and integers.max() <= grid.qmax
    np.testing.assert_array_equal(fake_quantize(kernel, grid), kernel)


@pytest.mark.parametrize("rows", [1, 2, 5, 15])
def test_fewer_samples_than_inputs(rows):
    """A singular Gram matrix: the damping keeps the weights near the float ones, also for data never seen."""
    graph, x = one_layer(activation=False)
    grid = grid_of(graph, bits=4)
    out, (row,) = adaround(graph, {"fc": grid}, [(x[:rows],)], progress=False)
    assert np.isfinite(row.loss) and row.loss <= row.nearest_loss + 1e-6
    kernel = graph["fc"].weights["kernel"]
    assert np.abs(out["fc"].weights["kernel"] - kernel).max() < 4 * grid.scale.max()
    power = np.square(np.asarray(evaluate(graph, [x], ["fc"])[0])).sum(1).mean()
    assert squared_error(graph, out, x) < 0.2 * power
