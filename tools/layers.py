"""How much of each layer's output is error: signal-to-noise ratios of a running model."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.onnxruntime import Mode
from ..engines.pieces import PieceMaker
from ..engines.streaming import Streamed
from ..engines.subgraph import load_graph
from ..passes.graph import load
from ..passes.linears import Linear, find_linears
from .metrics import Sqnr
from .programs import Programs

TOKENS = 128
"""Tokens of the one window that is looked at."""


@dataclass(frozen=True)
class Layers:
    """The quantized linears of a model, in the float graph and in the Q/DQ graph.

    Attributes:
        reference: The original float graph, in which the linears are found.
        clean: The same with the smoothing factors of ``quantized`` folded in.
        quantized: The Q/DQ graph, run as float fake-quantization.
        names: The linears that are quantized.
    """

    reference: Path
    clean: Path
    quantized: Path
    names: Container[str]

    def least(self, programs: Programs) -> int:
        """Bytes that :meth:`sqnr` takes at least, beside what this process has already."""
        runs = (self._exact(programs), self._noisy(programs)) if self._linears else ()
        return max((streamed.least(0, streamed.stop) for streamed in runs), default=0)

    def sqnr(self, programs: Programs) -> tuple[dict[str, Any], ...]:
        """10 · log₁₀(Σy² / Σ(y − ŷ)²) of each output, errors of earlier layers included, worst first.

        Of the first of the windows. The outputs of the float graph wait in files: 512 bytes per linear and channel.

        Raises:
            BismoothError: a graph cannot be run, or the memory is too little for a part of it.
        """
        if not self._linears:
            return ()
        programs = replace(programs, state=None)
        files: dict[str, Path] = {}
        for value, signal in _values(self._exact(programs), programs, "layers of the float graph"):
            files[value] = programs.folder / f"layer-{len(files)}.bin"
            files[value].write_bytes(np.ascontiguousarray(signal).data)  # np.save does not say that a disk is full
        ratios: dict[str, float] = {}
        for value, noisy in _values(self._noisy(programs), programs, "layers of the Q/DQ graph"):
            ratios[value] = _sqnr(np.fromfile(files[value], noisy.dtype).reshape(noisy.shape), noisy)
            files[value].unlink()
        rows = [{"linear": item.name, "sqnr_db": ratios[item.output]} for item in self._linears]
        return tuple(sorted(rows, key=lambda row: (row["sqnr_db"] == row["sqnr_db"], row["sqnr_db"])))

    @cached_property
    def _linears(self) -> list[Linear]:
        return [linear for linear in find_linears(load(self.reference)) if linear.name in self.names]

    def _exact(self, programs: Programs) -> Streamed:
        return self._streamed(self.clean, "plain", programs)

    def _noisy(self, programs: Programs) -> Streamed:
        return self._streamed(self.quantized, "reference", programs)

    def _streamed(self, path: Path, mode: Mode, programs: Programs) -> Streamed:
        maker, ids = PieceMaker(load_graph(path)), programs.ids[:1, :TOKENS]
        values = maker.by_segment(linear.output for linear in self._linears)
        held = ids.size * max(linear.n for linear in self._linears) * np.dtype(np.float32).itemsize
        return Streamed(path, maker, mode, ids, 1, values=values, held=held, with_output=False)


def _values(streamed: Streamed, programs: Programs, step: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The values that are looked at, one after the other."""
    for piece, run, counter in programs.runs(streamed, step, step):
        (batch,) = streamed.batches
        results = run(batch)
        for value in streamed.observed(piece):
            is_exit = run.exit is not None and run.exit.value == value  # which is in its file alone
            yield value, run.exit.read(batch) if run.exit and is_exit else results.pop(value)
        counter.add(1)


def _sqnr(signal: NDArray[np.float32], noisy: NDArray[np.float32]) -> float:
    ratio = Sqnr()
    ratio.update(signal, noisy)
    return ratio.decibels
