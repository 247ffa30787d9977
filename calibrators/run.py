"""Calibrate: run the float graph over token windows and write the statistics of its activations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.onnxruntime import InMemoryGraph, Session
from ..engines.subgraph import load_graph
from ..export.errors import BismoothError
from ..export.external_data import weight_files
from ..export.hashing import array_sha256, file_sha256
from ..export.replacing import replacing
from ..passes.progress import Progress, silent
from .histogram import BINS
from .observe import OUTLIERS, ROWS, TOKENS, Taps, instrument
from .statistics import Provenance, Statistics
from .writer import StatisticsWriter

_Result = Mapping[str, NDArray[Any]]
_HASHED_BLOCKS, _BLOCK_BYTES = 16, 1 << 16


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
    def like(value: str, result: _Result) -> _Totals:
        """Zeros in the shapes of ``result``."""
        taps = Taps.of(value)
        counts = np.zeros(BINS, np.int64) if taps.histogram in result else None
        absmax = np.zeros_like(result[taps.absmax])
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


def calibrate(
    artifact: Path,
    values: Sequence[str],
    windows: NDArray[np.int64],
    output: Path,
    *,
    graph: str = "model.onnx",
    batch_size: int = 1,
    rows: int = 256,
    seed: int = 0,
    histograms: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Statistics:
    """Statistics of the activations ``values`` over ``windows``, written to ``output``.

    The artifact folder is not written to, and memory does not grow with the number of windows. The same windows and
    batch size give the same bytes; another batch size changes rows by rounding only, and moves single counts between
    neighbouring bins.

    Args:
        artifact: folder with the float graph and its weights.
        values: names of float activations, channels last.
        windows: token ids [N, L].
        output: statistics file to write.
        graph: file name of the graph.
        batch_size: windows per run.
        rows: token rows to keep of each value, drawn from all windows; all of them if there are fewer.
        seed: chooses the rows.
        histograms: count magnitudes, for per-tensor ranges. Costs about a third of the model's own time.
        threads: threads per operator; one per core by default.
        progress: called with a step's name, how many windows are done, and how many there are.

    Raises:
        BismoothError: a value is unknown or not float, an activation is not finite, the graph cannot be run, or
            ``output`` cannot be written.
    """
    if not values or windows.ndim != 2 or not windows.size or min(batch_size, rows) < 1:
        raise BismoothError(
            f"calibrate: Expected values, windows [N, L], a batch size and rows of 1 or more, "
            f"got {len(values)} values, windows {list(windows.shape)}, batch size {batch_size}, {rows} rows."
        )
    path = artifact / graph
    model = load_graph(path)
    provenance = provenance_of(path, windows, seed)
    chosen = sample_rows(windows.size, rows, seed)
    values = list(dict.fromkeys(values))
    instrument(model, values, histograms=histograms)
    observed = InMemoryGraph(str(path), model.SerializeToString(), artifact)
    with (
        Session(observed, mode="plain", threads=threads, constant_folding=False) as session,
        replacing(output) as temporary,
    ):
        batches = _runs(session, windows, batch_size, chosen, progress)
        _collect(temporary, batches, values, provenance, chosen)
    return Statistics.load(output)


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


def _runs(
    session: Session, windows: NDArray[np.int64], batch_size: int, chosen: NDArray[np.int64], progress: Progress
) -> Iterator[dict[str, NDArray[Any]]]:
    length = windows.shape[1]
    progress("calibrate", 0, len(windows))
    for start in range(0, len(windows), batch_size):
        ids = windows[start : start + batch_size]
        first, last = np.searchsorted(chosen, [start * length, start * length + ids.size])
        others = {ROWS: chosen[first:last] - start * length, TOKENS: np.array([ids.size], np.int64)}
        yield session.run(session.token_feeds(ids, others))
        progress("calibrate", start + len(ids), len(windows))


def _collect(
    path: Path,
    batches: Iterator[dict[str, NDArray[Any]]],
    values: Sequence[str],
    provenance: Provenance,
    chosen: NDArray[np.int64],
) -> None:
    first = next(batches)
    totals = [_Totals.like(value, first) for value in values]
    channels = {total.value: len(total.absmax) for total in totals}
    with path.open("wb") as file:
        writer = StatisticsWriter(file, provenance, channels, chosen, histograms=totals[0].counts is not None)
        written = 0
        for result in chain([first], batches):
            for total in totals:
                total.add(result)
                writer.rows(total.value, written, result[total.taps.rows])
            written += len(result[totals[0].taps.rows])
            result.clear()  # before the next run, which needs as much
        for total in totals:
            writer.absmax(total.value, total.absmax)
            writer.outliers(total.value, total.outliers)
            if total.counts is not None:
                writer.histogram(total.value, total.counts)


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
