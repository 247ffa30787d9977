"""How much memory a build takes, told by the weights that the graph refers to, before it begins.

The factors are fitted to measured peaks, of whole builds and of parts: docs/parts.md lists them. TensorRT maps files,
and holds the engine twice at the end; ONNX Runtime makes a copy of what it computes with, and packs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import onnx
from onnx import helper

from ..export.errors import BismoothError
from .budget import find_budget
from .chain_cut import ChainCutter, Part, split_evenly
from .footprint import tensor_bytes
from .memory import current_rss, format_bytes


@dataclass(frozen=True)
class Need:
    """What a builder takes.

    Attributes:
        stored: bytes per byte of weights as their files hold them: these are mapped.
        computed: bytes per byte of weights in the type that the graph computes with, behind a Cast.
        per_node: bytes per node of the graph.
        base: bytes for any graph; of a builder within this process, beside what this takes.
        within: whether it builds within this process.
    """

    stored: float
    computed: float
    per_node: int
    base: int
    within: bool = False

    def of(self, models: Iterable[onnx.ModelProto]) -> int:
        """Bytes that building consecutive parts of a graph as one takes."""
        total = self.base
        for model in models:
            total += self.per_node * len(model.graph.node) + self._weights(model.graph)
        return total

    def _weights(self, graph: onnx.GraphProto) -> int:
        casts = {node.input[0]: node.attribute[0].i for node in graph.node if node.op_type == "Cast"}
        stored = sum(map(tensor_bytes, graph.initializer))
        computed = sum(
            prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(casts[tensor.name]).itemsize
            if tensor.name in casts
            else tensor_bytes(tensor)
            for tensor in graph.initializer
        )
        return int(self.stored * stored + self.computed * computed)


_TENSORRT = Need(stored=1, computed=2, per_node=160_000, base=256 << 20)
NEEDS: Mapping[str, Need] = {
    "tensorrt-rtx": _TENSORRT,
    "tensorrt": _TENSORRT,
    "onnxruntime": Need(stored=0.4, computed=2, per_node=0, base=168 << 20, within=True),
    "null": Need(stored=0, computed=0, per_node=0, base=0, within=True),
}


@dataclass(frozen=True)
class BuildPlan:
    """What is built one after the other.

    Attributes:
        parts: of a chain; none if the graph is built as a whole.
        estimates: bytes that the process takes which builds each.
    """

    parts: tuple[Part, ...]
    estimates: tuple[int, ...]

    @property
    def estimated(self) -> int:
        """Bytes for the largest build."""
        return max(self.estimates)


def plan_build(
    need: Need,
    model: onnx.ModelProto,
    label: str,
    *,
    plain: onnx.ModelProto | None = None,
    split: int | None = None,
    memory: int | None = None,
) -> BuildPlan:
    """The graph as a whole, or its parts with ``split`` ranges of blocks.

    Args:
        label: the graph's file, for messages.
        plain: as for :class:`.chain_cut.ChainCutter`.
        memory: bytes that this process and the builder may take; most of what the machine has left by default.

    Raises:
        BismoothError: the graph cannot be split so, or a build takes more than there is. The smallest split that fits
            is named, or else the memory that is needed.
    """
    parts = () if split is None else tuple(ChainCutter(model, label, plain).cut(split))
    needs = [need.of([one]) for one in ([part.model for part in parts] or [model])]
    budget, taken = find_budget(memory), current_rss()
    if budget is not None and taken + max(needs) > budget:
        advice = _advice(need, model, label, plain, budget - taken)
        raise BismoothError(
            f"{label}: building {'its largest part' if parts else 'it'} takes about "
            f"{format_bytes(taken + max(needs))} of memory, and there are {format_bytes(budget)}"
            f"{'' if memory is None else ' by --memory'}. {advice}"
        )
    return BuildPlan(parts, tuple(bytes + (taken if need.within else 0) for bytes in needs))


def _advice(need: Need, model: onnx.ModelProto, label: str, plain: onnx.ModelProto | None, room: int) -> str:
    taken = current_rss()
    try:
        cutter = ChainCutter(model, label, plain)
    except BismoothError:
        return f"Expected {format_bytes(taken + need.of([model]))} or more: it has no blocks to split it by."
    finest = cutter.cut(cutter.blocks)
    blocks = [part.model for part in finest if part.blocks is not None]
    ends = [need.of([part.model]) for part in finest if part.blocks is None]
    most = 0
    for count in range(1, cutter.blocks + 1):
        ranges = [need.of(blocks[first:stop]) for first, stop in split_evenly(cutter.blocks, count)]
        most = max([*ends, *ranges])
        if most <= room:
            return f"Build it in parts with --split-blocks {count}, which takes about {format_bytes(taken + most)}."
    return f"Expected {format_bytes(taken + most)} or more, with --split-blocks {cutter.blocks}."
