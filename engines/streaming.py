"""Run a graph over windows of tokens piece by piece: all windows pass one piece before the next is loaded.

What goes from one piece to the next, the residual stream of all windows, lies in files. So memory holds the weights of
one piece and the values of one batch of windows, whatever the size of the model and the number of windows. A graph that
fits into the memory there is runs as one piece.

NOTE: pieces do not change results. Batches may: a product can round differently with another number of rows. So batches
are of the same windows whatever the memory, unless one alone needs more.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from ..export.cores import default_threads
from ..export.errors import BismoothError
from ..export.graph_names import BATCH, INPUT_IDS, PAST_LENGTH, SEQUENCE, TOTAL
from ..export.replacing import flush
from ..export.state import check_left
from .budget import SPARE, base_memory
from .footprint import footprint, resolve
from .lean import MOST, SLICE, make_lean
from .memory import format_bytes
from .onnxruntime import Mode
from .piece_run import Batch, Ids, PieceRun, StreamFile, close_piece
from .pieces import Piece, PieceMaker
from .subgraph import add_outputs

BATCH_TOKENS = 512
"""Tokens that a batch has by default, if a window has fewer."""


@dataclass(frozen=True)
class Streamed:
    """How a graph is run piece by piece.

    Attributes:
        path: the graph's file.
        maker: of the pieces.
        mode: of the sessions.
        ids: token ids [N, S] of all windows.
        batch_size: windows per run.
        values: further values to look at, by the segment that makes them.
        prepare: adds outputs to a piece's graph, told which of ``values`` it makes; the values themselves by default.
        dims: sizes of symbolic dimensions that ``prepare`` adds.
        held: bytes that the caller holds beside a run.
        held_per_window: further ones for each window of a batch.
        most: bytes of the largest float32 copy of a weight that is made as a whole.
        between: bytes that the caller takes between two pieces.
        with_output: whether the graph's first output is wanted; without it, what only it needs is not run.
    """

    path: Path
    maker: PieceMaker
    mode: Mode
    ids: Ids
    batch_size: int
    values: Mapping[int, Sequence[str]] = field(default_factory=dict[int, Sequence[str]])
    prepare: Callable[[onnx.ModelProto, Sequence[str]], None] = add_outputs
    dims: Mapping[str, int] = field(default_factory=dict[str, int])
    held: int = 0
    held_per_window: int = 0
    most: int = MOST
    between: int = 0
    with_output: bool = True

    @property
    def batches(self) -> list[Batch]:
        """All windows, in order."""
        count, size = len(self.ids), self.windows_per_run
        return [Batch(start, min(start + size, count)) for start in range(0, count, size)]

    @property
    def sizes(self) -> dict[str, int]:
        """Of the symbolic dimensions, in a run of a full batch."""
        count, length = self.windows_per_run, self.ids.shape[1]
        sizes = {**self.dims, BATCH: count, SEQUENCE: length, PAST_LENGTH: 0, TOTAL: length}
        named = zip(self._dims, (count, length), strict=False)
        return sizes | {dim.dim_param: size for dim, size in named if dim.dim_param}

    @property
    def rows(self) -> int:
        """Different rows that all windows look up of a table, by token or by position, at most."""
        return max(self.ids.shape[1], len(np.unique(self.ids)))

    @property
    def _dims(self) -> Sequence[onnx.TensorShapeProto.Dimension]:
        """Of the token ids."""
        inputs = self.maker.model.graph.input
        return next((value.type.tensor_type.shape.dim for value in inputs if value.name == INPUT_IDS), ())

    @property
    def stop(self) -> int:
        """The segment behind the last one that has to run."""
        return len(self.maker.segments) if self.with_output else max(self.values, default=-1) + 1

    @property
    def output(self) -> str:
        """Name of the graph's first output."""
        return self.maker.model.graph.output[0].name

    def observed(self, piece: Piece) -> list[str]:
        """Those of ``values`` that a piece makes."""
        return [value for segment in range(piece.first, piece.stop) for value in self.values.get(segment, ())]

    def exit_of(self, piece: Piece) -> str | None:
        """The value that the next piece reads; None behind the last one."""
        return self.maker.segments[piece.stop - 1].exit if piece.stop < self.stop else None

    def mode_of(self, model: onnx.ModelProto) -> Mode:
        """The mode of the session of a piece: without integers, "int8" has no use, and costs memory."""
        has_integers = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
        return self.mode if self.mode != "int8" or has_integers else "plain"

    def model(self, piece: Piece) -> onnx.ModelProto:
        """The graph of a piece, ready to be loaded."""
        leaving, observed = self.exit_of(piece), self.observed(piece)
        last = [self.output] if self.with_output else []
        model = self.maker.make(piece, last if leaving is None else [leaving], observed)
        fuse = self.mode_of(model) != "int8"
        make_lean(model, fuse=fuse, keep=observed, most=self.most, piece=min(SLICE, self.most))
        self.prepare(model, observed)
        return model

    def fitted(self, budget: int | None, first: int = 0) -> Streamed:
        """The same in smaller batches, if one segment and one batch alone take more than ``budget``.

        They are halved until they fit, or have one window.
        """
        fitted, base = self, base_memory()
        while budget is not None and fitted.batch_size > 1 and base + fitted.least(first, self.stop) > budget:
            fitted = replace(fitted, batch_size=fitted.batch_size // 2)
        return fitted

    def plan(self, budget: int | None, first: int = 0, stop: int | None = None) -> list[Piece]:
        """As few pieces as fit into ``budget`` bytes for the whole process, from one segment to the one before another.

        Raises:
            BismoothError: one segment alone does not fit; the smallest budget that does is named.
        """
        stop, base = self.stop if stop is None else stop, base_memory()
        pieces: list[Piece] = []
        while first < stop:
            end = stop if budget is None else self._longest(first, stop, budget - base)
            if end == first:
                least = format_bytes(base + self.least(first, stop) + SPARE)
                raise BismoothError(
                    f"{self.path}: --memory is too small for one part of the model on {self.windows_per_run} x "
                    f"{self.ids.shape[1]} tokens at once. Expected {least} or more."
                )
            pieces.append(Piece(first, end))
            first = end
        return pieces

    def _longest(self, first: int, stop: int, room: int) -> int:
        """Where the longest piece from ``first`` on ends that fits."""
        end, step = first, 1
        while step:
            longer = min(end + step, stop)
            if longer > end and self.need(Piece(first, longer)) <= room:
                end, step = longer, 2 * step
            else:
                step //= 2
        return end

    def least(self, first: int, stop: int) -> int:
        """Bytes that the largest of some segments takes."""
        return max((self.need(Piece(segment, segment + 1)) for segment in range(first, stop)), default=0)

    def need(self, piece: Piece) -> int:
        """Bytes that a run of the piece takes, beside what the process has already."""
        model = self.model(piece)
        held = self.held + self.windows_per_run * self.held_per_window
        return max(self.between, held + footprint(model, self.sizes, self.mode_of(model), self.rows))

    @property
    def windows_per_run(self) -> int:
        """Windows of a full batch; not more than the graph takes, if it says so."""
        fixed = [dim.dim_value for dim in self._dims[:1] if dim.HasField("dim_value")]
        return min(self.batch_size, len(self.ids), *fixed)

    def shape(self, value: str) -> tuple[int, ...] | None:
        """The shape of a value in a run of a full batch, if the graph says it."""
        kind = self.maker.type_of(value)
        return resolve(kind.shape, self.sizes) if kind is not None and kind.HasField("shape") else None

    def file(self, value: str, folder: Path) -> StreamFile:
        """Where a value that goes from one piece to the next lies."""
        kind, shape = self.maker.type_of(value), self.shape(value)
        assert kind is not None, value  # cuts are made of values of which all is known
        assert shape is not None, value
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        return StreamFile(self.file_path(value, folder), value, dtype.str, shape[1:])

    @staticmethod
    def file_path(value: str, folder: Path) -> Path:
        """A file in ``folder`` for what belongs to a value."""
        return folder / f"{sha256(value.encode()).hexdigest()[:16]}.bin"

    @contextmanager
    def running(self, piece: Piece, folder: Path, threads: int | None = None) -> Generator[PieceRun]:
        """The piece, ready to run between its files in ``folder``; what it has written is on disk when the block ends.

        Args:
            piece: which.
            folder: of the files.
            threads: see :class:`PieceRun`; by default :func:`..export.cores.default_threads` of this machine.

        Raises:
            BismoothError: the file that it reads is not as the piece before has left it.
            OSError: there is no space for what it writes.
        """
        model = self.model(piece)
        entry, leaving = self.maker.segments[piece.first].entry, self.exit_of(piece)
        entry_file, exit_file = (None if value is None else self.file(value, folder) for value in (entry, leaving))
        if entry_file is not None:
            check_left(entry_file.path, len(self.ids) * entry_file.window_bytes)
        if exit_file is not None:
            exit_file.create(len(self.ids))
        try:
            yield PieceRun(
                str(self.path),
                model.SerializeToString(),
                self.path.parent,
                self.mode_of(model),
                entry_file,
                exit_file,
                tuple(value.name for value in model.graph.output if value.name != leaving),
                self.ids,
                threads or default_threads(),
            )
        finally:
            close_piece()
        if exit_file is not None:
            flush(exit_file.path)
            flush(folder)


def default_batch(length: int) -> int:
    """Windows per run: as many as together have :data:`BATCH_TOKENS` tokens, at least one."""
    return max(1, BATCH_TOKENS // length)
