"""Tasks on the nodes of a Ray cluster: what comes back, and what becomes of lost workers, nodes and errors."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bismooth.export.errors import BismoothError
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
    monkeypatch.setattr(executor.ray, "cluster_resources", lambda: {"memory": 1.0})
    with pytest.raises(BismoothError, match=r"the cluster has no CPU to work on\. Expected nodes that offer some"):
        list(executor.map(Where(), ITEMS))
