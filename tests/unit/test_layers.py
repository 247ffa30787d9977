"""How much of each layer's output is error: the same whatever the pieces, and what whole runs say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from bismooth.engines.onnxruntime import InMemoryGraph, Mode, Session
from bismooth.engines.pieces import Piece
from bismooth.engines.streaming import Streamed
from bismooth.engines.subgraph import add_outputs, load_graph
from bismooth.passes.graph import load
from bismooth.passes.linears import find_linears
from bismooth.passes.progress import silent
from bismooth.tools.layers import Layers
from bismooth.tools.programs import Programs
from tests.graphs import TOKENS, Builder, DecoderShape, decoder
from tests.quantizing import quantize, recipe

SHAPE = DecoderShape(layers=3)
IDS = np.random.default_rng(0).integers(0, 16, (2, 7))


def segments(self: Streamed, _budget: int | None, first: int = 0, stop: int | None = None) -> list[Piece]:
    """The most pieces that there can be."""
    return [Piece(segment, segment + 1) for segment in range(first, self.stop if stop is None else stop)]


def straight() -> Builder:
    """Without residuals: what goes from one piece to the next is the output of a linear."""
    b = Builder(unknown="sequence")
    x = b.op("Gather", b.matrix("embed", 16, 8), b.input("input_ids", *TOKENS, dtype=TensorProto.INT64), axis=0)
    for layer in range(3):
        x = b.linear(x, f"{layer}", 8, 8)
    b.outputs.append(b.linear(x, "head", 16, 8))
    return b


def decibels(reference: Path, graph: Path) -> dict[str, float]:
    """Of the outputs of whole graphs."""
    linears = find_linears(load(reference))
    values = [linear.output for linear in linears]

    def run(path: Path, mode: Mode) -> dict[str, np.ndarray]:
        model: onnx.ModelProto = load_graph(path)
        add_outputs(model, values)
        with Session(InMemoryGraph("whole", model.SerializeToString(), path.parent), mode=mode) as session:
            return session.run(session.token_feeds(IDS[:1]), values)

    exact, noisy = run(reference, "plain"), run(graph, "reference")
    return {
        item.name: float(
            10 * np.log10((exact[item.output] ** 2).sum() / ((exact[item.output] - noisy[item.output]) ** 2).sum())
        )
        for item in linears
    }


@pytest.mark.parametrize("name", ["decoder", "straight"])
def test_ratios_are_those_of_whole_graphs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = decoder(SHAPE, tied=False) if name == "decoder" else straight()
    made = quantize(builder, tmp_path / "made", recipe())
    reference, graph = (made.folder / made.result.graphs[role] for role in ("reference", "float32"))
    layers = Layers(reference, reference, graph, [linear.name for linear in find_linears(load(reference))])
    (tmp_path / "scratch").mkdir()
    programs = Programs(IDS, tmp_path / "scratch", silent)
    whole = layers.sqnr(programs)
    ratios = [row["sqnr_db"] for row in whole]
    assert ratios == sorted(ratios)
    assert {row["linear"]: row["sqnr_db"] for row in whole} == pytest.approx(decibels(reference, graph), abs=1e-3)
    monkeypatch.setattr(Streamed, "plan", segments)
    assert layers.sqnr(programs) == whole
    assert list((tmp_path / "scratch").glob("*.npy")) == []


def test_no_layers(tmp_path: Path) -> None:
    graph = straight().save(tmp_path)
    layers = Layers(graph, graph, graph, [])
    programs = Programs(IDS, tmp_path, silent)
    assert layers.sqnr(programs) == ()
    assert layers.least(programs) == 0


def test_memory_is_for_a_segment_of_either_graph(tmp_path: Path) -> None:
    graph = straight().save(tmp_path)
    layers = Layers(graph, graph, graph, [linear.name for linear in find_linears(load(graph))])
    assert layers.least(Programs(IDS, tmp_path, silent)) > 96 << 20
