"""Quantize small graphs as the package does, and say in float64 what must come out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bismooth.engines.onnxruntime import Mode, Session
from bismooth.passes.quantize import QuantizeResult, quantize_graph
from bismooth.passes.recipe import Recipe
from bismooth.passes.spec import StaticActivation
from tests.graphs import Builder

Array = NDArray[Any]
OUTLIERS = 4
HEAD_TOO = {"match": "@head", "weights": {"granularity": "per_channel"}}
"""In most test graphs all linears make outputs, which recipes leave in float."""


@dataclass(frozen=True)
class Seen:
    """Calibration that keeps all rows [T, K] of all values."""

    values: Mapping[str, Array]

    def absmax(self, value: str) -> Array:
        return np.abs(self.values[value]).max(axis=0)

    def rows(self, value: str) -> Array:
        return self.values[value]

    def outliers(self, value: str) -> Array:
        rows = self.values[value]
        return rows[np.argsort(-np.abs(rows).max(axis=1), kind="stable")[:OUTLIERS]]

    def limit(
        self, value: str, activation: StaticActivation, divisor: Array | None, channels: Array | None = None
    ) -> float:
        seen = slice(None) if channels is None else channels
        return float(np.abs(self.values[value] / (1 if divisor is None else divisor))[:, seen].max())


@dataclass(frozen=True)
class Quantized:
    """An output folder of ``quantize_graph``."""

    folder: Path
    result: QuantizeResult

    def run(self, feeds: Mapping[str, Array], *, role: str = "float32", mode: Mode = "reference") -> dict[str, Array]:
        with Session(self.folder / self.result.graphs[role], mode=mode, threads=1) as session:
            return session.run(feeds)


def recipe(*rules: Mapping[str, Any], **settings: Any) -> Recipe:
    """``w8a8-per-channel`` in float32, the head too, with other settings and further rules."""
    document = {"extends": "w8a8-per-channel", "compute_dtype": "float32", "layers": [HEAD_TOO, *rules]}
    return Recipe.from_dict(document | settings, name="test")


def quantize(builder: Builder, folder: Path, chosen: Recipe, seen: Seen | None = None) -> Quantized:
    """Quantize a graph; its weights stay inside the float graphs."""
    source, target = folder / "float", folder / "quantized"
    source.mkdir(parents=True)
    target.mkdir()
    return Quantized(target, quantize_graph(builder.save(source), target, chosen, seen))


def watch(builder: Builder, folder: Path, feeds: Mapping[str, Array], *values: str) -> Seen:
    """What calibration on these feeds would know of some values."""
    folder.mkdir(parents=True)
    with Session(builder.save(folder), mode="plain", threads=1, values=values) as session:
        found = session.run(feeds, values)
    return Seen({name: array.reshape(-1, array.shape[-1]) for name, array in found.items()})


def per_token(x: Array) -> tuple[Array, Array]:
    """INT8 values of x [.., K] and their scale [.., 1], in the graph's float32 arithmetic."""
    t = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    return np.rint(x / t).astype(np.float64), t.astype(np.float64)


def per_channel(w: Array) -> tuple[Array, Array]:
    """INT8 values of W [N, K] and their scale [N, 1]."""
    scale = np.abs(w).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(w / scale).astype(np.float64), scale.astype(np.float64)


def w8a8(x: Array, w: Array) -> Array:
    """x Wᵀ with both quantized, the sum in float64."""
    (xq, t), (wq, scale) = per_token(x), per_channel(w)
    return (xq @ wq.T) * t * scale.T


def relative_error(expected: Array, got: Array) -> float:
    """max|a − b| / max|a|."""
    return float(np.abs(expected - got).max() / np.abs(expected).max())
