"""Lowering of attention: layers and `ops.dot_product_attention`, with masks as what is added to the scores.

    softmax(scale * q k^T + mask) v,   mask = 0 where a query sees a key, -BIG elsewhere

A query that sees no key gets the mean of the values, as `ops.dot_product_attention` has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from kquant.graph.ir import Node
from kquant.graph.tracing.builder import (
    Builder,
    NotLowered,
    as_array,
    lowers_layer,
    lowers_op,
    reshape,
    scale_offset,
    transpose,
)
from kquant.graph.tracing.choices import as_number, compares_ids, ids_compared
from kquant.graph.tracing.functions import function
from kquant.graph.tracing.layers import global_pooling
from kquant.graph.tracing.operations import two_inputs

L = keras.layers
HIDDEN = 100.0  # exp(-HIDDEN) is 0
BIG = 1e9  # `transforms.bound_masks` makes of it what a softmax can see
Mask = Node | np.ndarray  # 1 where a key is seen, 0 elsewhere; a constant without the batch


def attend(b: Builder, q: Node, k: Node, v: Node, scale: float, masks: Sequence[Mask] = ()) -> tuple[Node, Node]:
    """Attention [batch, queries, heads, width of values], and its weights [batch, heads, queries, keys].

    Args:
        b: the builder.
        q: [batch, queries, heads, width].
        k: [batch, keys, groups, width], where a group serves consecutive heads.
        v: [batch, keys, groups, width of values].
        scale: of the scores.
        masks: 4 axes that broadcast against the weights.
    """
    if any(len(t.shape) != 4 for t in (q, k, v)):
        raise NotLowered("attention over several axes")
    (_, queries, heads, width), (_, keys, groups, _) = q.shape, k.shape
    q = transpose(b, scale_offset(b, q, scale, 0.0, "scale"), (0, 2, 1, 3), "query_heads")
    q = reshape(b, q, (None, groups, (heads or 0) // (groups or 1) * (queries or 0), width), "query_groups")
    scores = b.emit("batch_matmul", q, transpose(b, k, (0, 2, 1, 3), "key_heads"), suffix="scores", adjoint=True)
    scores = reshape(b, scores, (None, heads, queries, keys), "score_heads")
    weights = b.emit("softmax", masked(b, scores, masks), suffix="weights")
    grouped = reshape(b, weights, (*q.shape[:3], keys), "weight_groups")
    y = b.emit("batch_matmul", grouped, transpose(b, v, (0, 2, 1, 3), "value_heads"), suffix="context")
    y = reshape(b, y, (None, heads, queries, v.shape[3]), "context_heads")
    return transpose(b, y, (0, 2, 1, 3), "context_last"), weights


def masked(b: Builder, scores: Node, masks: Sequence[Mask]) -> Node:
    """The scores with what hides the keys added."""
    known = [m for m in masks if not isinstance(m, Node)]
    computed = [m for m in masks if isinstance(m, Node)]
    if known:
        hidden = (1 - np.prod(np.stack(np.broadcast_arrays(*known)), axis=0)) * -BIG
        scores = b.emit("add", scores, b.const(hidden), suffix="masked_by_constant")
    if computed:
        seen = computed[0]
        for k, mask in enumerate(computed[1:]):
            seen = b.emit("mul", seen, mask, suffix=f"mask_{k}")
        scores = b.emit("add", scores, scale_offset(b, seen, BIG, -BIG, "mask"), suffix="masked")
    return scores


def mask_of(b: Builder, value: Any, shape: Sequence[int | None]) -> list[Mask]:
    """A truth value (or a number, true unless it is 0) as a mask with these axes; nothing for None."""
    if value is None:
        return []
    if not isinstance(value, Node):
        array = (np.asarray(keras.ops.convert_to_numpy(value)) != 0).astype(np.float32)
        return [array.reshape(array.shape[1:]) if array.ndim == len(shape) and array.shape[0] == 1 else array]
    if compares_ids(b, value, 0.0):
        value = ids_compared(b, value, "not_equal", 0.0, "seen_mask")
    if value.dtype == "bool" and (number := as_number(b, value)) is not None:
        seen = number
    elif value.dtype == "bool":
        seen = b.emit("function", value, steps=(("select", 0, 1.0, 0.0),), suffix="mask_as_number")
    else:
        seen = function(b, value, lambda t: t.call("select", t.call("not_equal", t, 0.0), 1.0, 0.0), "mask_as_number")
    return [reshape(b, seen, shape, "mask_axes")]


def _causal(queries: int | None, keys: int | None) -> np.ndarray:
    """A query sees the keys up to its own place."""
    return np.tril(np.ones((queries or 0, keys or 0), np.float32))


def _masks(b: Builder, q: Node, k: Node, query: Any, key: Any, pairs: Any, causal: bool) -> list[Mask]:
    """Those of queries [batch, queries], of keys [batch, keys], of pairs (up to 4 axes), and the causal one."""
    masks = mask_of(b, query, (None, 1, q.shape[1], 1)) + mask_of(b, key, (None, 1, 1, k.shape[1]))
    if pairs is not None:
        rank = len(pairs.shape)
        middle = pairs.shape[1:] if rank == 4 else (1, *pairs.shape[1:])
        if rank not in (3, 4):
            raise NotLowered(f"a mask with {rank} axes")
        masks += mask_of(b, pairs, (None, *middle))
    return masks + ([_causal(q.shape[1], k.shape[1])] if causal else [])


@lowers_layer(L.MultiHeadAttention, L.GroupQueryAttention)
def multi_head_attention(
    b: Builder,
    layer: Any,
    query: Node,
    value: Node,
    key: Node | None = None,
    query_mask: Any = None,
    value_mask: Any = None,
    key_mask: Any = None,
    attention_mask: Any = None,
    return_attention_scores: bool = False,
    use_causal_mask: bool = False,
) -> Any:
    key = value if key is None else key
    if any(getattr(layer, name, None) is not None for name in ("_sliding_window", "sliding_window")):
        raise NotLowered("a sliding window")
    q, k, v = _projected(b, layer, query, key, value)
    masks = mask_of(b, key_mask, (None, 1, 1, k.shape[1])) if key_mask is not value_mask else []
    masks += _masks(b, q, k, query_mask, value_mask, attention_mask, use_causal_mask)
    scale = layer.head_dim**-0.5 if isinstance(layer, L.GroupQueryAttention) else layer._inverse_sqrt_key_dim
    y, weights = attend(b, q, k, v, float(scale), masks)
    return _output(b, layer, query, y, weights, return_attention_scores)


def _projected(b: Builder, layer: Any, query: Node, key: Node, value: Node) -> list[Node]:
    parts = (layer._query_dense, query), (layer._key_dense, key), (layer._value_dense, value)
    return [b.trace_function(b, dense, [x])[0] for dense, x in parts]


def _output(b: Builder, layer: Any, query: Node, y: Node, weights: Node, both: bool) -> Any:
    if getattr(layer, "_use_gate", False) or getattr(layer, "use_gate", False):
        y = b.emit("mul", y, b.trace_function(b, layer._gate_dense, [query])[0], suffix="gated")
    y = b.trace_function(b, layer._output_dense, [y])[0]
    return [y, weights] if both else y


@lowers_op("DotProductAttention")
def dot_product_attention(
    b: Builder,
    op: Any,
    query: Node,
    key: Node,
    value: Node,
    bias: Any = None,
    mask: Any = None,
    scale: Any = None,  # arguments of the call, or in other versions of Keras settings
    is_causal: bool = False,
    attn_logits_soft_cap: float | None = None,
    **settings: Any,
) -> Node:
    cap = getattr(op, "attn_logits_soft_cap", None) if attn_logits_soft_cap is None else attn_logits_soft_cap
    if bias is not None or cap is not None:
        raise NotLowered("a bias or a cap of the scores")
    scale = getattr(op, "scale", None) if scale is None else scale
    scale = float(query.shape[-1] or 1) ** -0.5 if scale is None else float(as_array(scale).reshape(()))
    masks = _masks(b, query, key, None, None, mask, is_causal or bool(getattr(op, "is_causal", False)))
    return attend(b, query, key, value, scale, masks)[0]


@lowers_layer(L.Attention, L.AdditiveAttention)
def attention(
    b: Builder,
    layer: Any,
    inputs: Sequence[Node],
    mask: Any = None,
    return_attention_scores: bool = False,
    use_causal_mask: bool = False,
) -> Any:
    """Of one head; additive where it sums tanh(q + k)."""
    q, v = inputs[:2]
    k = inputs[2] if len(inputs) > 2 else v
    query_mask, value_mask = (mask[0], mask[1]) if mask else (None, None)
    if any(len(t.shape) != 3 for t in (q, k, v)):
        raise NotLowered("more than three axes")
    masks = mask_of(b, value_mask, (None, 1, v.shape[1]))
    masks += [_causal(q.shape[1], k.shape[1])] if use_causal_mask else []
    factor = 1.0 if getattr(layer, "scale", None) is None else as_array(layer.scale)
    if isinstance(layer, L.AdditiveAttention):
        scores = _additive(b, q, k, 1.0, factor)
    elif layer.score_mode == "concat":
        scores = _additive(b, q, k, factor, as_array(layer.concat_score_weight))
    else:
        q = scale_offset(b, q, factor, 0.0, "scale") if np.any(factor != 1) else q
        scores = b.emit("batch_matmul", q, k, suffix="scores", adjoint=True)
    weights = b.emit("softmax", masked(b, scores, masks), suffix="weights")
    y = b.emit("batch_matmul", weights, v)
    for shown in mask_of(b, query_mask, (None, q.shape[1], 1)):  # what hidden queries get is zero
        y = two_inputs(b, "mul", y, shown, "shown")
    return [y, weights] if return_attention_scores else y


def _additive(b: Builder, q: Node, k: Node, inner: Any, outer: Any) -> Node:
    """sum(outer * tanh(inner * (q + k))) over the width, of all pairs."""
    pairs = reshape(b, q, (None, q.shape[1], 1, q.shape[2]), "queries"), reshape(b, k, (None, 1, *k.shape[1:]), "keys")
    total = two_inputs(b, "add", *pairs, "pairs")
    if np.any(inner != 1):
        total = scale_offset(b, total, inner, 0.0, "scale")
    width = int(q.shape[2] or 0)
    kernel = np.broadcast_to(outer, (width,)).reshape(width, 1)
    y = b.emit(
        "dense", b.emit("tanh", total, suffix="tanh"), weights={"kernel": kernel, "bias": np.zeros(1)}, suffix="sum"
    )
    return reshape(b, y, (None, q.shape[1], k.shape[1]), "scores")


@lowers_layer(L.Softmax)
def softmax_layer(b: Builder, layer: Any, inputs: Node, mask: Any = None) -> Node:
    """With a mask, entries that it hides count as 0."""
    axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0] if len(layer.axis) == 1 else None
    if axis is None:
        raise NotLowered(f"a softmax over the axes {tuple(layer.axis)}")
    rank = len(inputs.shape)
    order = (*(a for a in range(rank) if a != axis % rank), axis % rank)
    x = transpose(b, inputs, order, "axis_last")
    if mask is not None:
        truths = isinstance(mask, Node) and (mask.dtype == "bool" or compares_ids(b, mask, 0.0))
        if not truths or len(mask.shape) != rank:
            raise NotLowered("a softmax with a mask of another rank, or of numbers")
        seen = mask_of(b, mask, mask.shape)[0]
        assert isinstance(seen, Node)
        x = masked(b, x, [transpose(b, seen, order, "mask_axis_last")])
    return transpose(b, b.emit("softmax", x), [int(i) for i in np.argsort(order)], "axis_back")


@lowers_layer(L.GlobalAveragePooling1D)
def mean_of_seen(b: Builder, layer: Any, inputs: Node, mask: Any = None) -> Node:
    """The mean over the places, with a mask over those that are seen (over all where none is).

    As a product with weights that are 1 / n at n places: a softmax makes them, in 16 bits since they are small.
    """
    if mask is None:
        return global_pooling(b, layer, inputs)
    if not isinstance(mask, Node) or len(mask.shape) != 2 or layer.data_format == "channels_first":
        raise NotLowered("pooling with a mask that is not one truth value for every place")
    (seen,) = mask_of(b, mask, (None, 1, mask.shape[1]))
    assert isinstance(seen, Node)
    hidden = scale_offset(b, seen, HIDDEN, -HIDDEN, "hidden")
    weights = b.emit("softmax", hidden, suffix="weights", wide=True)
    y = b.emit("batch_matmul", weights, inputs, wide=True)
    return y if layer.keepdims else reshape(b, y, (None, inputs.shape[-1]), "pooled")
