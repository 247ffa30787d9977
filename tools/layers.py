"""How much of each layer's output is error: signal-to-noise ratios of a running model."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.onnxruntime import Mode
from ..engines.pieces import Piece, PieceMaker
from ..engines.streaming import Streamed
from ..engines.subgraph import load_graph
from ..passes.graph import load
from ..passes.linears import find_linears
from ..passes.progress import Counter
from .comparison import Ids
from .metrics import Sqnr
from .programs import Programs

TOKENS = 128
"""Tokens of the one window that is looked at."""

Outputs = dict[str, NDArray[np.float32]]


def layer_sqnr(
    reference: Path, clean: Path, quantized: Path, names: Container[str], programs: Programs
) -> tuple[dict[str, Any], ...]:
    """10 · log₁₀(Σy² / Σ(y − ŷ)²) of each quantized linear's output, errors of earlier layers included, worst first.

    Args:
        reference: The original float graph, in which the linears are found.
        clean: The same with the smoothing factors of ``quantized`` folded in.
        quantized: The Q/DQ graph, run as float fake-quantization.
        names: The linears that are quantized.
        programs: The windows, of which the first is looked at, and the memory.
    """
    linears = [linear for linear in find_linears(load(reference)) if linear.name in names]
    values = list(dict.fromkeys(linear.output for linear in linears))
    if not values:
        return ()
    ids = programs.ids[:1, :TOKENS]
    exact, noisy = _streamed(clean, "plain", ids, values), _streamed(quantized, "reference", ids, values)
    counter = Counter(programs.progress, "layer errors", len(values))
    ratios: dict[str, float] = {}
    for signal, other in _side_by_side(exact, noisy, programs):
        for value in signal:
            ratios[value] = _sqnr(signal[value], other[value])
            counter(value)
    rows = [{"linear": item.name, "sqnr_db": ratios[item.output]} for item in linears]
    return tuple(sorted(rows, key=lambda row: (row["sqnr_db"] == row["sqnr_db"], row["sqnr_db"])))


def _streamed(path: Path, mode: Mode, ids: Ids, values: list[str]) -> Streamed:
    maker = PieceMaker(load_graph(path))
    return Streamed(path, maker, mode, ids, 1, values=maker.by_segment(values), with_output=False)


def _side_by_side(exact: Streamed, noisy: Streamed, programs: Programs) -> Iterator[tuple[Outputs, Outputs]]:
    """The values of both graphs, piece by piece; the second is cut where the first is, if it can be cut there."""
    places = {segment.exit: place + 1 for place, segment in enumerate(noisy.maker.segments)}
    signal, other, done = Outputs(), Outputs(), 0
    for piece in exact.plan(programs.budget):
        signal |= _run(exact, piece, programs, "exact")
        leaving = exact.exit_of(piece)
        stop = noisy.stop if leaving is None else places.get(leaving, done)
        for part in noisy.plan(programs.budget, done, stop):
            other |= _run(noisy, part, programs, "noisy")
        done = stop
        if signal.keys() <= other.keys():
            yield signal, other
            signal, other = Outputs(), Outputs()


def _run(streamed: Streamed, piece: Piece, programs: Programs, name: str) -> Outputs:
    folder = programs.folder / name
    folder.mkdir(exist_ok=True)
    with streamed.running(piece, folder) as run:
        results = [run(batch) for batch in streamed.batches]
    return results[0]


def _sqnr(signal: NDArray[np.float32], noisy: NDArray[np.float32]) -> float:
    ratio = Sqnr()
    ratio.update(signal, noisy)
    return ratio.decibels
