"""Cut a graph into the parts of a chain: embedding, ranges of blocks, head.

Where blocks begin is found by data flow (:mod:`.cuts`), in the float32 graph if there is one: quantization may make
some blocks unlike the others, and 16 bits put casts between them, but the residual stream keeps its names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import onnx
from onnx import helper

from ..export.errors import BismoothError
from ..export.graph_names import INPUT_IDS, is_past, is_present, past_of
from .chain import Carried
from .cuts import Segment, find_repeated, find_segments
from .pieces import Piece, PieceMaker

Holds = Literal["embedding", "blocks", "head"]


@dataclass(frozen=True)
class Part:
    """A part of a graph.

    Attributes:
        name: ``part-00``, numbered in the order in which they run.
        holds: what lies before the first block, blocks, or what lies behind the last.
        blocks: the first block, and the one behind the last; None if it holds none.
        model: its graph; external data lie where those of the whole graph do.
        reads: what the part before computes.
        gives: what the next part reads.
    """

    name: str
    holds: Holds
    blocks: tuple[int, int] | None
    model: onnx.ModelProto
    reads: Carried | None
    gives: Carried | None


class ChainCutter:
    """Cuts ``model``, which stays as it is.

    Args:
        model: external data stay where they are.
        label: its file, for messages.
        plain: another graph with the same residual stream, in which blocks are looked for.

    Raises:
        BismoothError: the graph has no repeated blocks, or cannot be cut between those of ``plain``.
    """

    def __init__(self, model: onnx.ModelProto, label: str, plain: onnx.ModelProto | None = None) -> None:
        self._maker = PieceMaker(model)
        self._label = label
        self._borders = _find_borders(self._maker.segments, (plain or model).graph, label)
        if len(self._borders) < 2:
            raise BismoothError(
                f"{label}: has no repeated blocks, between which it could be split. Expected two or more with a "
                "residual stream between them, as language models have. Build it without --split-blocks."
            )

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self._borders) - 1

    def cut(self, count: int) -> list[Part]:
        """The parts, with ``count`` ranges of blocks of equal size; the first ones have one block more where need be.

        Raises:
            BismoothError: there are fewer blocks, or a part reads the caches of another.
        """
        if not 1 <= count <= self.blocks:
            raise BismoothError(
                f"--split-blocks {count}: {self._label} has {self.blocks} blocks. Expected 1 to {self.blocks}."
            )
        parts: list[Part] = []
        for number, (holds, blocks, piece) in enumerate(self._pieces(count)):
            model = _part_of(self._maker, piece, self._label)
            first, last = self._maker.segments[piece.first], self._maker.segments[piece.stop - 1]
            carried = (self._carried(value) for value in (first.entry, last.exit))
            parts.append(Part(f"part-{number:02}", holds, blocks, model, *carried))
        return parts

    def _pieces(self, count: int) -> Iterator[tuple[Holds, tuple[int, int] | None, Piece]]:
        start, end = self._borders[0], self._borders[-1]
        if start > 0:
            yield "embedding", None, Piece(0, start)
        for first, stop in split_evenly(self.blocks, count):
            yield "blocks", (first, stop), Piece(self._borders[first], self._borders[stop])
        if end < len(self._maker.segments):
            yield "head", None, Piece(end, len(self._maker.segments))

    def _carried(self, value: str | None) -> Carried | None:
        if value is None:
            return None
        infos = self._maker.model.graph.value_info
        kind = next(info.type.tensor_type for info in infos if info.name == value)
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in kind.shape.dim)
        return Carried(value, dtype.name, shape)


def cut_at(model: onnx.ModelProto, label: str, values: Sequence[str]) -> list[onnx.ModelProto]:
    """The graphs of the parts between ``values`` of the residual stream, in their order.

    Raises:
        BismoothError: the graph cannot be cut there.
    """
    maker = PieceMaker(model)
    places = {segment.exit: number for number, segment in enumerate(maker.segments, 1)}
    if missing := [value for value in values if value not in places]:
        raise BismoothError(
            f"{label}: cannot be cut at '{missing[0]}', as the chain is. Expected the graph that it was built of, or "
            "one with the same residual stream. Build the chain again."
        )
    starts = [0, *(places[value] for value in values), len(maker.segments)]
    return [_part_of(maker, Piece(*ends), label) for ends in pairwise(starts)]


def _part_of(maker: PieceMaker, piece: Piece, label: str) -> onnx.ModelProto:
    """The graph of a piece; its outputs are what the next one reads, and those of the whole graph that it computes."""
    graph, leaving = maker.model.graph, maker.segments[piece.stop - 1].exit
    by_segment = maker.by_segment(value.name for value in graph.output)
    own = [name for segment in range(piece.first, piece.stop) for name in by_segment.get(segment, ())]
    model = maker.make(piece, [*([] if leaving is None else [leaving]), *(name for name in own if name != leaving)])
    _use_own_caches(model.graph, graph, label)
    return model


def _find_borders(segments: tuple[Segment, ...], plain: onnx.GraphProto, label: str) -> list[int]:
    """The first segment of each block, and the one behind the last block.

    Raises:
        BismoothError: the graph cannot be cut where the blocks of ``plain`` begin and end.
    """
    originals = find_segments(plain)
    repeated = find_repeated(plain, originals)
    if repeated is None:
        return []
    places: dict[str | None, int] = {None: 0} | {segment.exit: number for number, segment in enumerate(segments, 1)}
    values = [originals[start].entry for start in repeated.starts[:-1]] + [originals[repeated.starts[-1] - 1].exit]
    for value in values:
        if value not in places:
            raise BismoothError(
                f"{label}: cannot be cut at '{value}', where a block of the float graph begins or ends: more than this "
                "value crosses there. Build it without --split-blocks."
            )
    return [places[value] for value in values]


def split_evenly(blocks: int, count: int) -> list[tuple[int, int]]:
    """``count`` ranges of blocks, as the first of each and the one behind its last; the longer ranges come first."""
    size, longer = divmod(blocks, count)
    starts = [size * number + min(number, longer) for number in range(count + 1)]
    return list(pairwise(starts))


def _use_own_caches(graph: onnx.GraphProto, source: onnx.GraphProto, label: str) -> None:
    """Take the length of the past from a cache of this part: as a rule, a graph takes it from that of its first block.

    Raises:
        BismoothError: another part's cache is read for more than its length, or by a part that has none.
    """
    own = {past_of(value.name) for value in graph.output if is_present(value.name)}
    foreign = {value.name for value in graph.input if is_past(value.name)} - own
    for node in graph.node:
        read = foreign.intersection(node.input)
        if read and not (own and _is_length(node)):
            raise BismoothError(
                f"{label}: '{node.name}' reads '{min(read)}', the cache of another block. Expected blocks with caches "
                "of their own. Build it without --split-blocks."
            )
        if read:
            node.input[0] = min(own)
    kept = [value for value in graph.input if value.name not in foreign]
    del graph.input[:]
    graph.input.extend(kept)
    if own and not any(value.name == INPUT_IDS for value in kept):  # new tokens are counted by them
        graph.input.extend(value for value in source.input if value.name == INPUT_IDS)


def _is_length(node: onnx.NodeProto) -> bool:
    """Whether a node takes the number of positions [batch, heads, positions, size] of a cache, and nothing else."""
    return node.op_type == "Shape" and {a.name: a.i for a in node.attribute} == {"start": 2, "end": 3}
