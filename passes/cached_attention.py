"""Find attention over a cache of keys and values that grows by concatenation."""

from dataclasses import dataclass

import numpy as np
import onnx.reference

from ..export.cache_names import is_past
from ._gs import Array, Dim, Graph, Node, Tensor, dtype_of, export_model, shape_of
from .graph import Index

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
    if used != index.caches.keys() or not {"input_ids", "attention_mask"} <= inputs:
        return []
    masks = {item.mask.name for item in found}
    return found if all(is_causal(graph, mask) for mask in masks) else []


def _describe(node: Node, index: Index) -> CachedAttention | None:
    if len(node.inputs) != 4 or len(node.outputs) != 1 or node.attrs.get("is_causal", 0):
        return None
    query, keys, values, mask = node.inputs
    key, value = _cache(keys, node, index), _cache(values, node, index)
    shapes = [shape_of(tensor) or () for tensor in node.inputs]
    types = [dtype_of(tensor) for tensor in node.inputs]
    if key is None or value is None or any(len(s) != 4 for s in shapes) or types != [_FLOAT32] * 3 + [_BOOL]:
        return None
    rows, heads, length, size = shapes[0]
    groups = shapes[1][1]
    if not (isinstance(heads, int) and isinstance(groups, int) and isinstance(size, int)) or heads % groups:
        return None
    is_uniform = {shape[3] for shape in shapes[:3]} == {size} and shapes[2][1] == groups
    if not is_uniform or shapes[3][1] not in (1, heads):
        return None
    return CachedAttention(node, query, key, value, mask, (rows, heads, length, size), groups)


def _cache(present: Tensor, reader: Node, index: Index) -> Cache | None:
    """The cache whose output ``present`` is, if ``reader`` alone reads it."""
    if present.name not in index.caches or list(present.outputs) != [reader]:
        return None
    joined = present.inputs[0]
    past = joined.inputs[0]
    others = [node for node in past.outputs if node is not joined]
    return Cache(past, joined.inputs[1], present) if len(joined.inputs) == 2 and all(map(_is_length, others)) else None


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
    (values,) = onnx.reference.ReferenceEvaluator(export_model(part)).run(None, feeds)
    later = np.arange(_PAST + _NEW) > np.arange(_PAST, _PAST + _NEW)[:, None]
    return values.shape[-2:] == later.shape and not (values & later).any()


def _example(tensor: Tensor) -> Array:
    """Values of an input: ones, positions counted up, or an empty cache's zeros."""
    length = {"attention_mask": _PAST + _NEW, "input_ids": _NEW, "position_ids": _NEW}.get(tensor.name, _PAST)
    shape = [
        dim if isinstance(dim, int) else (length if axis else _BATCH) for axis, dim in enumerate(shape_of(tensor) or ())
    ]
    if tensor.name == "position_ids":
        values = np.broadcast_to(np.arange(_PAST, _PAST + _NEW), shape)
    else:
        values = np.full(shape, not is_past(tensor.name))
    return values.astype(dtype_of(tensor))
