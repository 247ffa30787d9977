"""Tasks on the nodes of a Ray cluster: results, losses, errors, and what is refused before any work."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
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
from bismooth.passes.ray_worker import check_node, kind_of_machine
from tests.cluster import ITEMS, ROOT, SOURCES, LosesWorker, Named, Task, Where, add_node

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

    def __call__(self, _: Named) -> tuple[int, int, set[int]]:
        libraries = threadpoolctl.threadpool_info()
        return (
            os.getpid(),
            Counting.unpickled,
            {each["num_threads"] for each in libraries if each["user_api"] == "blas"},
        )


def _count() -> Counting:
    Counting.unpickled += 1
    return Counting()


@pytest.fixture
def executor(cluster: Any) -> Generator[RayExecutor]:
    del cluster
    with connect([ROOT / "README.md"]) as executor:
        yield executor


@pytest.mark.cluster
def test_results_come_in_order_from_all_nodes(executor: RayExecutor) -> None:
    names, processes = zip(*executor.map(Where(), ITEMS), strict=True)
    assert list(names) == NAMES
    assert len(set(processes)) == 2
    assert os.getpid() not in processes


@pytest.mark.cluster
def test_a_process_keeps_the_task_and_multiplies_on_one_core(executor: RayExecutor) -> None:
    assert {(unpickled, *cores) for _, unpickled, cores in executor.map(Counting(), ITEMS)} == {(1, 1)}


@pytest.mark.cluster
def test_the_work_of_a_lost_worker_is_done_again(
    executor: RayExecutor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = list(executor.map(LosesWorker(Where(), "item 3", tmp_path, times=2), ITEMS))
    assert [name for name, _ in found] == NAMES
    assert len(list(tmp_path.iterdir())) == 2
    assert capfd.readouterr().out == ""


@pytest.mark.cluster
def test_the_work_of_a_lost_node_is_done_again(cluster: Any, executor: RayExecutor, tmp_path: Path) -> None:
    try:
        found = list(executor.map(LosesWorker(Where(), "item 3", tmp_path, node=True), ITEMS))
    finally:
        (lost,) = [node for node in cluster.worker_nodes if not node.remaining_processes_alive()]
        cluster.remove_node(lost)
        add_node(cluster)
    assert [name for name, _ in found] == NAMES


@pytest.mark.cluster
def test_work_that_ends_every_worker_ends_the_run(
    executor: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "RETRIES", 1)
    with pytest.raises(
        BismoothError, match=r"item 3: the workers that worked on it were lost, 2 times: .*\. Look into"
    ):
        list(executor.map(LosesWorker(Where(), "item 3", tmp_path, times=9), ITEMS))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.cluster
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


@pytest.mark.cluster
def test_ctrl_c_ends_a_run_at_once(cluster: Any, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from bismooth.passes.ray_executor import connect; "
        "from tests.unit.test_ray_executor import Sleeps; from tests.cluster import ITEMS\n"
        f"with connect([]) as executor: list(executor.map(Sleeps(Path({str(tmp_path)!r})), ITEMS))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCES), str(ROOT)])}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE) as driver:
        while not list(tmp_path.glob("began *")):
            assert driver.poll() is None
            time.sleep(0.05)
        start = time.monotonic()
        driver.send_signal(signal.SIGINT)
        _, errors = driver.communicate()
    assert driver.returncode == -signal.SIGINT, errors.decode()
    assert errors.decode().strip().endswith("KeyboardInterrupt")
    assert time.monotonic() - start < 10
    assert {path.name for path in tmp_path.iterdir()} <= {"began item 0", "began item 1"}
    del cluster


@dataclass(frozen=True)
class Sleeps(Task):
    """Takes half a minute; leaves a file when it begins and when it ends."""

    folder: Path

    def __call__(self, item: Named) -> None:
        (self.folder / f"began {item.name}").touch()
        for _ in range(300):
            time.sleep(0.1)
        (self.folder / f"ended {item.name}").touch()


@pytest.mark.cluster
def test_paths_of_the_driver_are_those_of_the_workers(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cluster
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("file").write_text("text", "utf-8")
    with connect([Path("file")]) as executor:
        assert list(executor.map(Reads(Path("file")), ITEMS[:1])) == ["text"]


@dataclass(frozen=True)
class Reads(Task):
    """The result: what a file holds."""

    path: Path

    def __call__(self, _: Named) -> str:
        return self.path.read_text("utf-8")


@pytest.mark.cluster
def test_a_node_with_other_code_is_refused(cluster: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(SOURCES / "bismooth", tmp_path / "bismooth", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "passes" / "weights.py").open("a") as file:
        file.write("# another\n")
    node = add_node(cluster, tmp_path)
    message = rf"node {re.escape(socket.gethostname())} has another code of bismooth than the driver. Expected \w+, got"
    try:
        with pytest.raises(BismoothError, match=message), connect([]):
            pass
    finally:
        cluster.remove_node(node)


@pytest.mark.cluster
def test_a_node_without_this_package_is_refused(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "bismooth").mkdir()
    (tmp_path / "bismooth" / "__init__.py").touch()
    node = add_node(cluster, tmp_path)
    try:
        with pytest.raises(
            BismoothError, match=r"node .* cannot run bismooth: .*bismooth\.passes.*\. Install the same"
        ):
            with connect([]):
                pass
    finally:
        cluster.remove_node(node)


@pytest.mark.parametrize(
    ("path", "size", "got"), [("missing", 3, "'No such file or directory'"), ("file", 3, "4 bytes")]
)
def test_a_node_that_does_not_see_a_file_is_refused(tmp_path: Path, path: str, size: int, got: str) -> None:
    (tmp_path / "file").write_text("four", "utf-8")
    expected = {"machine": kind_of_machine(), "files": {str(tmp_path / path): size}}
    message = (
        f"{tmp_path / path}: is not the same file on node {socket.gethostname()}. Expected 3 bytes, got {got}. Put"
    )
    with pytest.raises(BismoothError, match=re.escape(message)):
        check_node(expected)


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (kind_of_machine() | {"numpy": "1.2"}, "has another numpy than the driver. Expected 1.2, got 2."),
        (kind_of_machine() | {"onnxruntime-gpu": "3"}, "has another onnxruntime-gpu than the driver. Expected 3, got"),
        ({}, "than the driver. Expected None, got"),
    ],
)
def test_a_node_that_computes_otherwise_is_refused(machine: dict[str, str], message: str) -> None:
    with pytest.raises(BismoothError, match=re.escape(message)):
        check_node({"machine": machine, "files": {}})


def test_without_ray_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BismoothError, match=re.escape("Install it with: pip install 'bismooth[ray]'")), connect([]):
        pass


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "RAY_ADDRESS=ray://head:10001: Expected HOST:PORT of the cluster's head"),
        ("127.0.0.1:1", "no Ray cluster that answers at RAY_ADDRESS=127.0.0.1:1 (Connection refused). Start one with"),
    ],
)
def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch, address: str, message: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(BismoothError, match=re.escape(message)), connect([]):
        pass


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Not found."), "no Ray cluster with a node on this machine (Not found). Start one with"),
        (RuntimeError("Version mismatch:\n  Ray: 1"), "cannot be used: Version mismatch: Ray: 1 Use the same Ray and"),
    ],
)
def test_a_cluster_that_cannot_be_joined(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(import_module("ray"), "init", init)
    with pytest.raises(BismoothError, match=re.escape(message)), connect([]):
        pass


@pytest.mark.cluster
def test_a_cluster_without_a_cpu_is_refused(executor: RayExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor.ray, "cluster_resources", lambda: {"memory": 1.0})
    with pytest.raises(BismoothError, match="the cluster has no CPU to work on. Expected nodes that offer some"):
        list(executor.map(Where(), ITEMS))


@pytest.mark.cluster
def test_a_connection_that_is_there_is_used_and_stays(cluster: Any) -> None:
    ray: Any = import_module("ray")
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        with connect([]) as executor:
            assert [name for name, _ in executor.map(Where(), ITEMS)] == NAMES
        assert ray.is_initialized()
    finally:
        ray.shutdown()
