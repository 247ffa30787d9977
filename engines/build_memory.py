"""How much memory a build takes, told by the weights that the graph refers to, before it begins.

The factors are fitted to measured peaks, of whole builds and of parts: docs/parts.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import onnx

from ..export.errors import BismoothError
from .chain_cut import ChainCutter, Part, split_evenly
from .footprint import tensor_bytes
from .memory import current_rss, format_bytes
from .streaming import find_budget

_HALF = frozenset({onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Need:
    """What a builder takes.

    Attributes:
        factor: bytes per byte of weights.
        per_node: bytes per node of the graph.
        base: bytes for any graph; of a builder within this process, beside what this takes.
        widens: whether it makes float32 of 16-bit weights, which then count as that.
        within: whether it builds within this process.
    """

    factor: float
    per_node: int
    base: int
    widens: bool = False
    within: bool = False

    def of(self, models: Iterable[onnx.ModelProto]) -> int:
        """Bytes that building consecutive parts of a graph as one takes."""
        weights = nodes = 0
        for model in models:
            weights += sum(self._bytes(tensor) for tensor in model.graph.initializer)
            nodes += len(model.graph.node)
        return int(self.factor * weights) + self.per_node * nodes + self.base

    def _bytes(self, tensor: onnx.TensorProto) -> int:
        return _FLOAT_BYTES * prod(tensor.dims) if self.widens and tensor.data_type in _HALF else tensor_bytes(tensor)


_TENSORRT = Need(factor=2.2, per_node=200_000, base=256 << 20)
NEEDS: Mapping[str, Need] = {
    "tensorrt-rtx": _TENSORRT,
    "tensorrt": _TENSORRT,
    "onnxruntime": Need(factor=2.3, per_node=0, base=128 << 20, widens=True, within=True),
    "null": Need(factor=0, per_node=0, base=0, within=True),
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
