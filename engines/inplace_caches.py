"""Rewrite a graph that grows its caches into one that updates them in place, as TensorRT runs it on a GPU.

An exported graph concatenates past and new keys, which copies the whole cache for every token. Here caches become
buffers [batch, heads, capacity, head size] and ``TensorScatter`` nodes (ONNX 24), which TensorRT imports as its
KVCacheUpdate layer: the new positions are written where the others already lie, and attention reads them there.

Attention then sees the whole capacity, so the mask is made anew for it. What mask the graph has, causal or with a
sliding window, is found by running its nodes on small inputs, not by their form.

NOTE: the input ``nonpad_kv_seqlen`` of ``Attention`` would bound what is read. TensorRT-RTX 1.7 drops it without a
message, from ONNX always, and where there is a mask also when set through its own API. So the mask bounds it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..export.errors import BismoothError
from ..export.graph_names import ATTENTION_MASK, BATCH, INPUT_IDS, PAST_LENGTH, SEQUENCE, TOTAL, is_past, is_present
from .base import WRITE_INDICES
from .subgraph import cut

_IN_PLACE = "in_place"
_OPSET = 24
_REMEDY = "Export the model with --no-kv-cache, and build an engine without caches."


def update_in_place(model: onnx.ModelProto, capacity: int, label: str) -> dict[str, str]:
    """Rewrite ``model``; its caches then hold ``capacity`` positions.

    The input ``write_indices`` [batch], int64, is added, ``attention_mask`` becomes [batch, capacity] (0 for padding, 1
    elsewhere, positions to come included), and past and present become [batch, heads, capacity, head size].

    Args:
        label: the graph in messages.

    Returns:
        Input → output of each cache; both are one buffer.

    Raises:
        BismoothError: the graph does not have the form of an exported language model.
    """
    return _Rewrite(model, capacity, label).run()


@dataclass
class _Rewrite:
    model: onnx.ModelProto
    capacity: int
    label: str
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    type: int | None = None
    """Element type that the caches get; by default they keep theirs."""

    def run(self) -> dict[str, str]:
        graph = self.model.graph
        outputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in graph.output]
        self._uncast()
        self._scatter()
        windows = {mask: _window(self.model, mask, self.capacity, self.label) for mask in self._masks()}
        nodes = [node for mask, window in windows.items() for node in self._mask(mask, window)]
        replaced = {mask: _renamed(mask) for mask in windows}
        for node in graph.node:
            if node.op_type == "Attention":
                node.input[3] = replaced[node.input[3]]
        kept = list(graph.node)
        del graph.node[:]
        graph.node.extend([*nodes, *kept])
        cut(self.model, [value.name for value in outputs])
        self._declare(outputs)
        self._check()
        return self.aliases

    def _uncast(self) -> None:
        """Drop the Casts of a graph in 16 bits around its caches of float32: they are 16 bits then.

        Where new keys are float32 as well, they are cast instead of all that attention reads.
        """
        inputs = {value.name for value in self.model.graph.input if is_past(value.name)}
        outputs = {value.name for value in self.model.graph.output if is_present(value.name)}
        renamed: dict[str, str] = {}
        wide: set[str] = set()
        kept: list[onnx.NodeProto] = []
        for node in self.model.graph.node:
            if node.op_type == "Cast" and node.input[0] in inputs | outputs:
                renamed[node.output[0]] = node.input[0]
                wide.update(outputs.intersection(node.input))
                self.type = node.attribute[0].i
            elif node.op_type == "Cast" and node.output[0] in outputs:
                renamed[node.input[0]] = node.output[0]
            else:
                kept.append(node)
        del self.model.graph.node[:]
        for node in kept:
            for values in (node.input, node.output):
                for index, value in enumerate(values):
                    values[index] = renamed.get(value, value)
            if node.op_type == "Concat" and node.output[0] in wide:
                new = f"{node.name}/{_IN_PLACE}"
                cast = helper.make_node("Cast", [node.input[1]], [new], name=new, to=self.type)
                node.input[1] = new
                self.model.graph.node.append(cast)
            self.model.graph.node.append(node)

    def _scatter(self) -> None:
        """Replace each Concat of a past with what is new."""
        results = {value.name for value in self.model.graph.output}
        for node in self.model.graph.node:
            if node.op_type == "Concat" and is_past(node.input[0]) and node.output[0] in results:
                axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
                if axis not in (2, -2) or len(node.input) != 2:
                    raise self._unknown(f"'{node.name}' does not append positions to '{node.input[0]}'")
                self.aliases[node.input[0]] = node.output[0]
                scatter = helper.make_node(
                    "TensorScatter", [*node.input, WRITE_INDICES], list(node.output), name=node.name, axis=-2
                )
                node.CopyFrom(scatter)
        past = {value.name for value in self.model.graph.input if is_past(value.name)}
        if lost := sorted(past - self.aliases.keys()):
            raise self._unknown(f"'{lost[0]}' is not a past whose Concat with new positions is an output")

    def _masks(self) -> list[str]:
        caches = set(self.aliases.values())
        masks: dict[str, None] = {}
        for node in self.model.graph.node:
            if node.op_type == "Attention":
                if not caches.issuperset(node.input[1:3]) or len(node.input) < 4 or not node.input[3]:
                    raise self._unknown(f"'{node.name}' does not attend to a cache through a mask")
                masks[node.input[3]] = None
        if not masks:
            raise self._unknown("it has no Attention node, as graphs of opset 23 have")
        return list(masks)

    def _mask(self, mask: str, window: int | None) -> list[onnx.NodeProto]:
        """Nodes for the mask [batch, 1, sequence, capacity] of queries that stand at the write index and after it."""
        prefix = _renamed(mask)
        nodes: list[onnx.NodeProto] = []

        def constant(name: str, values: object) -> str:
            tensor = numpy_helper.from_array(np.asarray(values, np.int64), f"{prefix}/{name}")
            self.model.graph.initializer.append(tensor)
            return tensor.name

        def op(operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
            output = output or f"{prefix}/{operator}_{len(nodes)}"
            nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
            return output

        keys = constant("keys", np.arange(self.capacity).reshape(1, 1, 1, -1))
        zero, one, column = constant("zero", 0), constant("one", 1), constant("column", [0, 1, 3])
        length = op("Squeeze", op("Shape", INPUT_IDS, start=1, end=2))
        steps = op("Unsqueeze", op("Range", zero, length, one), column)
        queries = op("Add", op("Unsqueeze", WRITE_INDICES, constant("rows", [1, 2, 3])), steps)
        real = op("Cast", op("Unsqueeze", ATTENTION_MASK, constant("heads", [1, 2])), to=TensorProto.BOOL)
        seen = op("And", op("LessOrEqual", keys, queries), real)
        if window is not None:
            seen = op("And", seen, op("Greater", keys, op("Sub", queries, constant("window", window))))
        op("Or", seen, op("Equal", keys, queries), output=prefix)
        return nodes

    def _declare(self, outputs: Iterable[onnx.ValueInfoProto]) -> None:
        """Write the new shapes down."""
        graph = self.model.graph
        del graph.value_info[:]
        del graph.output[:]
        graph.output.extend(outputs)
        for value in (*graph.input, *graph.output):
            dims = value.type.tensor_type.shape.dim
            if value.name in self.aliases or value.name in self.aliases.values():
                dims[2].dim_value = self.capacity
                if self.type is not None:
                    value.type.tensor_type.elem_type = self.type
            if value.name == ATTENTION_MASK:
                dims[1].dim_value = self.capacity
        graph.input.append(helper.make_tensor_value_info(WRITE_INDICES, TensorProto.INT64, [BATCH]))
        for entry in self.model.opset_import:
            if not entry.domain:
                entry.version = max(entry.version, _OPSET)

    def _check(self) -> None:
        """Nothing else may depend on how long the past and the mask were."""
        graph = self.model.graph
        lengths = {ATTENTION_MASK: 1} | dict.fromkeys(self.aliases, 2)
        for node in graph.node:
            new = node.op_type == "TensorScatter" or node.name.startswith(_renamed(""))
            if not new and any(name in lengths and not _omits(node, lengths[name]) for name in node.input):
                raise self._unknown(f"'{node.name}' uses the length of the past in a way of its own")

    def _unknown(self, problem: str) -> BismoothError:
        return BismoothError(
            f"{self.label}: {problem}. Expected the caches of 'bismooth export', to update them in place. {_REMEDY}"
        )


def _omits(node: onnx.NodeProto, axis: int) -> bool:
    """Whether the node reads sizes of its input other than that of ``axis``, and nothing else."""
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    return node.op_type == "Shape" and not bounds.get("start", 0) <= axis < bounds.get("end", axis + 1)


def _window(model: onnx.ModelProto, mask: str, capacity: int, label: str) -> int | None:
    """How many positions back the mask lets a query see, itself included; ``None`` if that exceeds the capacity.

    Raises:
        BismoothError: the mask is neither causal nor a causal sliding window.
    """
    run = _MaskProgram(model, mask, label)
    seen = int(np.count_nonzero(run(capacity - 1, np.ones((1, capacity), np.int64))))
    window = None if seen == capacity else seen
    random = np.random.default_rng(0)
    for past, length in [(0, 5), (3, 4), (6, 1), *([(window - 1, 3)] if window else [])]:
        real = random.integers(0, 2, (2, past + length))
        if not np.array_equal(run(past, real), _causal(past, real, window)):
            raise BismoothError(
                f"{label}: the attention mask '{mask}' is neither causal nor a sliding window, at {past} past and "
                f"{length} new positions. Expected one of them, to rewrite it for caches in place. {_REMEDY}"
            )
    return window


def _causal(past: int, real: NDArray[np.int64], window: int | None) -> NDArray[np.bool_]:
    """The mask [batch, 1, new, all] of ``real`` [batch, all], in which every position also sees itself."""
    keys: NDArray[np.int64] = np.arange(real.shape[1], dtype=np.int64)
    queries = keys[past:, None]
    seen: NDArray[np.bool_] = (keys <= queries) & real[:, None, None, :].astype(np.bool_)
    if window is not None:
        seen &= keys > queries - window
    return seen | (keys == queries)


class _MaskProgram:
    """The part of a graph that computes an attention mask, run in numpy."""

    def __init__(self, model: onnx.ModelProto, mask: str, label: str) -> None:
        from onnx.reference import ReferenceEvaluator

        part = onnx.ModelProto.FromString(model.SerializeToString())
        cut(part, [mask])
        used = {name for node in part.graph.node for name in node.input}
        self._inputs = [value for value in part.graph.input if value.name in used]
        if any(node.op_type in ("MatMul", "Gemm", "TensorScatter") for node in part.graph.node):
            raise BismoothError(
                f"{label}: the attention mask '{mask}' depends on what is computed. Expected one that follows from "
                f"'{ATTENTION_MASK}' and lengths. {_REMEDY}"
            )
        del part.graph.input[:]
        part.graph.input.extend(self._inputs)
        self._evaluator: Any = ReferenceEvaluator(part)

    def __call__(self, past: int, real: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The mask [batch, 1, new, all] for ``real`` [batch, all], of which the first ``past`` lie in the caches."""
        sizes = {BATCH: len(real), PAST_LENGTH: past, TOTAL: real.shape[1], SEQUENCE: real.shape[1] - past}
        feeds = {value.name: self._feed(value, sizes, real) for value in self._inputs}
        (mask,) = self._evaluator.run(None, feeds)
        return np.broadcast_to(mask, (len(real), 1, sizes[SEQUENCE], sizes[TOTAL]))

    @staticmethod
    def _feed(value: onnx.ValueInfoProto, sizes: dict[str, int], real: NDArray[np.int64]) -> NDArray[np.generic]:
        if value.name == ATTENTION_MASK:
            return real
        tensor = value.type.tensor_type
        shape = [sizes.get(size.dim_param, size.dim_value) for size in tensor.shape.dim]
        zero = np.zeros((), helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        return np.broadcast_to(zero, shape)  # of a past only the length counts


def _renamed(mask: str) -> str:
    return f"{_IN_PLACE}/{mask}"
