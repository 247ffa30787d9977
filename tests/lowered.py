"""Run graphs before and after a pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bismooth.engines.onnxruntime import InMemoryGraph, Mode, Session
from bismooth.passes._gs import Graph, export_model
from bismooth.passes.driver import verify
from bismooth.passes.graph import load
from tests.models import exported, feeds_of, tokens

Array = NDArray[Any]


def graph_of(name: str) -> Graph:
    """The exported graph of a tiny model."""
    return load(exported(name).graph)


def run(graph: Graph, feeds: Mapping[str, Array], folder: Path, mode: Mode = "plain") -> dict[str, Array]:
    """All outputs by name; the graph's weights lie in ``folder``."""
    verify(graph, "the pass")
    with Session(InMemoryGraph("graph", export_model(graph).SerializeToString(), folder), mode=mode) as session:
        return session.run(feeds)


def run_text(graph: Graph, name: str, sequence: int = 7) -> dict[str, Array]:
    """All outputs for two rows of text, the first padded, without a past."""
    verify(graph, "the pass")
    data = export_model(graph).SerializeToString()
    with Session(InMemoryGraph(name, data, exported(name).folder), mode="plain") as session:
        inputs = session._open()  # pyright: ignore[reportPrivateUsage]
        return session.run(feeds_of(inputs, tokens(2, sequence, {0: (2, 0)})))


def assert_close(got: Array, expected: Array, tolerance: float = 1e-6) -> None:
    """Equal but for rounding, relative to the largest value."""
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())
