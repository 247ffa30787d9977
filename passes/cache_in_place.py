"""Attention over a cache as ONNX Runtime's GroupQueryAttention, which appends to the cache in place."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from ..export.graph_names import ATTENTION_MASK, BATCH, INPUT_IDS
from ._gs import Dim, Graph, Node, Tensor, dtype_of, empty_tensor, make_node, make_variable, set_type, shape_of
from .cached_attention import Cache, CachedAttention, find_cached_attention
from .graph import Index
from .patterns import CONTRIB, Maker, Names, made_by, replace_nodes, sole_reader

CAPACITY = "capacity"
"""The axis of positions of caches that are updated in place. Of others, it is named differently in input and output."""

_SWAP = (0, 2, 1, 3)
"""[batch, heads, sequence, size] ↔ [batch, sequence, heads, size]."""
_FLOAT32, _INT32, _INT64 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int64)
_LOWEST = np.array(np.finfo(np.float32).min)


@dataclass(frozen=True)
class UpdateCachesInPlace:
    """Replace ``Attention`` over Concat(past, new) by ``GroupQueryAttention``, whose caches may have room for more.

    A cache is then [batch, kv_heads, capacity, head_dim] with the past in front; where one buffer is bound as input and
    as output, nothing is copied. How long the past is follows from ``attention_mask`` and ``input_ids`` instead of the
    cache's shape. Without a common buffer, caches grow as they did.

    Needs: what :func:`.cached_attention.find_cached_attention` looks for. Promises: the same attention, with padding,
    windows and soft caps.
    """

    name: ClassVar[str] = "update caches in place"

    def apply(self, graph: Graph) -> int:
        """Rewrite the graph in place; returns how many attention nodes were replaced."""
        index = Index.of(graph)
        found = find_cached_attention(graph, index)
        if found:
            lowering = _Lowering(index)
            lengths = lowering.lengths()
            shapes = lowering.pasts(found)
            replace_nodes(graph, shapes | {item.node.name: lowering.attention(item) for item in found})
            graph.nodes[:0] = lengths
        return len(found)


class _Lowering:
    def __init__(self, index: Index) -> None:
        self._index = index
        self._names = Names(index)
        self._make = Maker(self._names, "caches")
        self._biases: dict[str, Tensor] = {}

    def lengths(self) -> list[Node]:
        """The nodes that count positions."""
        make, ids, mask = self._make, self._index.values[INPUT_IDS], self._index.values[ATTENTION_MASK]
        rows = make.node("Shape", "caches/rows", [ids], [1], _INT64, start=0, end=1)
        new = make.node("Shape", "caches/new", [ids], [1], _INT64, start=1, end=2)
        total = make.node("Shape", "caches/total", [mask], [1], _INT64, start=1, end=2)
        self._past = make.node("Sub", "caches/past", [total, new], [1], _INT64)
        narrow = make.node("Cast", "caches/total/int32", [total], [1], _INT32, to=int(onnx.TensorProto.INT32))
        last = make.node("Sub", "caches/last", [narrow, make.constant(np.array([1], np.int32))], [1], _INT32)
        self._last = make.node("Expand", "caches/last/rows", [last, rows], [BATCH], _INT32)
        self._total = make.node("Squeeze", "caches/total/scalar", [narrow], [], _INT32)
        return make.take()

    def pasts(self, found: list[CachedAttention]) -> dict[str, list[Node]]:
        """Replacements for the nodes that took the length of the past from the shape of a cache."""
        caches = [cache for item in found for cache in (item.key, item.value)]
        nodes = [node for cache in caches for node in cache.past.outputs if node.op == "Shape"]
        replacements: dict[str, list[Node]] = {}
        for node in nodes:
            outputs = list(node.outputs)
            node.outputs.clear()
            replacements[node.name] = [make_node("Identity", self._names.beside(node, "past"), [self._past], outputs)]
        return replacements

    def attention(self, item: CachedAttention) -> list[Node]:
        """What takes the place of an attention node."""
        rows, heads, length, size = item.sizes
        inputs = [
            self._joined_heads(item.query, heads),
            *(self._joined_heads(cache.new, item.groups) for cache in (item.key, item.value)),
            *(cache.past for cache in (item.key, item.value)),
            *(self._last, self._total),
            *(empty_tensor(), empty_tensor(), empty_tensor()),  # cosines, sines, position ids
            self._bias(item.mask),
        ]
        before = self._make.take()
        name = self._names.beside(item.node, "GroupQueryAttention")
        result, after = self._result(item.node, name, [rows, length, heads * size], [0, 0, heads, size])
        outputs = [result, *(_in_place(cache) for cache in (item.key, item.value))]
        attributes = {key: value for key, value in item.node.attrs.items() if key in ("scale", "softcap")}
        attributes |= {"num_heads": heads, "kv_num_heads": item.groups}
        return [*before, make_node("GroupQueryAttention", name, inputs, outputs, attributes, CONTRIB), *after]

    def _bias(self, mask: Tensor) -> Tensor:
        """0 where the mask holds, the lowest number elsewhere."""
        if mask.name not in self._biases:
            values = [self._make.constant(value.astype(np.float32)) for value in (np.array(0), _LOWEST)]
            shape = shape_of(mask) or ()
            self._biases[mask.name] = self._make.node("Where", f"{mask.name}/bias", [mask, *values], shape, _FLOAT32)
        return self._biases[mask.name]

    def _joined_heads(self, value: Tensor, heads: int) -> Tensor:
        """[batch, heads, sequence, size] as [batch, sequence, heads · size].

        A rotary embedding moves behind it, for which the number of heads is an attribute then.
        """
        rotary, swap = made_by(value, "RotaryEmbedding"), made_by(value, "Transpose")
        rows, _, length, size = shape_of(value) or (None,) * 4
        width: list[Dim] = [rows, length, heads * int(str(size))]
        if rotary is not None and len(rotary.inputs) == 3:
            inputs = [self._joined_heads(rotary.inputs[0], heads), *rotary.inputs[1:]]
            return self._make.node(
                "RotaryEmbedding", f"{rotary.name}/joined", inputs, width, _FLOAT32, num_heads=heads, **rotary.attrs
            )
        if swap is not None and tuple(swap.attrs["perm"]) == _SWAP:
            swapped = swap.inputs[0]
            split = made_by(swapped, "Reshape")
            if split is not None and shape_of(split.inputs[0]) == tuple(width):
                return split.inputs[0]
        else:
            shape: list[Dim] = [rows, length, heads, size]
            swapped = self._make.node("Transpose", f"{value.name}/swapped", [value], shape, _FLOAT32, perm=[*_SWAP])
        target = self._make.integers(0, 0, heads * int(str(size)))
        return self._make.node("Reshape", f"{value.name}/joined", [swapped, target], width, _FLOAT32)

    def _result(self, node: Node, name: str, shape: list[Dim], split: list[int]) -> tuple[Tensor, list[Node]]:
        """What takes the operator's result [batch, sequence, heads · size], and nodes that split it where needed."""
        (value,) = node.outputs
        swap = sole_reader(self._index, value)
        joined = sole_reader(self._index, swap.outputs[0]) if swap is not None and swap.op == "Transpose" else None
        is_joined = joined is not None and joined.op == "Reshape" and shape_of(joined.outputs[0]) == tuple(shape)
        if swap is not None and joined is not None and is_joined and tuple(swap.attrs["perm"]) == _SWAP:
            (result,) = joined.outputs
            joined.outputs.clear()
            return result, []
        result = make_variable(name, _FLOAT32, shape)
        target = self._make.integers(*split)
        heads = self._make.node("Reshape", f"{name}/split", [result, target], [*shape[:2], *split[2:]], _FLOAT32)
        node.outputs.clear()
        self._make.add(make_node("Transpose", f"{name}/swapped", [heads], [value], {"perm": [*_SWAP]}))
        return result, self._make.take()


def _in_place(cache: Cache) -> Tensor:
    """The output of a cache without its producer; input and output get a common axis."""
    cache.present.inputs.clear()
    for tensor in (cache.past, cache.present):
        rows, heads, _, size = shape_of(tensor) or (None,) * 4
        set_type(tensor, dtype_of(tensor), [rows, heads, CAPACITY, size])
    return cache.present
