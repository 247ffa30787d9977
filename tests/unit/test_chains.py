"""Whether a graph computes the same in the parts of a chain is judged, and not taken for granted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bismooth.engines.chain import CHAIN
from bismooth.engines.chain_build import build_chain
from bismooth.engines.chain_session import lean_parts
from bismooth.engines.null import NullBuilder
from bismooth.export.artifact import Artifact, Manifest
from bismooth.tools import chains
from bismooth.tools.chains import judge_chains
from bismooth.tools.comparison import Comparison, Features, Figures, Logits
from bismooth.tools.shipped import ShippedEngine
from tests.cuttable import plan, request, write_cuttable

IDS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
MANIFEST = Manifest("float", {}, {"float32": "model.onnx"})


def make(folder: Path) -> tuple[Artifact, ShippedEngine]:
    graph = write_cuttable(folder)
    result = build_chain(NullBuilder(), request(graph, folder / "engines/chain/model.engine"), plan(graph))
    return Artifact(folder, MANIFEST), ShippedEngine(result.engine.parent, result.engine, result.record, MANIFEST)


def judge(
    artifact: Artifact, *engines: ShippedEngine, comparison: type[Comparison] = Logits
) -> tuple[dict[str, Figures], list[str]]:
    return judge_chains(artifact, engines, IDS, comparison, lambda _step, _done, _total: None)


def test_the_same(tmp_path: Path) -> None:
    artifact, engine = make(tmp_path)
    figures, failures = judge(artifact, engine)
    assert failures == []
    assert figures == {"chain": {"parts": 4, "equal": True, "kl": 0, "relative_error": 0}}
    assert judge(artifact, engine, comparison=Features) == (
        {"chain": {"parts": 4, "equal": True, "relative_error": 0}},
        [],
    )


@pytest.mark.parametrize(("comparison", "key"), [(Logits, "kl"), (Features, "relative_error")])
def test_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comparison: type[Comparison], key: str
) -> None:
    artifact, engine = make(tmp_path / "art")
    other = write_cuttable(tmp_path / "other", window=2)
    monkeypatch.setattr(chains, "lean_parts", lambda _path, borders: lean_parts(other, borders))
    figures, (failure,) = judge(artifact, engine, comparison=comparison)
    assert not figures["chain"]["equal"]
    assert failure.startswith(f"chain: its parts compute something else than the whole: {key} is ")
    assert failure.endswith("Expected at most 1e-06. Build the chain again.")


def test_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, engine = make(tmp_path)
    monkeypatch.setattr(chains.ChainSession, "windows", lambda *_: [np.full((1, 6, 13), np.nan, np.float32)] * 2)
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
