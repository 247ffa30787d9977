"""Run the graphs of an artifact over the same windows of text, one after the other, in the memory there is."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.footprint import resolve
from ..engines.memory import current_rss
from ..engines.onnxruntime import Mode
from ..engines.pieces import Piece, PieceMaker
from ..engines.streaming import PieceRun, Streamed, default_batch, find_budget
from ..engines.subgraph import load_graph
from ..engines.token_feeds import Port
from ..export.graph_names import is_present
from ..export.state import State
from ..passes.progress import Counter, Progress
from .comparison import Ids, Values, WindowFile
from .decoding import CachedRun, stepwise

_HELD = 1
"""Arrays of one window's outputs that exist beside those of a run: the last one's, or another program's."""

_WHOLE = 3
"""How much more than a lean run a session takes that is made for speed, at most."""


@dataclass(frozen=True)
class Programs:
    """Graphs over windows of tokens.

    Attributes:
        ids: token ids [N, S].
        folder: where hidden states lie meanwhile.
        progress: told about the steps.
        memory: bytes that this process may take; None for most of what the machine has left.
        state: what is done of each graph, to go on from after an interruption.
    """

    ids: Ids
    folder: Path
    progress: Progress
    memory: int | None = None
    state: State | None = None

    @cached_property
    def budget(self) -> int | None:
        """Bytes that this process may take, as they were when it was first asked for; None if that is unknown."""
        return find_budget(self.memory)

    def output(self, path: Path) -> Port:
        """The first output of the graph ``path``."""
        value = load_graph(path).graph.output[0]
        dims = value.type.tensor_type.shape.dim
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims)
        return Port(value.name, None, shape)

    def outputs(self, path: Path, mode: Mode, step: str, count: int | None = None) -> Iterator[Values]:
        """The first output [S, …] of the graph ``path``, float32, for each of the first ``count`` windows, in order.

        Raises:
            BismoothError: the graph cannot be run, or the memory is too little for a part of it.
        """
        streamed = self._streamed(path, mode, self.ids[:count])
        for piece, run, counter in self.runs(streamed, f"{path.name} {mode} {len(streamed.ids)} windows", step):
            for batch in streamed.batches:
                results = run(batch)
                counter.add(batch.stop - batch.start)
                if piece.stop == streamed.stop:
                    yield from results[streamed.output].astype(np.float32, copy=False)

    def decoded(self, path: Path, mode: Mode, step: str, count: int, prefill: int) -> Iterator[Values]:
        """The same with a cache: the first ``prefill`` tokens of each window in one run, the others one by one.

        A piece without a cache, such as the head, computes nothing from one token for another: it takes whole windows.
        """
        streamed = self._streamed(path, mode, self.ids[:count], with_caches=True)
        key = f"{path.name} {mode} {count} windows from token {prefill}"
        for piece, run, counter in self.runs(streamed, key, step):
            wanted = streamed.exit_of(piece) or streamed.output
            for batch in streamed.batches:
                ids = streamed.ids[batch.start : batch.stop]
                others = {} if run.entry is None else {run.entry.value: run.entry.read(batch)}
                first = prefill if streamed.observed(piece) else ids.shape[1]
                values = stepwise(CachedRun(run.open(), wanted), ids, first, _ignore, others)
                counter.add(len(ids))
                if run.exit is not None:
                    run.exit.write(batch, values)
                else:
                    yield from values.astype(np.float32, copy=False)

    def stored(self, file: WindowFile, unit: str, outputs: Callable[[], Iterator[Values]]) -> Iterator[Values]:
        """What ``outputs`` gives for all windows, which is in ``file`` afterwards; ``unit`` names it in the state.

        It is read if an earlier run has stored it.
        """
        if (shape := self.state.get(unit) if self.state else None) is not None:
            file.reopen(shape)
            yield from (file.read(number) for number in range(len(self.ids)))
            return
        for values in outputs():
            file.append(values)
            yield values
        if self.state and (shape := file.finish()):
            self.state.record(unit, shape)

    def fits_whole(self, path: Path, mode: Mode) -> bool:
        """Whether a session of the whole graph that is made for speed fits into the memory."""
        if self.budget is None:
            return True
        streamed = self._streamed(path, mode, self.ids)
        return _WHOLE * streamed.need(Piece(0, streamed.stop)) <= self.budget - current_rss()

    def noted(self, key: str) -> Any:
        """What :meth:`note` said last of ``key``, in an earlier run too; or None."""
        return self.state.noted(key) if self.state else None

    def note(self, key: str, value: Any) -> None:
        """Keep plain data about what is done, for a run that goes on from here."""
        if self.state:
            self.state.note(key, value)

    def _streamed(self, path: Path, mode: Mode, ids: Ids, *, with_caches: bool = False) -> Streamed:
        maker = PieceMaker(load_graph(path))
        caches = [value.name for value in maker.model.graph.output if with_caches and is_present(value.name)]
        batch = len(ids) if with_caches else default_batch(ids.shape[1])  # a token takes as long as one of each window
        streamed = with_held(Streamed(path, maker, mode, ids, batch, values=maker.by_segment(caches)))
        if with_caches:  # the outputs of the runs, and all of them as one
            streamed = replace(streamed, held_per_window=streamed.held)
        return streamed.fitted(self.budget)

    def runs(self, streamed: Streamed, key: str, step: str) -> Iterator[tuple[Piece, PieceRun, Counter]]:
        """The pieces that are to be run; what is done of the graph ``key`` is left out.

        Raises:
            BismoothError: the memory is too little for a part of the graph.
        """
        folder = self.folder / re.sub(r"\W+", "-", key)
        folder.mkdir(exist_ok=True)
        done = self.state.get(key) if self.state else None
        pieces = streamed.plan(self.budget, done or 0)
        counter = Counter(self.progress, step, len(pieces) * len(streamed.ids))
        for piece in pieces:
            with streamed.running(piece, folder) as run:
                yield piece, run, counter
            if piece.stop < streamed.stop:
                if self.state:
                    self.state.record(key, piece.stop)
                if run.entry is not None:
                    run.entry.path.unlink()


@contextmanager
def scratch(artifact: Path) -> Generator[Path]:
    """A folder for hidden states, gone at the end: in the artifact if that can be written to, else in ``TMPDIR``."""
    with tempfile.TemporaryDirectory(dir=artifact if os.access(artifact, os.W_OK) else None) as folder:
        yield Path(folder)


def with_held(streamed: Streamed, arrays: int = _HELD) -> Streamed:
    """The same, where so many arrays of one window's outputs count that exist beside those of a run."""
    shape = resolve(streamed.maker.model.graph.output[0].type.tensor_type.shape, streamed.sizes) or ()
    return replace(streamed, held=arrays * prod(shape[1:]) * np.dtype(np.float32).itemsize)


def _ignore(_step: str) -> None:
    return
