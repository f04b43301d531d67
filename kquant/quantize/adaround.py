"""AdaRound: round each layer's weights so that its output changes least (white paper, section 3.4).

Layer by layer in topological order, minimize over the integers of the grid, and over the bias, which stays at 32 bits,

    E || f(W x + b) - f(W^ x^ + b^) ||^2                                                     (eq. 35)

with x the input in the float network and x^ that in the network quantized so far. Without f the expectation is a
quadratic form in W^ (`gram.Moments`), each output channel is a problem of its own, and all integers may be compared,
not only the two neighbours of a weight. `SOLVERS` says how it is minimized:

    "descent"     sequential rounding (GPTQ) and coordinate descent on the quadratic form: fastest and best
    "gram"        AdaRound's relaxation on the quadratic form
    "stochastic"  AdaRound as published: minibatches, activation in the loss

The quadratic form is centred on W* = Cov(y, x^) Cov(x^, x^)^-1, the float weights that repair the errors of earlier
layers best, damped towards W. The bias that belongs to W^ is known in closed form, b^ = E y - W^ E x^.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from kquant.config.specs import AdaRound, QuantSpec
from kquant.errors import ConfigError
from kquant.graph.ir import Graph, Node
from kquant.graph.ops import bias_of, clip_of, linear_of, op_of, weight_of, weight_view
from kquant.grids.formats import FORMATS, weight_grid
from kquant.grids.formats.blocks import in_float16
from kquant.grids.grid import Grid, dequantize, fake_quantize, fit_bias, quantize
from kquant.quantize.descent import Quadratic, descent, sequential
from kquant.quantize.gram import (
    Moments,
    channels_to_groups,
    from_matrices,
    moments,
    positions_of,
    sampled_rows,
    to_matrices,
)
from kquant.quantize.refit import Fit, refitted
from kquant.quantize.relaxation import relax_gram, relax_rows
from kquant.quantize.sensitivity import with_steps
from kquant.quantize.tied import inputs_of, tied_weights
from kquant.quantize.walk import Batches, Data, layer_by_layer

Array = np.ndarray[Any, Any]
_ROW_BYTES = 256 << 20  # patches that the stochastic solver holds


@dataclass(frozen=True, eq=False)
class LayerRounding:
    """What became of one layer. Errors are expected squares of its output before the activation, summed over channels.

    Attributes:
        node: its name.
        grid: of its weights; not the given one where `AdaRound.scales` offers others, or the bias would not fit.
        integers: its weights on that grid, in the shape of the `weight_view`.
        rows: how many patches were seen.
        power: variance of the float output: what the errors compare to.
        nearest_loss: error with weights rounded to nearest on the given grid, at the best bias.
        loss: error with the chosen weights.
        changed: fraction of weights whose integer is not the nearest one.
    """

    node: str
    grid: Grid = field(repr=False)
    integers: Array = field(repr=False)
    rows: int
    power: float
    nearest_loss: float
    loss: float
    changed: float


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer on its way: the float node, its inputs, their moments, and the problem on its grid."""

    node: Node
    batches: Batches
    moments: Moments
    problem: Quadratic
    scale: Array


def _stochastic(layer: _Layer, settings: AdaRound, seed: int) -> Array:
    node, m = layer.node, layer.moments
    fits = _ROW_BYTES / (4 * m.gram.shape[0] * m.gram.shape[1] * m.rows)
    drawn = max(1, int(min(positions(node, settings), positions_of(node)) * min(1.0, fits)))
    w = to_matrices(node, node.weights[weight_of(node).name])
    offset = channels_to_groups(node, node.weights[bias_of(node)]) - m.y_mean
    found, wanted = [], []
    for x, x_hat in sampled_rows(node, layer.batches(), drawn, seed):
        found.append(x_hat.numpy() - m.x_mean)
        wanted.append(x.numpy() @ w + offset)
    rows = np.concatenate(found, axis=1), np.concatenate(wanted, axis=1)
    lo, hi = clip_of(node)
    clip = (-np.inf if lo is None else lo, np.inf if hi is None else hi)
    low, high = (channels_to_groups(node, np.asarray(v, np.float64)) - m.y_mean for v in clip)
    return relax_rows(
        layer.problem, layer.scale, rows, (low, high), iterations=settings.iterations, batch=settings.batch, seed=seed
    )


SOLVERS: Mapping[str, Callable[[_Layer, AdaRound, int], Array]] = {
    "descent": lambda layer, settings, seed: descent(layer.problem, settings.sweeps),
    "gram": lambda layer, settings, seed: relax_gram(layer.problem, settings.iterations),
    "stochastic": _stochastic,
}


def adaround(
    graph: Graph,
    weights: Mapping[str, Grid],
    data: Data,
    settings: AdaRound = AdaRound(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
    progress: bool = True,
    memory: int = 3 << 28,
    input_bits: Mapping[str, int] = MappingProxyType({}),
    keep_zeros: bool = False,
    specs: Mapping[str, QuantSpec] = MappingProxyType({}),
    allowed: Mapping[str, Array] = MappingProxyType({}),
) -> tuple[Graph, list[LayerRounding]]:
    """Round the weights of linear operations with the output in view.

    Args:
        graph: a float graph, batch normalization folded and activations fused.
        weights: node -> grid of its weights, see `graph.ops.weight_view`; nodes that are no matrix products are left
            alone.
        data: representative inputs, re-iterable: tuples of arrays [n, ...], one per graph input.
        settings: see `AdaRound`.
        seed: of the positions and minibatches.
        progress: show a bar.
        memory: bytes for activations, see `walk.layer_by_layer`.
        input_bits: node -> bits of the grid that its input will have, so that the bias fits 32 bits beside the integers
            that are decided here (`fit_bias`); without an entry it is not looked at.
        keep_zeros: weights that are exactly zero stay zero.
        specs: node -> the spec of its weights: what has a table of levels is fitted anew to the weights that repair
            earlier errors, weighted by the second moments of the inputs, and again to the integers (`refit`).
        allowed: node -> what decides the step of each channel (`sensitivity.allowed_errors`); others keep their grid.

    Returns:
        The graph with kernels on the grids that the report names and biases that fit them, and a report per layer in
        topological order. No channel has a larger error than with the nearest integers, in the solver's objective.

    Raises:
        CalibrationError: the data is empty or does not fit, or a tensor is not finite.
    """
    names = [n.name for n in graph if n.name in weights and op_of(n).matrix]
    report: list[LayerRounding] = []
    rounded: dict[str, LayerRounding] = {}  # of weights that several nodes have: by the first of them

    def solve(node: Node, batches: Batches) -> Node:
        inputs = batches if settings.asymmetric else lambda: ((x, x) for x, _ in batches())
        grid, task = weights[node.name], task_of(node)
        if (first := tied.get(node.name)) is not None:
            if first not in rounded:
                together = inputs_of(graph, [n for n, f in tied.items() if f == first], data)
                rounded[first] = round_layer(node, together, grid, settings, seed, task)[1]
            node, row = as_rounded(node, inputs, rounded[first], grid, settings, seed)
        else:
            node, row = round_layer(node, inputs, grid, settings, seed, task)
        report.append(row)
        return node

    def task_of(node: Node) -> Task:
        name = node.name
        return Task(input_bits.get(name), keep_zeros, specs.get(name), allowed.get(name))

    tied = tied_weights(graph, names)

    graph = layer_by_layer(graph, names, data, solve, memory=memory, progress=progress, title="rounding")
    return graph, report


@dataclass(frozen=True, eq=False)
class Task:
    """What is asked of one layer, besides its grid; see `adaround`."""

    input_bits: int | None = None
    keep_zeros: bool = False
    spec: QuantSpec | None = None
    allowed: Array | None = None


def round_layer(
    node: Node,
    batches: Batches,
    grid: Grid,
    settings: AdaRound,
    seed: int = 0,
    task: Task = Task(),  # noqa: B008 (frozen)
) -> tuple[Node, LayerRounding]:
    """One layer of `adaround`, from passes over its inputs (x, x^)."""
    if (grid.table is not None or grid.scale.ndim == 2) and settings.solver != "descent":
        raise ConfigError(
            f"{node.origin or node.name!r}: the solver {settings.solver!r} relaxes between two neighbouring integers, "
            'and the weights have a table of allowed ones, or scales of blocks; use solver="descent".'
        )
    m = moments(node, batches(), positions=positions(node, settings), seed=seed)
    return round_on(node, batches, m, grid, settings, seed, task)


def round_on(
    node: Node,
    batches: Batches,
    m: Moments,
    grid: Grid,
    settings: AdaRound,
    seed: int = 0,
    task: Task = Task(),  # noqa: B008 (frozen)
) -> tuple[Node, LayerRounding]:
    """`round_layer` with the moments of the layer's inputs; `batches` is for the solver "stochastic" alone."""
    w = to_matrices(node, node.weights[weight_of(node).name])
    target, metric = m.target(w, settings.damping)
    free = (w != 0).astype(np.float32) if task.keep_zeros else None

    def problem_of(grid: Grid) -> tuple[Quadratic, Array]:
        problem, scale = _problem(node, grid, target, metric)
        return replace(problem, free=free), scale

    best = _chosen(node, grid, m, target if free is None else target * free, metric, task)
    best = best if task.input_bits is None else _with_room(node, best, m, task.input_bits)
    best = best if task.allowed is not None else _rescaled(node, best, target, metric, settings.scales)
    problem, scale = problem_of(best)
    u = SOLVERS[settings.solver](_Layer(node, batches, m, problem, scale), settings, seed)
    if best.table is not None and task.spec is not None and settings.scales != (1.0,):
        fit = Fit(problem_of, target, metric, FORMATS[task.spec.format].design)
        best, u = refitted(fit, best, u, settings.sweeps)
        if task.input_bits is not None and (room := _with_room(node, best, m, task.input_bits)) is not best:
            best, u = room, descent(problem_of(room)[0], settings.sweeps, u)
    integers = _integers(node, u, best, scale)
    return _with_integers(node, m, grid, best, integers)


def _chosen(node: Node, grid: Grid, m: Moments, target: Array, metric: Array, task: Task) -> Grid:
    """The grid for the weights W* of a layer: by its second moments where they have a say, or else the given one."""
    view = weight_view(node)
    if task.allowed is not None:
        return with_steps(grid, task.allowed, m, np.abs(target).max(axis=1))
    if task.spec is None or task.spec.format == "uniform" or not target.any():
        return grid
    importance = np.broadcast_to(np.diagonal(metric, axis1=1, axis2=2)[:, :, None], target.shape)
    best, v = (from_matrices(node, x.astype(np.float32)).reshape(view.shape) for x in (target, importance))
    return weight_grid(best, task.spec, grid.axis, v, node.origin or node.name)


def as_rounded(
    node: Node, batches: Batches, shared: LayerRounding, grid: Grid, settings: AdaRound, seed: int
) -> tuple[Node, LayerRounding]:
    """A layer whose integers were decided together with those of others: what is its own is the bias."""
    m = moments(node, batches(), positions=positions(node, settings), seed=seed)
    return _with_integers(node, m, grid, shared.grid, shared.integers)


def _with_integers(node: Node, m: Moments, grid: Grid, best: Grid, integers: Array) -> tuple[Node, LayerRounding]:
    """The node with integers on the grid `best` and the bias that belongs to them; and how it compares to `grid`."""
    key = weight_of(node).name
    kernel, view = node.weights[key], weight_view(node)
    rounded, nearest = (
        to_matrices(node, values.reshape(kernel.shape))
        for values in (dequantize(integers, best), fake_quantize(view, grid))
    )
    row = LayerRounding(
        node=node.name,
        grid=best,
        integers=integers,
        rows=m.rows,
        power=float(m.power.sum()),
        nearest_loss=float(m.loss(nearest).sum()),
        loss=float(m.loss(rounded).sum()),
        changed=float(np.mean(integers != quantize(view, grid))),
    )
    found = {key: from_matrices(node, rounded), bias_of(node): m.bias(rounded).astype(np.float32)}
    return node.with_weights(**found), row


def _with_room(node: Node, grid: Grid, m: Moments, input_bits: int) -> Grid:
    """The grid, coarser in channels whose bias would not fit: those that are dead, with weights near zero.

    No range is smaller than the root mean square of the values in it, so that half of that has room for what clips.
    """
    rms = float(np.sqrt(np.max(np.diagonal(m.gram, axis1=1, axis2=2) + np.square(m.x_mean[:, 0]))))
    least = rms / 2**input_bits / 2
    return fit_bias(grid, node.weights[bias_of(node)], least) if least > 0 else grid


def positions(node: Node, settings: AdaRound) -> int:
    """Positions of a sample: a quarter is enough where the outputs read one channel each."""
    return -(-settings.positions // 4) if linear_of(node).channelwise else settings.positions


def _problem(node: Node, grid: Grid, target: Array, metric: Array) -> tuple[Quadratic, Array]:
    zero = channels_to_groups(node, grid.zero_point)
    scale = channels_to_groups(node, grid.scale if grid.scale.ndim < 2 else grid.scale.max(axis=1))
    levels = None if grid.table is None else _levels(node, grid)
    unit = None if grid.scale.ndim < 2 else _block_scales(node, grid) / scale
    steps = target / scale.astype(np.float64)
    return Quadratic(metric, steps, grid.qmin - zero, grid.qmax - zero, levels, unit=unit), scale


def _block_scales(node: Node, grid: Grid) -> Array:
    """The scale of every weight, as `to_matrices` has the weights."""
    shape = weight_view(node).shape
    each = np.broadcast_to(grid.spread(grid.scale, shape), shape)
    return to_matrices(node, each.reshape(node.weights[weight_of(node).name].shape))


def _integers(node: Node, u: Array, grid: Grid, scale: Array) -> Array:
    """What the solvers found, as integers of the grid in the shape of the `weight_view`."""
    shape = weight_view(node).shape
    steps = u if grid.scale.ndim < 2 else np.rint(u * (scale / _block_scales(node, grid)))
    integers = from_matrices(node, steps).reshape(shape) + grid.spread(grid.zero_point, shape)
    return np.asarray(integers.astype(np.int8 if grid.container == 8 else np.int16))


def _levels(node: Node, grid: Grid) -> Array:
    """The allowed integers less the zero point: (levels,) for all alike, or shaped as `to_matrices` has the weights."""
    if grid.table is not None and grid.table.ndim == 1 and not np.any(grid.zero_point):
        return grid.table.astype(np.float32)
    shape = weight_view(node).shape
    kernel = node.weights["kernel"].shape
    return np.stack([to_matrices(node, np.broadcast_to(v, shape).reshape(kernel)) for v in grid.levels(shape)])


def _rescaled(node: Node, grid: Grid, target: Array, metric: Array, factors: tuple[float, ...]) -> Grid:
    """The grid with each scale times the factor that leaves the least cost after sequential rounding.

    Where all scales are powers of two, as some targets want them, they stay.
    """
    if factors == (1.0,) or (np.frexp(grid.scale)[0] == 0.5).all():
        return grid
    costs = []
    for factor in factors:
        candidate = replace(grid, scale=np.asarray(grid.scale * np.float32(factor)))
        problem, scale = _problem(node, candidate, target, metric)
        u = problem.better(problem.nearest(), sequential(problem))
        cost = problem.cost(u) * np.square(scale, dtype=np.float64)
        costs.append(cost.reshape(-1) if grid.axis is not None else cost.sum())
    factor = np.asarray(factors, np.float32)[np.argmin(costs, axis=0)]
    if grid.scale.ndim == 2:
        return replace(grid, scale=in_float16(grid.scale * factor[:, None]))
    return replace(grid, scale=np.asarray(grid.scale * factor, np.float32))
