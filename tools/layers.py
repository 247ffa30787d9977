"""How much of each layer's output is error: signal-to-noise ratios of a running model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.onnxruntime import Session
from ..passes.graph import load
from ..passes.linears import find_linears
from ..passes.qdq import WeightNames

TOKENS = 128
"""Tokens of the one window that is looked at: all outputs of all linears are held at once, twice."""


def layer_sqnr(
    clean: Path, quantized: Path, ids: NDArray[np.int64], progress: Callable[[str, int, int], None]
) -> tuple[dict[str, Any], ...]:
    """10 · log₁₀(Σy² / Σ(y − ŷ)²) of each quantized linear's output, errors of earlier layers included, worst first.

    Args:
        clean: The float graph with the smoothing factors of ``quantized`` folded in.
        quantized: The Q/DQ graph, run as float fake-quantization.
        ids: token ids [1, S].
        progress: Called when a graph has run.
    """
    stored = {tensor.name for node in load(quantized).nodes for tensor in node.inputs}
    linears = [item for item in find_linears(load(clean)) if WeightNames.of(item).values in stored]
    values = list(dict.fromkeys(linear.output for linear in linears))
    if not values:
        return ()
    window = ids[:, :TOKENS]
    with Session(clean, mode="plain", values=values) as session:
        signal = session.run(session.token_feeds(window), values)
    progress("layer errors", 1, 2)
    with Session(quantized, mode="reference", values=values) as session:
        noisy = session.run(session.token_feeds(window), values)
    progress("layer errors", 2, 2)
    rows = [{"linear": item.name, "sqnr_db": _sqnr(signal[item.output], noisy[item.output])} for item in linears]
    return tuple(sorted(rows, key=lambda row: row["sqnr_db"]))


def _sqnr(signal: NDArray[np.float32], noisy: NDArray[np.float32]) -> float:
    reference = signal.astype(np.float64)
    noise = float(((noisy - reference) ** 2).sum())
    power = float((reference**2).sum())
    return 10 * float(np.log10(power / noise)) if noise > 0 and power > 0 else float("inf")
