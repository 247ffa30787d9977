"""Connecting to a Ray cluster: which one, what is refused before any work, and how a run ends."""

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
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes.ray_executor import connect
from bismooth.passes.ray_worker import check_node, kind_of_machine
from tests.cluster import ITEMS, ROOT, SOURCES, Named, Task, Where, add_node, remove_node

needs_ray = pytest.mark.cluster


@dataclass(frozen=True)
class Sleeps(Task):
    """Takes half a minute; leaves a file when it begins and when it ends."""

    folder: Path

    def __call__(self, item: Named) -> None:
        (self.folder / f"began {item.name}").touch()
        for _ in range(300):
            time.sleep(0.1)
        (self.folder / f"ended {item.name}").touch()


@dataclass(frozen=True)
class Reads(Task):
    """The result: what a file holds."""

    path: Path

    def __call__(self, _: Named) -> str:
        return self.path.read_text("utf-8")


@needs_ray
def test_ctrl_c_ends_a_run_at_once(cluster: Any, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from bismooth.passes.ray_executor import connect; "
        "from tests.unit.test_ray_connection import Sleeps; from tests.cluster import ITEMS\n"
        f"with connect([]) as executor: list(executor.map(Sleeps(Path({str(tmp_path)!r})), ITEMS))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCES), str(ROOT)])}
    environment["RAY_ADDRESS"] = cluster.address
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


@needs_ray
def test_the_handler_of_sigterm_stays(cluster: Any) -> None:
    del cluster
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with connect([]):
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@needs_ray
def test_paths_of_the_driver_are_those_of_the_workers(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cluster
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("text", "utf-8")
    with connect([Path("file")]) as executor:
        assert list(executor.map(Reads(Path("file")), ITEMS[:1])) == ["text"]


@needs_ray
def test_a_connection_that_is_there_is_used_and_stays(cluster: Any) -> None:
    ray: Any = import_module("ray")
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        with connect([]) as executor:
            assert [name for name, _ in executor.map(Where(), ITEMS)] == [item.name for item in ITEMS]
            assert executor.description == f"Ray cluster at {cluster.address}, nodes: 2, CPUs: 2"
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def with_other_code(folder: Path) -> str:
    copy = shutil.copytree(SOURCES / "bismooth", folder / "bismooth", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "passes" / "weights.py").open("a") as file:
        file.write("# another\n")
    return rf"node {re.escape(socket.gethostname())} has another code of bismooth than the driver\. Expected \w+, got"


def without_check(folder: Path) -> str:
    passes = folder / "bismooth" / "passes"
    passes.mkdir(parents=True)
    for module in (passes.parent / "__init__.py", passes / "__init__.py", passes / "ray_worker.py"):
        module.touch()
    return r"node .* cannot run bismooth: .*check_node.*\. Install the same"


@needs_ray
@pytest.mark.parametrize("sources", [with_other_code, without_check])
def test_a_node_with_another_bismooth_is_refused(cluster: Any, tmp_path: Path, sources: Any) -> None:
    message = sources(tmp_path)
    node = add_node(cluster, tmp_path)
    try:
        with pytest.raises(BismoothError, match=message), connect([]):
            pass
    finally:
        remove_node(cluster, node)


@pytest.mark.parametrize(("name", "got"), [("missing", "'No such file or directory'"), ("file", "4 bytes")])
def test_a_node_that_does_not_see_a_file_is_refused(tmp_path: Path, name: str, got: str) -> None:
    (tmp_path / "file").write_text("four", "utf-8")
    path, node = tmp_path / name, socket.gethostname()
    message = f"{path}: is not the same file on node {node}. Expected 3 bytes, got {got}. Put what is read and"
    with pytest.raises(BismoothError, match=re.escape(message)):
        check_node({"machine": kind_of_machine(), "files": {str(path): 3}})


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (kind_of_machine() | {"numpy": "1.2"}, "has another numpy than the driver. Expected 1.2, got 2."),
        (kind_of_machine() | {"ml_dtypes": "0.1"}, "has another ml_dtypes than the driver. Expected 0.1, got 0."),
        (kind_of_machine() | {"onnxruntime-gpu": "3"}, "another onnxruntime-gpu than the driver. Expected 3, got None"),
        (kind_of_machine() | {"kind of CPU": "X86_V3"}, "another kind of CPU than the driver. Expected X86_V3, got"),
    ],
)
def test_a_node_that_computes_otherwise_is_refused(machine: dict[str, str], message: str) -> None:
    with pytest.raises(BismoothError, match=re.escape(message)):
        check_node({"machine": machine, "files": {}})


def test_without_ray_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(_: str) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(BismoothError, match=re.escape("Install it with: pip install 'bismooth[ray]'")), connect([]):
        pass


@needs_ray
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


@needs_ray
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Not found."), "no Ray cluster with a node on this machine (Not found). Start one with"),
        (
            RuntimeError("Version mismatch:\n  Ray: 1."),
            "cannot be used: Version mismatch: Ray: 1. Use the same Ray and",
        ),
    ],
)
def test_a_cluster_that_cannot_be_joined(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(import_module("ray"), "init", init)
    with pytest.raises(BismoothError, match=re.escape(message)), connect([]):
        pass
