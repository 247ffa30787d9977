"""Whether a graph computes the same in the parts of a chain is judged, and not taken for granted."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bismooth.engines.base import Profile
from bismooth.engines.chain import CHAIN
from bismooth.engines.chain_build import build_chain
from bismooth.engines.chain_windows import lean_parts
from bismooth.engines.null import NullBuilder
from bismooth.engines.onnxruntime import InMemoryGraph, Mode
from bismooth.engines.token_feeds import Port
from bismooth.export.artifact import Artifact, Manifest
from bismooth.passes.gates import Hop
from bismooth.passes.progress import silent
from bismooth.tools import chains
from bismooth.tools.chains import judge_chains
from bismooth.tools.comparison import Comparison, Features, Figures, Ids
from bismooth.tools.finished import engine_differs, finished_engine
from bismooth.tools.hops import HopResult
from bismooth.tools.programs import Programs, scratch
from bismooth.tools.shipped import ShippedEngine
from tests.cuttable import plan, request, write_cuttable

IDS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
MANIFEST = Manifest("float", {}, {"float32": "model.onnx"})


def make(folder: Path) -> tuple[Artifact, ShippedEngine]:
    graph = write_cuttable(folder)
    result = build_chain(NullBuilder(), request(graph, folder / "engines/chain/model.engine"), plan(graph))
    return Artifact(folder, MANIFEST), ShippedEngine(result.engine.parent, result.engine, result.record, MANIFEST)


def judge(
    artifact: Artifact, *engines: ShippedEngine, memory: int | None = None
) -> tuple[dict[str, Figures], list[str]]:
    with scratch(artifact.path) as folder:
        return judge_chains(artifact, engines, Programs(IDS, folder, silent, memory), len(IDS))


def take_for_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def features(_artifact: Artifact, _output: Port) -> type[Comparison]:
        return Features

    monkeypatch.setattr(chains, "comparison_of", features)


def test_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, engine = make(tmp_path)
    figures, failures = judge(artifact, engine)
    assert failures == []
    assert figures == {"chain": {"parts": 4, "equal": True, "kl": 0, "relative_error": 0}}
    take_for_features(monkeypatch)
    figures, failures = judge(artifact, engine)
    assert (figures, failures) == ({"chain": {"parts": 4, "equal": True, "relative_error": 0}}, [])


def test_parts_that_take_more_memory_than_there_is_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, engine = make(tmp_path)

    def huge(*_arguments: object) -> int:
        return 10**12

    monkeypatch.setattr(chains, "footprint", huge)
    figures, failures = judge(artifact, engine, memory=10**10)
    assert failures == []
    assert re.fullmatch(r"its largest part takes 100\d{4}MB of memory", figures["chain"]["skipped"])
    note = HopResult(Hop.AUDIT, "", {"chains": figures}).note()
    assert note == f"the 4 parts of chain were not run: {figures['chain']['skipped']}"


@pytest.mark.parametrize("key", ["kl", "relative_error"])
def test_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    if key == "relative_error":
        take_for_features(monkeypatch)
    artifact, engine = make(tmp_path / "art")
    other = write_cuttable(tmp_path / "other", window=2)

    def parts_of_other(_path: Path, values: Sequence[str]) -> list[InMemoryGraph]:
        return lean_parts(other, values)

    monkeypatch.setattr(chains, "lean_parts", parts_of_other)
    figures, (failure,) = judge(artifact, engine)
    assert not figures["chain"]["equal"]
    assert failure.startswith(f"chain: its parts compute something else than the whole: {key} is ")
    assert failure.endswith("Expected at most 1e-06. Build the chain again.")


def test_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, engine = make(tmp_path)

    def no_numbers(_parts: object, ids: Ids, _mode: Mode) -> list[NDArray[np.float32]]:
        return [np.full((1, 6, 13), np.nan, np.float32) for _ in ids]

    monkeypatch.setattr(chains, "chain_windows", no_numbers)
    figures, (failure,) = judge(artifact, engine)
    assert figures == {"chain": {"parts": 4, "equal": False}}
    assert "NaN" in failure


def test_another_graph(tmp_path: Path) -> None:
    artifact, engine = make(tmp_path)
    document = json.loads((engine.folder / CHAIN).read_text().replace("graph/Add__", "elsewhere"))
    (engine.folder / CHAIN).write_text(json.dumps(document))
    figures, (failure,) = judge(artifact, engine)
    assert figures == {}
    assert "chain: " in failure
    assert "cannot be cut at 'elsewhere', as the chain is" in failure


def test_a_chain_is_not_kept_where_an_engine_in_one_piece_is_to_be(tmp_path: Path) -> None:
    _, engine = make(tmp_path)
    graph = tmp_path / "model.onnx"
    differs = engine_differs(engine, finished_engine(engine), "null", graph, (), Profile(), allow_float=False)
    assert differs == f"it is a chain of engines. To build it alone again, delete {engine.folder}"
