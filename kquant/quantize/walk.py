"""Visit linear operations in topological order, each with its input in the float and in the quantized network.

Post-training steps such as AdaRound (white paper, section 3.4) and bias correction (section 3.3) decide a layer from
the input x of the float network and the input x_hat of the network whose earlier layers are quantized already. One
pass from the graph's inputs per layer would cost time quadratic in the depth. So the graph is cut where few values are
alive, between blocks mostly. The tensors alive at the current cut are held for all samples and both networks, in
float32, and a layer behind the cut computes its input from there. Shortest path over the layers finds the best cuts.

Tensors at early cuts are large. Where not all samples fit into the memory, as many as do are used, and the others join
in at a later cut, where tensors are smaller (an early layer sees thousands of positions in each sample anyway).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from kquant.errors import CalibrationError
from kquant.graph.ir import Graph, Node, sample_size
from kquant.graph.ops import compute

Batches = Callable[[], Iterator[tuple[tf.Tensor, tf.Tensor]]]  # one pass; call again for another pass
Solve = Callable[[Node, Batches], Node]
Data = Iterable[Sequence[Any]]  # re-iterable, of batches: one array per graph input
Key = tuple[str, bool]  # tensor, whether that of the quantized network
Block = tuple[tf.Tensor, ...]  # some samples of several tensors
Parts = tuple[int, ...]  # how many entries of its first axis each of them has for a sample

_SLICE = 32 << 20  # bytes of the largest activation computed at once,
_ROWS = 1024  # from at most so many samples
_ELEMENT_WORK = 20  # a pass over a value costs about as much as so many multiplications of a convolution
_FEWEST = 4  # a cut must hold at least 1 / _FEWEST of the samples


def layer_by_layer(
    graph: Graph,
    names: Iterable[str],
    data: Data,
    solve: Solve,
    *,
    memory: int = 1 << 30,
    progress: bool = True,
    title: str = "",
) -> Graph:
    """Replace linear operations one after the other.

    Args:
        graph: a float graph.
        names: the nodes to visit; the order does not matter.
        data: a `CalibrationData`, or any re-iterable of tuples of arrays [n, ...], one per graph input.
        solve: solve(node, batches) -> the replacement: the same operation, inputs and shape, with another kernel or
            bias. `node` is the float node; batches() yields (x, x_hat) [n, ...], the node's input in the float
            network and in the network where every node visited before is replaced. The two are the same tensor where
            no visited node comes before. Every call of batches(), until solve returns, is a pass over the same samples.
        memory: bytes for the tensors held at a cut, about.
        progress: show a bar.
        title: its description.

    Returns:
        The graph with all replacements.

    Raises:
        CalibrationError: the data is empty, or a tensor is not finite.
    """
    wanted = set(names)
    visits = [name for name in graph.nodes if name in wanted]
    if missing := wanted.difference(visits):
        raise KeyError(f"not in the graph: {sorted(missing)}")
    if not visits:
        return graph
    route = _Route.of(graph, visits)
    samples, total = _read(data, max(1, memory // route.bytes_of(route.inputs)))
    cuts = _best_cuts(route, memory, total)
    blocks, cut = deque(_regroup(samples, cuts[0].slice, route.parts(route.inputs))), cuts[0]
    del samples
    nodes = dict(graph.nodes)
    for index, name in enumerate(tqdm(visits, desc=title, unit="layer", disable=not progress, leave=False)):
        if index and index in cuts:
            blocks = _advance(route, nodes, blocks, (cut, cuts[index]), data, total)
            cut = cuts[index]
        source = graph[name].inputs[0]
        fetch = tuple(dict.fromkeys([(source, False), (source, source in route.changed)]))
        nodes[name] = solve(graph[name], _batches(_compiled(route, nodes, cut.keys, fetch), blocks))
    return graph.rebuild(nodes.values())


@dataclass(frozen=True, eq=False)
class _Route:
    """What is known of a walk before it starts.

    Attributes:
        graph: the float graph.
        visits: the nodes to visit, in topological order.
        position: node -> its number in the graph.
        changed: nodes whose output differs between the networks.
        needed: nodes that an input of a visited node depends on, or that are visited.
        constant: nodes that depend on no input of the graph.
    """

    graph: Graph
    visits: list[str]
    position: Mapping[str, int]
    changed: set[str]
    needed: set[str]
    constant: set[str]

    @classmethod
    def of(cls, graph: Graph, visits: list[str]) -> _Route:
        changed, needed = set(visits), set(visits)
        constant: set[str] = set()
        for node in graph:
            if changed.intersection(node.inputs):
                changed.add(node.name)
            if node.op != "input" and constant.issuperset(node.inputs):
                constant.add(node.name)
        for name in reversed(list(graph.nodes)):
            if name in needed:
                needed.update(graph[name].inputs)
        return cls(graph, visits, {name: k for k, name in enumerate(graph.nodes)}, changed, needed, constant)

    @property
    def inputs(self) -> tuple[Key, ...]:
        """The inputs of the graph."""
        return tuple((name, False) for name in self.graph.inputs)

    def live(self, visit: str) -> tuple[Key, ...]:
        """The tensors computed before `visit` that it or a node behind it reads, in both networks."""
        here, keys = self.position[visit], []
        for node in list(self.graph)[:here]:
            readers = [n.name for n in self.graph.consumers(node.name) if n.name in self.needed]
            if node.name not in self.constant and any(self.position[r] >= here for r in readers):
                keys += [(node.name, False)] + [(node.name, True)] * (node.name in self.changed)
        return tuple(keys)

    def sources(self, key: Key) -> list[Key]:
        """The tensors that the tensor `key` is computed from."""
        name, quantized = key
        return [(i, quantized and i in self.changed) for i in self.graph[name].inputs]

    def parts(self, keys: Sequence[Key]) -> Parts:
        """`Node.batch` of some tensors."""
        return tuple(self.graph[name].batch for name, _ in keys)

    def bytes_of(self, keys: Sequence[Key]) -> int:
        """Bytes of one sample of some tensors."""
        return sum(4 * sample_size(self.graph[name]) for name, _ in keys)

    def slice_rows(self, keys: Sequence[Key], start: int, stop: int) -> int:
        """Samples whose largest activation, of `keys` and of the nodes number start to stop - 1, takes about 32 MB."""
        nodes = [self.graph[name] for name, _ in keys]
        nodes += [n for n in list(self.graph)[start:stop] if n.name in self.needed]
        return max(1, min(_ROWS, _SLICE // max(4 * sample_size(n) for n in nodes)))


@dataclass(frozen=True, eq=False)
class _Cut:
    """A place where tensors are held.

    Attributes:
        position: number of the first node behind it.
        keys: the tensors.
        rows: how many samples fit.
        slice: how many of them are computed at once.
    """

    position: int
    keys: tuple[Key, ...]
    rows: int
    slice: int


def _work(node: Node) -> int:
    """Roughly the time of a node, in multiplications."""
    kernel = node.weights.get("kernel")
    products = 0 if kernel is None else kernel.size // (node.shape[-1] or 1)
    return (_ELEMENT_WORK + products) * sample_size(node)


def _best_cuts(route: _Route, memory: int, total: int) -> dict[int, _Cut]:
    """Number of a visit -> the cut in front of it, such that the computation per sample is least.

    A cut in front of visit c that serves visits c to j - 1 costs the way from the cut to each of them, the way to the
    next cut, and the passes over the tensors held there. The first cut is at the inputs. Shortest path over the visits.
    Later cuts never hold fewer samples than those before, so that each is brought in from the inputs once at most.
    """
    graph, visits = route.graph, route.visits
    work = [(n.name in route.needed) * (1 + (n.name in route.changed)) * _work(n) for n in graph]
    before = np.concatenate([[0], np.cumsum(work)])
    positions = [0, *(route.position[v] for v in visits[1:])]
    keys = [route.inputs, *(route.live(v) for v in visits[1:])]
    at = [float(before[route.position[v]]) for v in visits]  # work in front of every visit
    start = [float(before[p]) for p in positions]
    store = [float(_ELEMENT_WORK * route.bytes_of(k) // 4) for k in keys]
    rows = [max(1, min(total, memory // max(1, route.bytes_of(k)))) for k in keys]
    allowed = [c == 0 or rows[c] * _FEWEST >= total for c in range(len(visits))]
    cost, previous = [0.0] + [np.inf] * len(visits), [0] * (len(visits) + 1)
    for c in range(len(visits)):
        served = 0.0
        for j in range(c + 1, len(visits) + 1) if allowed[c] else ():
            if j - 1 > c and allowed[j - 1] and _adds_samples(rows[c], rows[j - 1], total):
                break  # a cut there lets visit j - 1 use more samples
            served += at[j - 1] - start[c]
            way = cost[c] + served + (start[j] - start[c] + store[j] if j < len(visits) else 0.0)
            drops = c > 0 and j < len(visits) and rows[j] < rows[c]
            if way < cost[j] and not drops:
                cost[j], previous[j] = way, c
    chosen, j = {}, len(visits)
    while j:
        c = previous[j]
        stop = positions[j] if j < len(visits) else len(graph.nodes)
        chosen[c] = _Cut(positions[c], keys[c], rows[c], route.slice_rows(keys[c], positions[c], stop))
        j = c
    return chosen


def _adds_samples(held: int, room: int, total: int) -> bool:
    """Whether samples are added to those held, for which the data is read again."""
    return held < total and room >= min(total, 2 * held)


def _compiled(
    route: _Route, nodes: Mapping[str, Node], keys: tuple[Key, ...], fetch: tuple[Key, ...]
) -> Callable[[Block], Block]:
    """The function from the tensors `keys` to the tensors `fetch`, with the replacements of now."""
    pending, path = [k for k in fetch if k not in keys], set()
    while pending:
        key = pending.pop()
        if key not in path:
            path.add(key)
            pending += [k for k in route.sources(key) if k not in keys]
    if not path:
        chosen = [keys.index(key) for key in fetch]
        return lambda block: tuple(block[k] for k in chosen)
    order = sorted(path, key=lambda key: (route.position[key[0]], key[1]))
    owner = {key: (nodes if key[1] else route.graph.nodes)[key[0]] for key in order}
    # captured tensors stay outside of the compiled graph, arrays would be copied into it as constants
    weights = {key: {k: tf.constant(w) for k, w in owner[key].weights.items()} for key in order}
    computed = [k for k in fetch if k in path]
    signature = [tf.TensorSpec(route.graph[name].shape, route.graph[name].dtype) for name, _ in keys]

    @tf.function(input_signature=signature, autograph=False)
    def run(*held: Any) -> tuple[list[Any], Any]:
        values = dict(zip(keys, held, strict=True))
        for key in order:
            values[key] = compute(owner[key], [values[k] for k in route.sources(key)], weights[key])
        results = [values[key] for key in fetch]
        # a sum is finite only if all of its terms are
        return results, tf.stack([tf.reduce_sum(tf.cast(values[key], tf.float32)) for key in computed])

    concrete = run.get_concrete_function()

    def checked(block: Block) -> Block:
        results, sums = concrete(*block)
        for (name, quantized), total in zip(computed, sums.numpy(), strict=True):
            if not np.isfinite(total):
                where = " once earlier layers are quantized" if quantized else ""
                raise CalibrationError(
                    f"The output of {route.graph[name].origin or name!r} (tensor {name!r}) holds NaN or infinite "
                    f"values{where}. Check the preprocessing of the data and the weights in front of it."
                )
        return tuple(results)

    return checked


def _batches(run: Callable[[Block], Block], blocks: Iterable[Block]) -> Batches:
    def batches() -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
        for block in blocks:
            results = run(block)
            yield results[0], results[-1]

    return batches


def _advance(
    route: _Route,
    nodes: Mapping[str, Node],
    blocks: deque[Block],
    cuts: tuple[_Cut, _Cut],
    data: Data,
    total: int,
) -> deque[Block]:
    """Compute the tensors of the next cut from those of the last, which are freed on the way; add samples."""
    last, cut = cuts
    parts, behind, given = route.parts(last.keys), route.parts(cut.keys), route.parts(route.inputs)
    held = sum(_samples(b, parts) for b in blocks)
    kept = deque(_window(blocks, 0, cut.rows, parts))
    blocks.clear()

    def moved() -> Iterator[Block]:
        run = _compiled(route, nodes, last.keys, cut.keys)
        yield from map(run, _drain(kept))
        if _adds_samples(held, cut.rows, total):
            run = _compiled(route, nodes, route.inputs, cut.keys)
            fresh = _window(map(_tensors, data), held, cut.rows, given)
            yield from map(run, _regroup(fresh, route.slice_rows(route.inputs, 0, cut.position), given))

    return deque(_regroup(moved(), cut.slice, behind))


def _read(data: Data, room: int) -> tuple[list[Block], int]:
    """The inputs of the first `room` samples, and the number of all samples."""
    held: list[Block] = []
    total = 0
    for batch in data:
        if total < room:
            held += _window([_tensors(batch)], 0, room - total, (1,) * len(batch))
        total += len(batch[0])
    if not total:
        raise CalibrationError("The calibration data holds no samples; pass a few hundred preprocessed ones.")
    return held, total


def _tensors(batch: Sequence[Any]) -> Block:
    return tuple(tf.convert_to_tensor(x) for x in batch)


def _drain(blocks: deque[Block]) -> Iterator[Block]:
    """The blocks, each forgotten when it is passed on."""
    while blocks:
        yield blocks.popleft()


def _samples(block: Block, parts: Parts) -> int:
    return len(block[0]) // parts[0]


def _cut_out(block: Block, start: int, stop: int, parts: Parts) -> Block:
    """Samples number start to stop - 1 of a block."""
    return tuple(t[p * start : p * stop] for t, p in zip(block, parts, strict=True))


def _window(blocks: Iterable[Block], start: int, stop: int, parts: Parts) -> Iterator[Block]:
    """Samples number start to stop - 1."""
    seen = 0
    for block in blocks:
        count = _samples(block, parts)
        low, high = max(start - seen, 0), min(stop - seen, count)
        if low < high:
            yield block if high - low == count else _cut_out(block, low, high, parts)
        seen += count
        if seen >= stop:
            return


def _regroup(blocks: Iterable[Block], rows: int, parts: Parts) -> Iterator[Block]:
    """The same samples in blocks of `rows`; the last may be smaller."""
    pieces: list[Block] = []
    count = 0
    for block in blocks:
        start, size = 0, _samples(block, parts)
        while start < size:
            taken = min(rows - count, size - start)
            pieces.append(block if taken == size else _cut_out(block, start, start + taken, parts))
            start, count = start + taken, count + taken
            if count == rows:
                yield _joined(pieces)
                pieces, count = [], 0
    if pieces:
        yield _joined(pieces)


def _joined(pieces: list[Block]) -> Block:
    return pieces[0] if len(pieces) == 1 else tuple(tf.concat(tensors, 0) for tensors in zip(*pieces, strict=True))
