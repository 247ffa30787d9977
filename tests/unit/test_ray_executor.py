"""Tasks on the nodes of a Ray cluster: what comes back, and what becomes of lost workers, nodes and errors."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.engines.piece_run import Batch, StreamFile
from bismooth.export.errors import BismoothError
from bismooth.export.placed_tensors import PlacedTensors
from bismooth.passes import ray_executor
from bismooth.passes.ray_executor import RayExecutor, connect
from tests.cluster import ITEMS, LosesWorker, Named, Task, Where, add_node, remove_node

pytestmark = pytest.mark.cluster

NAMES = [item.name for item in ITEMS]
threadpoolctl: Any = import_module("threadpoolctl")


@dataclass(frozen=True)
class Fails(Task):
    """Raises an error at the first item; leaves a file for each of the others."""

    error: Exception
    folder: Path

    def __call__(self, item: Named) -> None:
        time.sleep(0.1)
        if item == ITEMS[0]:
            raise self.error
        (self.folder / item.name).touch()


class Reserved(Task):
    """The result: what Ray has reserved for the call."""

    def __call__(self, _: Named) -> dict[str, float]:
        return import_module("ray").get_runtime_context().get_assigned_resources()


@dataclass(frozen=True)
class Writes(Task):
    """The result: whether what the call writes is written through to disk."""

    file: PlacedTensors

    def __call__(self, item: Named) -> int:
        synced: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", synced.append)
            with self.file.writing([item.name]) as writer:
                writer.write(item.name, np.ones(2, np.int8))
            stream = StreamFile(self.file.path, item.name, "|i1", (1,))
            stream.write(Batch(0, 1), np.zeros(1, np.int8))
        return len(synced)


class Counting(Task):
    """The result: how often a process has unpickled the task, and its number of threads for matrix products."""

    unpickled = 0

    def __reduce__(self) -> Any:
        return _count, ()

    def __call__(self, _: Named) -> tuple[int, set[int]]:
        libraries = threadpoolctl.threadpool_info()
        return Counting.unpickled, {each["num_threads"] for each in libraries if each["user_api"] == "blas"}


def _count() -> Counting:
    Counting.unpickled += 1
    return Counting()


@pytest.fixture(scope="module")
def executor(session_cluster: Any) -> Generator[RayExecutor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", session_cluster.address)
        with connect([]) as executor:
            yield executor


def test_results_come_in_order_from_all_nodes(executor: RayExecutor) -> None:
    names, processes = zip(*executor.map(Where(), ITEMS), strict=True)
    assert list(names) == NAMES
    assert len(set(processes)) == 2
    assert os.getpid() not in processes


def test_a_process_keeps_the_task_and_multiplies_on_one_core(executor: RayExecutor) -> None:
    assert {(unpickled, *cores) for unpickled, cores in executor.map(Counting(), ITEMS)} == {(1, 1)}


def test_a_worker_writes_through_to_disk(executor: RayExecutor, tmp_path: Path) -> None:
    """Before its results are here. Threads of this process do not: who puts results on record does that."""
    declared = [(item.name, np.dtype(np.int8), (2,)) for item in ITEMS]
    task = Writes(PlacedTensors.create(tmp_path / "w", declared))
    assert list(executor.map(task, ITEMS[:3])) == [2, 2, 2]
    assert task(ITEMS[0]) == 0


def test_the_work_of_a_lost_worker_is_done_again(
    executor: RayExecutor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = list(executor.map(LosesWorker(Where(), "item 3", tmp_path, times=2), ITEMS))
    assert [name for name, _ in found] == NAMES
    assert len(list(tmp_path.iterdir())) == 2
    assert capfd.readouterr().out == ""


def test_the_work_of_a_lost_node_is_done_again(session_cluster: Any, executor: RayExecutor, tmp_path: Path) -> None:
    try:
        found = list(executor.map(LosesWorker(Where(), "item 3", tmp_path, node=True), ITEMS))
    finally:
        (lost,) = [node for node in session_cluster.worker_nodes if not node.remaining_processes_alive()]
        remove_node(session_cluster, lost)
        add_node(session_cluster)
    assert [name for name, _ in found] == NAMES


def test_work_that_ends_every_worker_ends_the_run(
    executor: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "RETRIES", 1)
    with pytest.raises(BismoothError, match=r"item 3: the workers that worked on it were lost, 2 times: .*\. Look"):
        list(executor.map(LosesWorker(Where(), "item 3", tmp_path, times=9), ITEMS))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [BismoothError("w: holds NaN."), FileNotFoundError(2, "No such file", "art/w")])
def test_an_error_is_what_it_is_here_and_stops_the_rest(
    executor: RayExecutor, tmp_path: Path, error: Exception
) -> None:
    with pytest.raises(type(error)) as caught:
        list(executor.map(Fails(error, tmp_path), ITEMS * 20))
    assert (type(caught.value), str(caught.value)) == (type(error), str(error))
    done = len(list(tmp_path.iterdir()))
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == done < len(ITEMS)


def test_a_caller_that_stops_stops_the_rest(executor: RayExecutor, tmp_path: Path) -> None:
    for _ in executor.map(Fails(ValueError(), tmp_path), ITEMS[1:] * 20):
        break
    done = len(list(tmp_path.iterdir()))
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) == done < len(ITEMS)


def test_a_cluster_without_a_cpu_is_refused(executor: RayExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[Any] = executor.ray.nodes()
    for node in nodes:
        node["Resources"].pop("CPU", None)
    monkeypatch.setattr(executor.ray, "nodes", lambda: nodes)
    with pytest.raises(BismoothError, match=r"has no node to work on\. Expected nodes that offer a CPU: start them"):
        list(executor.map(Where(), ITEMS))


def test_a_cluster_without_the_memory_is_refused(executor: RayExecutor) -> None:
    """A call that fits nowhere would wait for ever."""
    message = r"has no node to work on\. Expected nodes that offer a CPU and \d{16} bytes of memory \(--memory\): start"
    with pytest.raises(BismoothError, match=message):
        list(replace(executor, memory=10**15).map(Where(), ITEMS))
    with pytest.raises(BismoothError, match=message), connect([], memory=10**15):
        pass


def test_a_call_has_its_memory_reserved(executor: RayExecutor) -> None:
    """Ray puts no more calls on a node than have room there."""
    assert [found["memory"] for found in replace(executor, memory=10**8).map(Reserved(), ITEMS[:2])] == [10**8] * 2
