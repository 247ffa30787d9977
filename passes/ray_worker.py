"""What a worker of a Ray cluster does. It computes for a driver on another machine, and must not compute otherwise.

NOTE: nothing of this package is unpickled before it is known to be the driver's.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ..export.durable import writing_through
from ..export.errors import BismoothError
from ..export.fingerprint import code_sha256
from ..export.machine import kind_of_cpu
from ..export.versions import tool_versions
from .parallel import one_core

_COMPUTE = ("python", "bismooth", "numpy", "ml_dtypes", "onnxruntime", "onnxruntime-gpu")
"""Packages whose code computes results."""

_TASK: dict[str, Any] = {}
"""The task that this process works on, by its digest."""


def call(digest: str, shared: Sequence[Any], item: bytes) -> Any:
    """Call a task. What it has written is on disk when this returns.

    Args:
        digest: Tells the task from others.
        shared: One reference to what :func:`check_node` expects and the pickled task. In a sequence, it is not resolved
            for every call.
        item: The pickled item.

    Raises:
        BismoothError: as :func:`check_node`, which looks at each process once per task.
    """
    if digest not in _TASK:
        expected, pickled = import_module("ray").get(shared[0])
        check_node(expected)
        _TASK.clear()
        with suppress(OSError):  # only relative paths need it
            os.chdir(expected["folder"])
        _TASK[digest] = pickle.loads(pickled)
    with one_core(), writing_through():
        return _TASK[digest](pickle.loads(item))


def check_node(expected: Mapping[str, Any]) -> None:
    """Compare this process with the driver.

    Args:
        expected: ``machine``, the driver's :func:`kind_of_machine`; ``files``, path → size.

    Raises:
        BismoothError: something differs, or a file is not there; the message names the node.
    """
    node = socket.gethostname()
    wanted, found = expected["machine"], kind_of_machine()
    for what in {**wanted, **found}:
        if found.get(what) != wanted.get(what):
            raise BismoothError(
                f"--executor ray: node {node} has another {what} than the driver. Expected {wanted.get(what)}, got "
                f"{found.get(what)}: results would not be the same bytes. Install the same there, or leave that node "
                "out of the cluster."
            )
    for path, size in expected["files"].items():
        try:
            got = f"{Path(path).stat().st_size} bytes"
        except OSError as error:
            got = f"'{error.strerror}'"
        if got != f"{size} bytes":
            raise BismoothError(
                f"{path}: is not the same file on node {node}. Expected {size} bytes, got {got}. Put what is read and "
                "written on storage that all nodes have mounted at the same place."
            )


@cache
def kind_of_machine() -> dict[str, str]:
    """What decides the last bits of results: this package's code, libraries, and the instructions of the CPU."""
    versions = tool_versions()
    packages = {name: versions[name] for name in _COMPUTE if name in versions}
    return {**packages, "code of bismooth": code_sha256()[:12], **kind_of_cpu()}
