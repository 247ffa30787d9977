"""Stages on a Ray cluster of two nodes: the same bytes as here, also if workers or a node are lost midway."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bismooth.export.cores import default_threads
from bismooth.export.errors import BismoothError
from bismooth.passes.ray_executor import RayExecutor
from bismooth.tools import stages
from bismooth.tools.cli import main
from bismooth.tools.executors import open_executor
from tests.cluster import ROOT, SOURCES, LosesWorker, add_node, remove_node
from tests.tiny import SIZES, Tiny, make_tiny


@dataclass
class Losses:
    """Makes tasks lose the worker of their second item, or its whole node; notes the steps, tasks and reserved memory.

    Attributes:
        folder: Of the files that count the losses.
        step: The step that it happens in; all of them by default.
        node: Whether the node goes as well.
    """

    folder: Path
    step: str | None = None
    node: bool = False
    steps: list[str] = field(default_factory=list[str])
    tasks: list[Any] = field(default_factory=list[Any])
    memory: set[int | None] = field(default_factory=set[int | None])

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = RayExecutor.map

        def map(executor: RayExecutor, task: Any, items: Iterable[Any]) -> Iterator[Any]:
            listed = list(items)
            if len(listed) < 2 or self.step not in (None, task.step):
                return original(executor, task, listed)
            self.steps.append(task.step)
            self.tasks.append(task)
            self.memory.add(executor.memory)
            folder = self.folder / task.step.replace(" ", "-")
            folder.mkdir(parents=True)
            return original(executor, LosesWorker(task, listed[1].name, folder, node=self.node), listed)

        monkeypatch.setattr(RayExecutor, "map", map)

    @property
    def lost(self) -> int:
        """How often it happened."""
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


def content(folder: Path) -> dict[str, Any]:
    """Hashes of the files of an artifact, without times in its manifest."""
    manifest = json.loads((folder / "bismooth.json").read_text("utf-8"))
    for record in manifest["stages"][-1]["passes"]:
        del record["seconds"]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    return files | {"bismooth.json": [manifest["graphs"], manifest["stages"]]}


@pytest.mark.cluster
@pytest.mark.parametrize(("recipe", "step"), [("w8a8", "check folds"), ("w8a8-mixed", "look for walls")])
def test_a_worker_lost_in_every_step_changes_nothing(
    cluster: Any, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, step: str
) -> None:
    del cluster
    stages.quantize(artifact, recipe, tmp_path / "here")
    losses = Losses(tmp_path / "losses")
    losses.patch(monkeypatch)
    stages.quantize(artifact, recipe, tmp_path / "there", executor="ray", memory=2 * 10**9)
    (reserved,) = losses.memory
    assert reserved is not None
    assert 10**8 < reserved < 2 * 10**9
    assert {step, "quantize weights"} <= {*losses.steps}
    assert losses.lost == len(losses.steps)
    assert content(tmp_path / "there") == content(tmp_path / "here")


@pytest.mark.cluster
def test_calibration_on_a_cluster_gives_the_same_bytes(
    cluster: Any, tiny: Tiny, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cluster
    losses = Losses(tmp_path / "losses")
    losses.patch(monkeypatch)
    for name in ("local", "ray"):
        stages.calibrate(
            artifact,
            [str(tiny.text)],
            windows=5,
            length=24,
            batch_size=2,
            histograms=True,
            executor=name,
            output=tmp_path / name,
        )
    assert losses.lost == len(losses.steps) == 1
    assert [task.run.threads for task in losses.tasks] == [default_threads()], "not the CPUs that Ray counts"
    assert (tmp_path / "ray").read_bytes() == (tmp_path / "local").read_bytes()


@pytest.mark.cluster
def test_a_node_lost_midway_changes_nothing(
    cluster: Any, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages.quantize(artifact, "w8a8", tmp_path / "here")
    losses = Losses(tmp_path / "losses", "quantize weights", node=True)
    losses.patch(monkeypatch)
    try:
        stages.quantize(artifact, "w8a8", tmp_path / "there", executor="ray")
    finally:
        for node in [node for node in cluster.worker_nodes if not node.remaining_processes_alive()]:
            remove_node(cluster, node)
            add_node(cluster)
    assert losses.lost == 1
    assert content(tmp_path / "there") == content(tmp_path / "here")


@pytest.mark.cluster
def test_nothing_but_json_is_written_to_stdout(cluster: Any, artifact: Path, tmp_path: Path) -> None:
    """Ray tells of lost workers there."""
    script = (
        "import sys, pytest; from pathlib import Path; from tests.e2e.test_cluster import Losses\n"
        f"Losses(Path({str(tmp_path)!r})).patch(pytest.MonkeyPatch())\n"
        "from bismooth.tools.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["quantize", str(artifact), "-o", str(tmp_path / "there"), "--executor", "ray", "--json", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCES), str(ROOT)])}
    environment["RAY_ADDRESS"] = cluster.address
    done = subprocess.run([sys.executable, "-c", script, *command], env=environment, capture_output=True, check=True)
    assert list(tmp_path.rglob("lost-*"))
    assert json.loads(done.stdout)["recipe"] == "w8a8"
    assert done.stderr == b""


def test_an_executor_that_is_none() -> None:
    message = re.escape("executor 'slurm': there is none of that name. Expected 'local' or 'ray'.")
    with pytest.raises(BismoothError, match=message), open_executor("slurm", []):
        pass
