"""Stages on a Ray cluster of two nodes: the same bytes as here, also if a worker or a node is lost midway."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bismooth.passes.ray_executor import RayExecutor
from bismooth.tools import stages
from bismooth.tools.cli import main
from tests.cluster import LosesWorker, add_node
from tests.tiny import SIZES, Tiny, make_tiny

pytestmark = pytest.mark.cluster


@dataclass
class Losses:
    """Makes every task of an executor lose a worker at its second item; notes the tasks."""

    folder: Path
    node: bool = False
    steps: dict[str, int] = field(default_factory=dict[str, int])

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = RayExecutor.map

        def map(executor: RayExecutor, task: Any, items: Iterable[Any]) -> Iterator[Any]:
            listed = list(items)
            self.steps[task.step] = len(listed)
            folder = self.folder / task.step.replace(" ", "-")
            folder.mkdir(parents=True)
            first = len(self.steps) == 1
            victim = listed[min(1, len(listed) - 1)].name if listed and (first or not self.node) else ""
            yield from original(executor, LosesWorker(task, victim, folder, node=self.node), listed)

        monkeypatch.setattr(RayExecutor, "map", map)

    @property
    def lost(self) -> int:
        return len(list(self.folder.rglob("lost-*")))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def artifact(tiny: Tiny) -> Path:
    """A float artifact with statistics."""
    folder = tiny.source.parent / "float"
    assert main(["export", str(tiny.source), "-o", str(folder)]) == 0
    assert main(["calibrate", str(folder), "--data", str(tiny.text), *SIZES]) == 0
    return folder


def content(folder: Path) -> dict[str, str]:
    """Hashes of the files of an artifact but its manifest, and the manifest's record of the stage."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    manifest = json.loads((folder / "bismooth.json").read_text("utf-8"))
    stage = manifest["stages"][-1]
    for record in stage["passes"]:
        record.pop("seconds", None)
    return files | {"bismooth.json": json.dumps([manifest["graphs"], stage])}


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-mixed"])
def test_a_lost_worker_changes_nothing(
    cluster: Any, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    del cluster
    stages.quantize(artifact, recipe, tmp_path / "here")
    losses = Losses(tmp_path / "losses")
    losses.patch(monkeypatch)
    stages.quantize(artifact, recipe, tmp_path / "there", executor="ray")
    assert losses.steps.keys() >= {"quantize weights", "store 16-bit weights"}
    assert losses.lost == sum(count > 0 for count in losses.steps.values())
    assert content(tmp_path / "there") == content(tmp_path / "here")
