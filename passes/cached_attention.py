"""Find attention over a cache of keys and values that grows by concatenation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx.reference import ReferenceEvaluator

from ..export.graph_names import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, is_past
from ._gs import Array, Dim, Graph, Node, Tensor, dtype_of, export_model, shape_of
from .graph import Index
from .patterns import axis_of

_BATCH, _PAST, _NEW = 2, 3, 4
"""Sizes for which masks are computed."""

_FLOAT32, _BOOL = np.dtype(np.float32), np.dtype(np.bool_)


@dataclass(frozen=True, eq=False)
class Cache:
    """A graph input, what is appended to it, and the graph output: [batch, kv_heads, positions, head_dim] each."""

    past: Tensor
    new: Tensor
    present: Tensor


@dataclass(frozen=True, eq=False)
class CachedAttention:
    """An ``Attention`` node with caches.

    Attributes:
        query: [batch, heads, sequence, head_dim].
        mask: Boolean, [batch or 1, heads or 1, sequence, total].
        sizes: The shape of ``query``.
        groups: Heads of keys and values, of which those of the query are a multiple.
    """

    node: Node
    query: Tensor
    key: Cache
    value: Cache
    mask: Tensor
    sizes: tuple[Dim, int, Dim, int]
    groups: int


def find_cached_attention(graph: Graph, index: Index) -> list[CachedAttention]:
    """All attention of a graph that has caches; empty if one cache is used in a way that is not of this kind.

    That is: float32; every cache of the graph is read by one Attention alone, its past besides only for its length;
    keys and values have one head size; the mask is Boolean, four-dimensional, and no position attends to a later one;
    ``input_ids`` and ``attention_mask`` are inputs.
    """
    nodes = [node for node in graph.nodes if node.op == "Attention" and not node.domain]
    found = [item for node in nodes if (item := _describe(node, index)) is not None]
    used = {cache.present.name for item in found for cache in (item.key, item.value)}
    inputs = {tensor.name for tensor in graph.inputs}
    if used != index.caches.keys() or not {INPUT_IDS, ATTENTION_MASK} <= inputs:
        return []
    masks = {item.mask.name for item in found}
    return found if all(is_causal(graph, mask) for mask in masks) else []


def _describe(node: Node, index: Index) -> CachedAttention | None:
    if len(node.inputs) != 4 or len(node.outputs) != 1 or node.attrs.get("is_causal", 0):
        return None
    query, keys, values, mask = node.inputs
    key, value = _cache(keys, node, index), _cache(values, node, index)
    if key is None or value is None or [dtype_of(tensor) for tensor in node.inputs] != [_FLOAT32] * 3 + [_BOOL]:
        return None
    match [shape_of(tensor) for tensor in node.inputs]:
        case [
            (rows, int(heads), length, int(size)),
            (_, int(groups), _, k_size),
            (_, v_groups, _, v_size),
            (_, m, _, _),
        ]:
            if heads % groups == 0 and (v_groups, k_size, v_size) == (groups, size, size) and m in (1, heads):
                return CachedAttention(node, query, key, value, mask, (rows, heads, length, size), groups)
        case _:
            pass
    return None


def _cache(present: Tensor, reader: Node, index: Index) -> Cache | None:
    """The cache whose output ``present`` is, if ``reader`` alone reads it."""
    if present.name not in index.caches or list(present.outputs) != [reader]:
        return None
    joined = present.inputs[0]
    past = joined.inputs[0]
    others = [node for node in past.outputs if node is not joined]
    is_appended = len(joined.inputs) == 2 and axis_of(joined, 4) == 2
    return Cache(past, joined.inputs[1], present) if is_appended and all(map(_is_length, others)) else None


def _is_length(node: Node) -> bool:
    return node.op == "Shape" and (node.attrs.get("start"), node.attrs.get("end")) == (2, 3)


def is_causal(graph: Graph, mask: str) -> bool:
    """Whether a Boolean value [.., sequence, past + sequence] never holds for a later position.

    It is computed, for rows of 7 tokens without padding of which 3 are in the caches.
    """
    part = graph.copy()
    part.outputs[:] = [Index.of(part).values[mask]]
    part.cleanup()
    feeds = {tensor.name: _example(tensor) for tensor in part.inputs if tensor.outputs}
    evaluator: Any = ReferenceEvaluator(export_model(part))
    values: Array = evaluator.run(None, feeds)[0]
    later = np.arange(_PAST + _NEW) > np.arange(_PAST, _PAST + _NEW)[:, None]
    return values.shape[-2:] == later.shape and not bool((values & later).any())


def _example(tensor: Tensor) -> Array:
    """Values of an input: ones, positions counted up, or an empty cache's zeros."""
    length = {ATTENTION_MASK: _PAST + _NEW, INPUT_IDS: _NEW, POSITION_IDS: _NEW}.get(tensor.name, _PAST)
    dims = enumerate(shape_of(tensor) or ())
    shape = [dim if isinstance(dim, int) else (length if axis else _BATCH) for axis, dim in dims]
    if tensor.name == POSITION_IDS:
        values = np.broadcast_to(np.arange(_PAST, _PAST + _NEW), shape)
    else:
        values = np.full(shape, not is_past(tensor.name))
    return values.astype(dtype_of(tensor))
