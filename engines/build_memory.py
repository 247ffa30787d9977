"""How much memory a build takes, told by the weights that the graph refers to, before it begins.

The factors are fitted to measured peaks, of whole builds and of parts: docs/parts.md lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        base: bytes without any weights.
        widens: whether it makes float32 of 16-bit weights, which then count as that.
    """

    factor: float
    base: int
    widens: bool = False

    def weights(self, model: onnx.ModelProto) -> int:
        """Bytes of the weights that a graph refers to."""
        return sum(self._bytes(tensor) for tensor in model.graph.initializer)

    def memory(self, weights: int) -> int:
        """Bytes that a build takes for a graph with so many bytes of weights."""
        return int(self.factor * weights) + self.base

    def of(self, model: onnx.ModelProto) -> int:
        """Bytes that building a graph takes."""
        return self.memory(self.weights(model))

    def _bytes(self, tensor: onnx.TensorProto) -> int:
        return _FLOAT_BYTES * prod(tensor.dims) if self.widens and tensor.data_type in _HALF else tensor_bytes(tensor)


_TENSORRT = Need(2.2, 480 << 20)
NEEDS: Mapping[str, Need] = {
    "tensorrt-rtx": _TENSORRT,
    "tensorrt": _TENSORRT,
    "onnxruntime": Need(2.3, 128 << 20, widens=True),
    "null": Need(0, 0),
}


@dataclass(frozen=True)
class BuildPlan:
    """What is built one after the other.

    Attributes:
        parts: of a chain; none if the graph is built as a whole.
        estimates: bytes that each build takes.
    """

    parts: tuple[Part, ...]
    estimates: tuple[int, ...]

    @property
    def estimated(self) -> int:
        """Bytes that the largest build takes."""
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
    models = [part.model for part in parts] or [model]
    plan = BuildPlan(parts, tuple(map(need.of, models)))
    budget, taken = find_budget(memory), current_rss()
    if budget is not None and taken + plan.estimated > budget:
        advice = _advice(need, model, label, plain, budget - taken)
        raise BismoothError(
            f"{label}: building {'its largest part' if parts else 'it'} takes about "
            f"{format_bytes(taken + plan.estimated)} of memory, and may take {format_bytes(budget)}"
            f"{'' if memory is None else ' (--memory)'}. {advice}"
        )
    return plan


def _advice(need: Need, model: onnx.ModelProto, label: str, plain: onnx.ModelProto | None, room: int) -> str:
    try:
        cutter = ChainCutter(model, label, plain)
    except BismoothError:
        return (
            f"Expected {format_bytes(current_rss() + need.of(model))} or more, since it has no blocks to split it by."
        )
    finest = cutter.cut(cutter.blocks)
    blocks = [need.weights(part.model) for part in finest if part.blocks is not None]
    ends = [need.weights(part.model) for part in finest if part.blocks is None]
    for count in range(1, cutter.blocks + 1):
        most = need.memory(max([*ends, *_sums(blocks, count)]))
        if most <= room:
            return f"Build it in parts with --split-blocks {count}, which takes {format_bytes(current_rss() + most)}."
    least = current_rss() + need.memory(max([*ends, *blocks]))
    return (
        f"Expected {format_bytes(least)} or more: so much takes its largest part with --split-blocks {cutter.blocks}."
    )


def _sums(blocks: Sequence[int], count: int) -> list[int]:
    return [sum(blocks[first:stop]) for first, stop in split_evenly(len(blocks), count)]
