"""Calibrate: run the float graph over token windows and write the statistics of its activations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..engines.budget import find_budget
from ..engines.piece_run import Batch, PieceRun
from ..engines.pieces import Piece, PieceMaker
from ..engines.streaming import Streamed, default_batch
from ..engines.subgraph import load_graph
from ..export.cores import default_threads
from ..export.errors import BismoothError
from ..export.external_data import weight_files
from ..export.fingerprint import run_fingerprint
from ..export.hashing import array_sha256, file_sha256
from ..export.replacing import flush, put_in_place
from ..export.state import State, open_state
from ..passes.progress import Counter, Progress, silent
from .gram import KeptRows, gram_memory, gram_rows
from .histogram import BINS
from .observe import KEPT_ROWS, OUTLIERS, ROWS, SAMPLED, TOKENS, Taps, instrument
from .statistics import Provenance, Statistics
from .writer import StatisticsWriter

_Result: TypeAlias = Mapping[str, NDArray[Any]]
Spread: TypeAlias = Callable[["Observe", Iterable[Batch]], Iterator[_Result]]
_HASHED_BLOCKS, _BLOCK_BYTES = 16, 1 << 16
_FILE, _STEP, _BATCH = "statistics", "calibrate", "batch_size"


@dataclass
class _Totals:
    """What has been seen of one value: running maxima and sums, of fixed size."""

    value: str
    taps: Taps
    absmax: NDArray[np.float32]
    counts: NDArray[np.int64] | None
    outliers: NDArray[np.float32]
    outlier_peaks: NDArray[np.float32]

    @staticmethod
    def like(value: str, channels: int, result: _Result) -> _Totals:
        """Zeros in the shapes of ``result``.

        Raises:
            BismoothError: the value has not so many channels.
        """
        taps = Taps.of(value)
        counts = np.zeros(BINS, np.int64) if taps.histogram in result else None
        absmax = np.zeros_like(result[taps.absmax])
        if absmax.size != channels:
            raise BismoothError(
                f"value {value}: has {absmax.size} channels. Expected {channels}. Look its shape up in the graph."
            )
        outliers = np.zeros((OUTLIERS, absmax.size), np.float32)
        return _Totals(value, taps, absmax, counts, outliers, np.zeros(OUTLIERS, np.float32))

    def add(self, result: _Result) -> None:
        absmax, power = result[self.taps.absmax], float(result[self.taps.power])
        if not np.isfinite(power):
            kind = "NaN" if np.isnan(power) else f"magnitudes up to {absmax.max():.3g}"
            raise BismoothError(
                f"value {self.value}: holds {kind} on this text. Expected finite activations whose squares add up to "
                "less than 3.4e38 (the end of float32) over a batch. Check the weights with 'bismooth inspect', or "
                "leave the value out."
            )
        np.maximum(self.absmax, absmax, out=self.absmax)
        if self.counts is not None:
            self.counts += result[self.taps.histogram]
        peaks = np.concatenate([self.outlier_peaks, result[self.taps.outlier_peaks]])
        largest = np.argsort(-peaks, kind="stable")[:OUTLIERS]
        self.outliers = np.concatenate([self.outliers, result[self.taps.outliers]])[largest]
        self.outlier_peaks = peaks[largest]


@dataclass(frozen=True)
class Sample:
    """The token rows that are kept: their numbers in all windows of ``length`` tokens, ascending."""

    rows: NDArray[np.int64]
    length: int

    def of(self, batch: Batch) -> slice:
        """Those of them that a batch has."""
        first, last = np.searchsorted(self.rows, [batch.start * self.length, batch.stop * self.length])
        return slice(int(first), int(last))

    def feeds(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """What an instrumented graph is told about a batch."""
        return {
            ROWS: self.rows[self.of(batch)] - batch.start * self.length,
            TOKENS: np.array([(batch.stop - batch.start) * self.length], np.int64),
        }


@dataclass(frozen=True)
class Observe:
    """Statistics of a batch of windows in a piece of the graph; a task for an executor.

    Attributes:
        run: the piece.
        sample: the rows that are returned.
        kept: files for all rows of some values.
    """

    run: PieceRun
    sample: Sample
    kept: tuple[KeptRows, ...] = ()

    @property
    def step(self) -> str:
        return f"observe {self.run.label}"

    def __call__(self, batch: Batch) -> dict[str, NDArray[Any]]:
        result = self.run(batch, self.sample.feeds(batch))
        for kept in self.kept:
            kept.write(batch, result.pop(Taps.of(kept.file.value).x))
        return result


def calibrate(
    artifact: Path,
    values: Mapping[str, int],
    windows: NDArray[np.int64],
    output: Path,
    *,
    graph: str = "model.onnx",
    batch_size: int | None = None,
    rows: int = 256,
    seed: int = 0,
    histograms: bool = False,
    grams: bool = False,
    memory: int | None = None,
    restart: bool = False,
    threads: int | None = None,
    spread: Spread = map,
    resumed: Callable[[int, tuple[str, int, int] | None], None] = lambda _units, _progress: None,
    progress: Progress = silent,
) -> Statistics:
    """Statistics of the activations ``values`` over ``windows``, written to ``output``.

    The graph runs piece by piece, see :mod:`..engines.streaming`; a run that was broken off goes on behind the last
    piece that is done. The artifact folder is not written to. The same windows and batch size give the same bytes,
    whatever the memory; another batch size changes rows by rounding only, and moves single counts between neighbouring
    bins.

    Args:
        artifact: folder with the float graph and its weights.
        values: names of float activations, channels last, with the number of channels.
        windows: token ids [N, L].
        output: statistics file to write.
        graph: file name of the graph.
        batch_size: windows per run; by default as many as have :data:`..engines.streaming.BATCH_TOKENS` tokens, or
            fewer if the memory asks for it.
        rows: token rows to keep of each value, drawn from all windows; all of them if there are fewer.
        seed: chooses the rows.
        histograms: count magnitudes, for per-tensor ranges. Costs about a third of the model's own time.
        grams: compute XᵀX of each value, from all its rows: disk for float32 [K, K] each, and for the rows meanwhile.
        memory: bytes that this process may take; most of what the machine has left by default.
        restart: discard what an earlier run has left.
        threads: threads per operator; another number rounds otherwise. By default one per core of this machine.
        spread: runs a task over the batches, and gives the results in their order.
        resumed: told how many segments of the graph an earlier run has left, and how far that was.
        progress: called with a step's name, how many windows are done, and how many there are.

    Raises:
        BismoothError: a value is unknown or not float, an activation is not finite, the graph cannot be run, the memory
            is too little for a part of it, what an earlier run has left was made of something else, or ``output``
            cannot be written.
    """
    if not values or windows.ndim != 2 or not windows.size or rows < 1 or (batch_size is not None and batch_size < 1):
        raise BismoothError(
            f"calibrate: Expected values, windows [N, L], a batch size and rows of 1 or more, "
            f"got {len(values)} values, windows {list(windows.shape)}, batch size {batch_size}, {rows} rows."
        )
    path = artifact / graph
    streamed = observing(path, values, windows, batch_size, rows=rows, histograms=histograms, grams=grams)
    provenance = provenance_of(path, windows, seed)
    sample = Sample(sample_rows(windows.size, rows, seed), windows.shape[1])
    threads = threads or default_threads()
    fingerprint = run_fingerprint(
        weight_files(path),
        **asdict(provenance),
        rows=rows,
        histograms=histograms,
        grams=grams,
        batch_size=batch_size,
        threads=threads,
        values=dict(values),
    )
    with open_state(output, "calibrate", fingerprint, restart=restart) as state:
        resumed(state.resumed, state.progress)
        budget = find_budget(memory)
        if batch_size is None:
            streamed = _fitted(streamed, state, budget)
        pieces = streamed.plan(budget, state.done)
        file = state.folder / _FILE
        file.touch()
        flush(state.folder)
        with file.open("r+b") as opened:
            writer = StatisticsWriter(
                opened,
                provenance,
                values,
                sample.rows,
                histograms=histograms,
                grams=grams,
                continued=state.done > 0,
            )
            _Run(streamed, values, sample, threads, spread, progress).through(pieces, writer, state)
        put_in_place(file, output)
    return Statistics.load(output)


def observing(
    path: Path,
    values: Mapping[str, int],
    windows: NDArray[np.int64],
    batch_size: int | None = None,
    *,
    rows: int = 256,
    histograms: bool = False,
    grams: bool = False,
) -> Streamed:
    """How :func:`calibrate` runs the graph ``path``; see there.

    Raises:
        BismoothError: the graph cannot be read, or lacks a value.
    """
    maker = PieceMaker(load_graph(path))
    return Streamed(
        path,
        maker,
        "plain",
        windows,
        batch_size or default_batch(windows.shape[1]),
        values=maker.by_segment(values),
        prepare=partial(instrument, histograms=histograms, rows=grams),
        dims={SAMPLED: rows, KEPT_ROWS: OUTLIERS},
        between=gram_memory(max(values.values())) if grams else 0,
        with_output=False,
    )


def _fitted(streamed: Streamed, state: State, budget: int | None) -> Streamed:
    """``streamed`` in batches that fit; in those of an earlier run, if that has done a segment."""
    if state.done:
        return replace(streamed, batch_size=state.noted(_BATCH))
    fitted = streamed.fitted(budget)
    state.note(_BATCH, fitted.batch_size)
    return fitted


@dataclass(frozen=True)
class _Run:
    """All windows on their way through the graph, see :func:`calibrate`."""

    streamed: Streamed
    values: Mapping[str, int]
    sample: Sample
    threads: int
    spread: Spread
    progress: Progress

    def through(self, pieces: Sequence[Piece], writer: StatisticsWriter, state: State) -> None:
        """Pass the pieces, one after the other; each is on record when its statistics are on disk."""
        count = Counter(self.progress, _STEP, len(pieces) * len(self.streamed.ids))
        count.add(0)
        for piece in pieces:
            kept = tuple(self._kept(piece, state.folder)) if writer.grams else ()
            with self.streamed.running(piece, state.folder, self.threads) as run:
                self._observe(Observe(run, self.sample, kept), self.streamed.observed(piece), writer, count)
            self._multiply(kept, writer)
            writer.flush()
            done = {f"segment {number}": None for number in range(piece.first, piece.stop)}
            state.record_all(done, (_STEP, piece.stop, self.streamed.stop))
            for path in [rows.file.path for rows in kept] + ([run.entry.path] if run.entry else []):
                path.unlink()

    def _observe(self, task: Observe, values: Sequence[str], writer: StatisticsWriter, count: Counter) -> None:
        """Write the statistics of the values of a piece."""
        totals: list[_Totals] = []
        batches = self.streamed.batches
        for batch, result in zip(batches, self.spread(task, batches), strict=True):
            totals = totals or [_Totals.like(value, self.values[value], result) for value in values]
            for total in totals:
                total.add(result)
                writer.rows(total.value, self.sample.of(batch).start, result[total.taps.rows])
            count.add(batch.stop - batch.start)
        for total in totals:
            writer.absmax(total.value, total.absmax)
            writer.outliers(total.value, total.outliers)
            if total.counts is not None:
                writer.histogram(total.value, total.counts)

    def _kept(self, piece: Piece, folder: Path) -> Iterator[KeptRows]:
        """Files for all rows of the values of a piece."""
        for value in self.streamed.observed(piece):
            rows = KeptRows.of(self.streamed, value, self.values[value], folder)
            rows.file.create(rows.per_window * len(self.streamed.ids))
            yield rows

    def _multiply(self, kept: Sequence[KeptRows], writer: StatisticsWriter) -> None:
        """Write the Gram matrices of values whose rows were kept."""
        count = Counter(self.progress, "multiply", sum(rows.file.shape[0] for rows in kept))
        for rows in kept:
            for start, block in gram_rows(rows.file, rows.per_window * len(self.streamed.ids)):
                writer.gram(rows.file.value, start, block)
                count.add(len(block))


def provenance_of(graph: Path, windows: NDArray[np.int64], seed: int) -> Provenance:
    """What :func:`calibrate` records of a run of ``graph`` over token ids [N, L]."""
    tokenizer = graph.parent / "tokenizer.json"
    return Provenance(
        graph_sha256=hash_model(graph),
        tokenizer_sha256=file_sha256(tokenizer) if tokenizer.is_file() else "",
        data_sha256=array_sha256(windows),
        windows=windows.shape[0],
        length=windows.shape[1],
        seed=seed,
    )


def sample_rows(tokens: int, count: int, seed: int) -> NDArray[np.int64]:
    """``count`` different numbers below ``tokens``, ascending; all of them if there are fewer."""
    chosen = np.random.default_rng(seed).choice(tokens, size=min(count, tokens), replace=False)
    return np.sort(chosen).astype(np.int64)


def hash_model(path: Path) -> str:
    """SHA-256 that tells a graph with its weights from others: its bytes, and samples of the files its weights are in.

    Two checkpoints of one architecture have the same graph. Their weight files are told apart by size and by sixteen
    blocks of 64 KiB each, so that the hash takes no longer for a big model.

    Raises:
        BismoothError: the file is no ONNX, or its weights are missing, cut off, or outside of its folder.
    """
    digest = hashlib.sha256(path.read_bytes())
    for name, weights in weight_files(path).items():
        with weights.open("rb") as file:
            size = file.seek(0, 2)
            digest.update(f"{name} {size}".encode())
            for block in range(_HASHED_BLOCKS):
                file.seek(size * block // _HASHED_BLOCKS)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
