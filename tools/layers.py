"""How much of each layer's output is error: signal-to-noise ratios of a running model."""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.onnxruntime import Session
from ..passes.graph import load
from ..passes.linears import find_linears
from .metrics import Sqnr

TOKENS = 128
"""Tokens of the one window that is looked at."""

AT_ONCE = 32
"""Linears whose outputs are held at once, of both graphs; each group is a run of its own."""


def layer_sqnr(
    reference: Path,
    clean: Path,
    quantized: Path,
    names: Container[str],
    ids: NDArray[np.int64],
    progress: Callable[[str, int, int], None],
) -> tuple[dict[str, Any], ...]:
    """10 · log₁₀(Σy² / Σ(y − ŷ)²) of each quantized linear's output, errors of earlier layers included, worst first.

    Args:
        reference: The original float graph, in which the linears are found.
        clean: The same with the smoothing factors of ``quantized`` folded in.
        quantized: The Q/DQ graph, run as float fake-quantization.
        names: The linears that are quantized.
        ids: token ids [1, S].
        progress: Called when a graph has run.
    """
    linears = [linear for linear in find_linears(load(reference)) if linear.name in names]
    values = list(dict.fromkeys(linear.output for linear in linears))
    if not values:
        return ()
    window = ids[:, :TOKENS]
    ratios: dict[str, float] = {}
    with (
        Session(clean, mode="plain", values=values) as exact,
        Session(quantized, mode="reference", values=values) as noisy,
    ):
        for start in range(0, len(values), AT_ONCE):
            group = values[start : start + AT_ONCE]
            signal, other = (session.run(session.token_feeds(window), group) for session in (exact, noisy))
            ratios |= {value: _sqnr(signal[value], other[value]) for value in group}
            progress("layer errors", min(start + AT_ONCE, len(values)), len(values))
    rows = [{"linear": item.name, "sqnr_db": ratios[item.output]} for item in linears]
    return tuple(sorted(rows, key=lambda row: (row["sqnr_db"] == row["sqnr_db"], row["sqnr_db"])))


def _sqnr(signal: NDArray[np.float32], noisy: NDArray[np.float32]) -> float:
    ratio = Sqnr()
    ratio.update(signal, noisy)
    return ratio.decibels
