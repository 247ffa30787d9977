"""The nodes of a Ray cluster do the work of a step (https://docs.ray.io).

The task and the items go to the workers, the results come back; what they read and write lies on storage that all nodes
have mounted at the same place. A call whose worker is lost is made again elsewhere, and writes the same bytes.

NOTE: Ray reads its environment when it is imported. So :data:`_SETTINGS` stand there before.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import pickle
import re
import signal
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ..export.errors import BismoothError
from .executor import ItemT, ResultT, Work
from .parallel import ordered_map
from .ray_worker import call, check_node, kind_of_machine

RETRIES = 8
"""How often a call is made again after its worker was lost, or was ended for want of memory."""

AHEAD = 2
"""Calls in flight per CPU of the cluster: one runs, the next is already where it will run."""

_SETTINGS = {"RAY_DEDUP_LOGS_SKIP_REGEX": "."}
"""What Ray tells of lost workers goes to stdout, where results alone belong: it is dropped."""

_PATIENCE = 10.0
"""Seconds that calls which are not wanted any more get to end."""


@contextmanager
def connect(files: Iterable[Path], *, whole_nodes: bool = False, memory: int | None = None) -> Generator[RayExecutor]:
    """Connect to the cluster at ``RAY_ADDRESS``, or to the one that has a node on this machine; none is started.

    A connection that this process already has is used, and stays.

    Args:
        files: What the tasks will read and write, if it is there already. Every node must see it.
        whole_nodes: A call gets all CPUs and the memory that the smallest node has, instead of one CPU.
        memory: Bytes that a call gets otherwise; nodes that offer less get none. None for any number.

    Raises:
        BismoothError: Ray is not installed, there is no cluster or one of another version, no node is large enough, or
            one has another bismooth, other libraries, another kind of CPU, or does not see a file.
    """
    ray = _load()
    connected: bool = ray.is_initialized()
    if not connected:
        _initialize(ray)
    try:
        executor = RayExecutor(ray, _expected(files), memory=memory)
        executor.check_nodes()
        yield executor.with_whole_nodes() if whole_nodes else executor
    finally:
        if not connected:
            ray.shutdown()


@dataclass(frozen=True, eq=False)
class RayExecutor:
    """Makes the calls of a task on a cluster, see :class:`.executor.Executor`.

    Attributes:
        ray: The module, connected.
        expected: What :func:`.ray_worker.check_node` expects.
        cpus: CPUs that a call gets.
        memory: Bytes that a call gets; None for any number.
    """

    ray: Any
    expected: dict[str, Any]
    cpus: int = 1
    memory: int | None = None

    @property
    def description(self) -> str:
        """Which cluster it is, in a line."""
        address = self.ray.get_runtime_context().gcs_address
        return f"Ray cluster at {address}, nodes: {len(self._nodes())}, CPUs: {self._cpus()}"

    def with_whole_nodes(self) -> RayExecutor:
        """The same, with the CPUs and the memory for each call that the smallest node has."""
        offered = [node["Resources"] for node in self._nodes()]
        cpus, memory = (min(int(resources[name]) for resources in offered) for name in ("CPU", "memory"))
        return replace(self, cpus=cpus, memory=memory)

    def map(self, task: Work[ItemT, ResultT], items: Iterable[ItemT], /) -> Iterator[ResultT]:
        """The results, in the order of the items.

        A single item gains nothing by travelling. It is worked on here, and a file that it makes is seen here at once,
        which NFS does not promise if another machine makes it.

        Raises:
            BismoothError: a call raised it, a call was lost :data:`RETRIES` times and once more, or no node is left.
        """
        listed = list(items)
        return ordered_map(task, listed) if len(listed) == 1 else self._spread(task, listed)

    def _spread(self, task: Work[ItemT, ResultT], items: Iterable[ItemT]) -> Iterator[ResultT]:
        pickled = pickle.dumps(task)
        digest, shared = hashlib.sha256(pickled).hexdigest(), [self.ray.put((self.expected, pickled))]
        remote = self.ray.remote(call).options(
            name=task.step, num_cpus=self.cpus, memory=self.memory, max_retries=0, scheduling_strategy="SPREAD"
        )
        calls: deque[_Call] = deque()
        try:
            for item in items:
                calls.append(_Call(item.name, partial(remote.remote, digest, shared, pickle.dumps(item))))
                if len(calls) > AHEAD * self._cpus() / self.cpus:
                    yield self._first(calls)
                    calls.popleft()
            while calls:
                yield self._first(calls)
                calls.popleft()
        finally:
            self._cancel([call.reference for call in calls if not call.ended])

    def _first(self, calls: Sequence[_Call]) -> Any:
        """The result of the first of these calls; meanwhile any that is lost is made again."""
        while not calls[0].ended:
            pending = {call.reference: call for call in calls if not call.ended}
            ready, _ = self.ray.wait(list(pending), timeout=_PATIENCE)
            if not ready:
                self._cpus()
            for reference in ready:
                self._end(pending[reference])
        if calls[0].error is not None:
            raise calls[0].error
        return calls[0].result

    def _end(self, call: _Call) -> None:
        try:
            call.result = self.ray.get(call.reference)
        except self.ray.exceptions.RayTaskError as error:
            cause: Exception = error.cause
            cause.__cause__ = error  # it has the traceback
            call.error = cause
        except self.ray.exceptions.RayError as error:
            if call.losses < RETRIES:
                call.make_again()
                return
            call.error = BismoothError(
                f"{call.name}: the workers that worked on it were lost, {call.losses + 1} times: {_first_line(error)}. "
                "Look into Ray's logs there; if memory ran out, start the nodes with fewer CPUs (ray start --num-cpus)."
            )
        call.ended = True

    def check_nodes(self) -> None:
        """Run :func:`.ray_worker.check_node` on each node that can take a call.

        Raises:
            BismoothError: there is none, or something is not as expected there; the message names the node.
        """
        self._cpus()
        strategy = import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        nodes = self._nodes()
        remote = self.ray.remote(check_node)
        checks = [
            remote.options(num_cpus=0, scheduling_strategy=strategy(node["NodeID"], soft=False)).remote(self.expected)
            for node in nodes
        ]
        for node, check in zip(nodes, checks, strict=True):
            try:
                self.ray.get(check)
            except self.ray.exceptions.RayError as error:
                if isinstance(cause := getattr(error, "cause", None), BismoothError):
                    raise cause from error
                raise BismoothError(
                    f"--executor ray: node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}) cannot run "
                    f"bismooth: {_last_line(error)}. Install the same bismooth there, with the extras compile and ray."
                ) from error

    def _nodes(self) -> list[dict[str, Any]]:
        """Those that can take a call."""
        needed = {"CPU": self.cpus, "memory": self.memory or 0}
        return [
            node
            for node in self.ray.nodes()
            if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in needed.items())
        ]

    def _cpus(self) -> int:
        """The CPUs that nodes have now which can take a call.

        Raises:
            BismoothError: there is none.
        """
        cpus = sum(int(node["Resources"]["CPU"]) for node in self._nodes())
        if not cpus:
            memory = "" if self.memory is None else f" and {self.memory} bytes of memory (--memory)"
            raise BismoothError(
                f"--executor ray: the cluster has no node to work on. Expected nodes that offer a CPU{memory}: start "
                "them with 'ray start --address=HOST:PORT', then run the command again."
            )
        return cpus

    def _cancel(self, references: list[Any]) -> None:
        for reference in references:
            self.ray.cancel(reference)
        if references:
            self.ray.wait(references, num_returns=len(references), timeout=_PATIENCE)


@dataclass(eq=False)
class _Call:
    """A call of a task.

    NOTE: Ray can make lost calls again by itself (``max_retries``). Release 2.60 at times makes one twice, and ends the
    driver when the second one succeeds.

    Attributes:
        name: Of the item.
        make: Makes it.
        reference: Of the result.
        losses: How often it was lost.
        ended: Whether there is a result or an error.
        result: What came out.
        error: What it raised.
    """

    name: str
    make: Callable[[], Any]
    reference: Any = field(init=False)
    losses: int = 0
    ended: bool = False
    result: Any = None
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self.reference = self.make()

    def make_again(self) -> None:
        self.losses += 1
        self.reference = self.make()


def _load() -> Any:
    if importlib.util.find_spec("ray") is None:
        raise BismoothError(
            "--executor ray: the Python package 'ray' is not installed. Install it with: pip install 'bismooth[ray]'"
        )
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    return import_module("ray")


def _initialize(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        if address not in ("", "auto", "local"):
            _require_answer(address)
        with _own_sigterm():
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, TimeoutError) as error:
        where = f"that answers at RAY_ADDRESS={address}" if address else "with a node on this machine"
        raise BismoothError(
            f"--executor ray: there is no Ray cluster {where} ({_last_line(error)}). Start one with 'ray start --head' "
            "here and 'ray start --address=HOST:PORT' on the other nodes, or leave the option out."
        ) from error
    except RuntimeError as error:  # another version of Ray or of Python
        raise BismoothError(
            f"--executor ray: the cluster cannot be used: {' '.join(str(error).split())} Use the same Ray and Python "
            "on all nodes."
        ) from error


@contextmanager
def _own_sigterm() -> Generator[None]:
    """Keep the handler of SIGTERM, which ``ray.init`` replaces by one that ends the process without a word."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) != handler:
            signal.signal(signal.SIGTERM, handler)


def _require_answer(address: str) -> None:
    """Try to reach a head: Ray itself would try for more than a minute."""
    match = re.fullmatch(r"\[?([^/\]]+)\]?:(\d+)", address)
    if not match:
        raise BismoothError(
            f"RAY_ADDRESS={address}: Expected HOST:PORT of the cluster's head, from a machine that is one of its nodes "
            "(no ray://)."
        )
    try:
        socket.create_connection((match[1], int(match[2])), timeout=_PATIENCE).close()
    except OSError as error:
        raise ConnectionError(error.strerror or error) from error


def _expected(files: Iterable[Path]) -> dict[str, Any]:
    return {
        "machine": kind_of_machine(),
        "files": {str(file.absolute()): file.stat().st_size for file in files},
        "folder": str(Path.cwd()),
    }


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2].rstrip(".")
