"""Run the graphs of an artifact over the same windows of text, one after the other, in the memory there is."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..engines.budget import SPARE, base_memory, find_budget
from ..engines.footprint import resolve
from ..engines.memory import current_rss, format_bytes
from ..engines.onnxruntime import Mode
from ..engines.piece_run import PieceRun
from ..engines.pieces import Piece, PieceMaker
from ..engines.streaming import Streamed, default_batch
from ..engines.subgraph import load_graph
from ..engines.token_feeds import Port
from ..export.artifact import Artifact
from ..export.errors import BismoothError
from ..export.graph_names import is_present
from ..export.replacing import scratch_folder
from ..export.state import State
from ..passes.progress import Counter, Progress
from .comparison import Ids, Values, WindowFile
from .decoding import CachedRun, stepwise

_MADE = 8
"""Bytes that a session made for speed takes for each element of a weight, beside what a lean run takes: folded to
float32, and packed for a product."""

_KEPT = 120
"""Bytes for each token that three comparisons keep."""

_GROWTH = 28 << 20
"""Bytes by which this process grows from one program to the next, most of it code that is read when it first runs."""


_PLENTY, _AT_ALL = 16, 4 << 30
"""Where the machine has so many bytes for each of a model's, and these for the rest, nothing can lack."""


class Needed(Protocol):
    """Something that takes memory when it runs."""

    def least(self, programs: Programs) -> int:
        """Bytes that it takes at least, beside what this process has already."""
        ...


@dataclass(frozen=True)
class Program:
    """A graph, and how it is run.

    Attributes:
        path: the graph's file.
        mode: of the sessions.
        count: of windows, the first ones.
        prefill: tokens of each window that run at once, the others one by one with a cache; None for whole windows.
    """

    path: Path
    mode: Mode
    count: int
    prefill: int | None = None

    @property
    def key(self) -> str:
        """Names it in a state."""
        how = "" if self.prefill is None else f" from token {self.prefill}"
        return f"{self.path.name} {self.mode} {self.count} windows{how}"

    def least(self, programs: Programs) -> int:
        before = base_memory()
        return programs.least(programs.streamed(self), self.key, before)


def float_graph(artifact: Artifact, count: int) -> Program:
    """The float32 graph, as it was before anything was quantized."""
    return Program(artifact.graph("reference" if _is_quantized(artifact) else "float32"), "plain", count)


def in_float(artifact: Artifact, count: int) -> Program:
    """The artifact's graph in float arithmetic: Q/DQ, if it is quantized."""
    return Program(artifact.graph("float32"), "reference" if _is_quantized(artifact) else "plain", count)


def in_kernels(artifact: Artifact, count: int) -> Program:
    """The artifact's graph as a CPU runs it: in INT8, if it is quantized."""
    return Program(artifact.graph("float32"), "int8" if _is_quantized(artifact) else "plain", count)


def _is_quantized(artifact: Artifact) -> bool:
    return "reference" in artifact.manifest.graphs


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

    def check(self, subject: Path, needed: Sequence[Needed], advice: str) -> None:
        """Refuse, before any of it is run, what does not fit into the memory.

        That takes seconds, so it is not looked at where no size is named and there is plenty.

        Args:
            subject: the artifact that is judged.
            needed: what is to be run, one after the other.
            advice: what else than more memory would do.

        Raises:
            BismoothError: the memory is too little; the smallest that is enough for all is named.
        """
        if self.budget is None or (self.memory is None and _AT_ALL + _PLENTY * _bytes(subject) < self.budget):
            return
        counter, most = Counter(self.progress, "check the memory", len(needed)), 0
        for item in needed:
            most = max(most, item.least(self))
            counter.add(1)
        least = base_memory() + most + _GROWTH + _KEPT * self.ids.size
        if least > self.budget:
            raise BismoothError(
                f"{subject}: --memory is too small for what is run on windows of {self.ids.shape[1]} tokens. "
                f"Expected {format_bytes(least + SPARE)} or more, {advice}."
            )

    def least(self, streamed: Streamed, key: str, before: int) -> int:
        """Bytes that a run of the graph ``key`` takes at least, beside those that were taken ``before`` it was loaded.

        Of what an earlier run has left to do, in batches of its size; else in batches of one window.
        """
        done = self._done(key)
        graph = max(0, base_memory() - before)
        return graph + replace(streamed, batch_size=done.batch or 1).least(done.stop, streamed.stop)

    def outputs(self, program: Program, step: str) -> Iterator[Values]:
        """The first output [S, …] of a graph, float32, for each of the program's windows, in order.

        Raises:
            BismoothError: the graph cannot be run, or the memory is too little for a part of it.
        """
        streamed = self.fitted(self.streamed(program), program.key)
        for piece, run, counter in self.runs(streamed, program.key, step):
            for batch in streamed.batches:
                results = run(batch)
                counter.add(batch.stop - batch.start)
                if piece.stop == streamed.stop:
                    yield from results[streamed.output].astype(np.float32, copy=False)

    def decoded(self, program: Program, step: str) -> Iterator[Values]:
        """The same with a cache.

        A piece without a cache, such as the head, computes nothing from one token for another: it takes whole windows.
        """
        streamed = self.fitted(self.streamed(program), program.key)
        for piece, run, counter in self.runs(streamed, program.key, step):
            wanted = streamed.exit_of(piece) or streamed.output
            for batch in streamed.batches:
                ids = streamed.ids[batch.start : batch.stop]
                others = {} if run.entry is None else {run.entry.value: run.entry.read(batch)}
                first = program.prefill if streamed.observed(piece) else None
                values = stepwise(CachedRun(run.open(), wanted), ids, first or ids.shape[1], _ignore, others)
                counter.add(len(ids))
                if run.exit is not None:
                    run.exit.write(batch, values)
                else:
                    yield from values.astype(np.float32, copy=False)

    def stored(self, file: WindowFile, unit: str, outputs: Iterator[Values]) -> Iterator[Values]:
        """``outputs`` for all windows, which are in ``file`` afterwards; ``unit`` names them in the state.

        They are read, and not computed, if an earlier run has stored them.
        """
        if (shape := self.state.get(unit) if self.state else None) is not None:
            file.reopen(shape)
            yield from (file.read(number) for number in range(len(self.ids)))
            return
        for values in outputs:
            file.append(values)
            yield values
        if self.state and (shape := file.finish()):
            self.state.record(unit, shape, (unit, len(self.ids), len(self.ids)))

    def fit_whole(self, *programs: Program) -> bool:
        """Whether sessions of the whole graphs that are made for speed fit into the memory, one after the other."""
        return self.budget is None or max(map(self._whole, programs)) <= self.budget - current_rss()

    def _whole(self, program: Program) -> int:
        """Bytes that such a session takes, at most."""
        streamed = self.streamed(program)
        elements = sum(prod(tensor.dims) for tensor in streamed.maker.model.graph.initializer)
        return streamed.need(Piece(0, streamed.stop)) + _MADE * elements

    def noted(self, key: str) -> Any:
        """What :meth:`note` said last of ``key``, in an earlier run too; or None."""
        return self.state.noted(key) if self.state else None

    def note(self, key: str, value: Any) -> None:
        """Keep plain data about what is done, for a run that goes on from here."""
        if self.state:
            self.state.note(key, value)

    def streamed(self, program: Program) -> Streamed:
        """How a program runs piece by piece."""
        maker, ids = PieceMaker(load_graph(program.path)), self.ids[: program.count]
        if program.prefill is None:
            return with_held(Streamed(program.path, maker, program.mode, ids, default_batch(ids.shape[1])))
        caches = maker.by_segment(value.name for value in maker.model.graph.output if is_present(value.name))
        # a token takes as long as one of each window
        streamed = Streamed(program.path, maker, program.mode, ids, len(ids), values=caches)
        return with_held(streamed, 2)  # the outputs of the runs, and all of them as one

    def fitted(self, streamed: Streamed, key: str) -> Streamed:
        """The same in batches that fit; in those of an earlier run, if that has done a piece of the graph ``key``."""
        done = self._done(key)
        if done.batch:
            return replace(streamed, batch_size=done.batch)
        return streamed.fitted(None if self.budget is None else self.budget - SPARE)

    def _done(self, key: str) -> _Done:
        found = self.state.get(key) if self.state else None
        return _Done(**found) if found else _Done()

    def runs(self, streamed: Streamed, key: str, step: str) -> Iterator[tuple[Piece, PieceRun, Counter]]:
        """The pieces that are to be run; what is done of the graph ``key`` is left out.

        Raises:
            BismoothError: the memory is too little for a part of the graph.
        """
        folder = self.folder / re.sub(r"\W+", "-", key)
        folder.mkdir(exist_ok=True)
        pieces = streamed.plan(self.budget, self._done(key).stop)
        counter = Counter(self.progress, step, len(pieces) * len(streamed.ids))
        for number, piece in enumerate(pieces, 1):
            with streamed.running(piece, folder) as run:
                yield piece, run, counter
            if piece.stop < streamed.stop:
                if self.state:
                    done = asdict(_Done(piece.stop, streamed.batch_size))
                    self.state.record(key, done, (step, number, len(pieces)))
                if run.entry is not None:
                    run.entry.path.unlink()


@dataclass(frozen=True)
class _Done:
    """What is done of a graph: the segments before ``stop``, in batches of ``batch`` windows; 0 if nothing is."""

    stop: int = 0
    batch: int = 0


@contextmanager
def scratch(artifact: Path) -> Generator[Path]:
    """A folder for hidden states, gone at the end: in the artifact if that can be written to, else in ``TMPDIR``.

    What a killed process has left in the artifact is removed.
    """
    if os.access(artifact, os.W_OK):
        with scratch_folder(artifact / "hidden-states") as folder:
            yield folder
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def with_held(streamed: Streamed, arrays: int = 1) -> Streamed:
    """The same, where so many arrays of a batch's outputs count that exist beside those of a run: the last one's."""
    shape = resolve(streamed.maker.model.graph.output[0].type.tensor_type.shape, streamed.sizes) or ()
    return replace(streamed, held_per_window=arrays * prod(shape[1:]) * np.dtype(np.float32).itemsize)


def _ignore(_step: str) -> None:
    return
