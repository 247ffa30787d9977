"""A Ray cluster on this machine, and tasks that show what becomes of them there."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

import bismooth

ROOT = Path(__file__).parents[1]
SOURCES = Path(bismooth.__file__).parents[1]

_LEAN = {
    "object_store_memory": 80 << 20,
    "include_dashboard": False,
    "include_log_monitor": False,
    "no_monitor": True,
}
_HEALTH = {"health_check_period_ms": 1000}
"""A node that died is missed after five seconds, instead of fifteen. One that is slow has as long as ever."""


def cluster_available() -> str:
    """Why no Ray cluster can be started; nothing if one can."""
    return "" if find_spec("ray") else "ray is not installed"


@contextmanager
def running_cluster() -> Generator[Any]:
    """A ``ray.cluster_utils.Cluster`` of a head that does no work and two nodes of a CPU each."""
    with TemporaryDirectory(prefix="ray-") as folder:  # its name is short: paths of sockets may have 107 bytes
        settings = {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
        with _environment(settings):
            cluster = import_module("ray.cluster_utils").Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": 0, "_system_config": _HEALTH, **_LEAN},
            )
            cluster.settings = settings
        try:
            add_node(cluster)
            add_node(cluster)
            yield cluster
        finally:
            cluster.shutdown()


def add_node(cluster: Any, sources: Path = SOURCES) -> Any:
    """Start a node with one CPU, whose workers import bismooth from ``sources``."""
    with _environment({**cluster.settings, "PYTHONPATH": os.pathsep.join([str(sources), str(ROOT)])}):
        return cluster.add_node(num_cpus=1, **_LEAN)


def remove_node(cluster: Any, node: Any) -> None:
    """End a node, which may have died before, and wait until the cluster knows."""
    cluster.remove_node(node)
    cluster.wait_for_nodes()


@contextmanager
def _environment(variables: dict[str, str]) -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@dataclass(frozen=True)
class Named:
    """An item."""

    name: str


ITEMS = [Named(f"item {number}") for number in range(12)]


class Task:
    """What these tasks have in common."""

    @property
    def step(self) -> str:
        """Name of the step."""
        return "toy"


@dataclass(frozen=True)
class Where(Task):
    """The result: the item's name, and the process that worked on it."""

    def __call__(self, item: Named) -> tuple[str, int]:
        time.sleep(0.05)
        return item.name, os.getpid()


@dataclass(frozen=True)
class LosesWorker(Task):
    """Does the work of ``task``, and then loses its worker, or all of its node, before anyone has the result.

    Attributes:
        task: Does the work.
        victim: Name of the item that it happens at.
        folder: Gets a file each time that it happens.
        times: How often it happens.
        node: Whether the node goes as well.
        driver: The process that must not be lost.
    """

    task: Any
    victim: str
    folder: Path
    times: int = 1
    node: bool = False
    driver: int = field(default_factory=os.getpid)

    def __call__(self, item: Any) -> Any:
        result = self.task(item)
        lost = len(list(self.folder.glob("lost-*")))
        if item.name == self.victim and lost < self.times and os.getpid() != self.driver:
            (self.folder / f"lost-{lost}").touch()
            if self.node:
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return result
