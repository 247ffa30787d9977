"""Run a command again and again, each time stopped at another of its changes to the file system.

``python tests/interrupted.py kill|full WATCHED COMMAND…`` forks a process per run. In run n, the n-th change below the
folder WATCHED does not happen: ``kill`` ends the process there as ``kill -9`` does, ``full`` makes it and all later
ones fail as on a full disk. It writes one line of JSON per run: the exit status (negative: the signal), what was said
on stderr, all files with their hashes and times, and what the artifacts list that load. The last run is the one that
came through.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

CHANGES = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.copyfile")
NEEDS_SPACE = ("open", "os.mkdir", "os.link", "shutil.copyfile")


class Interrupt:
    """An audit hook that stops at the n-th change below ``root``, counted from 1."""

    def __init__(self, root: str, number: int, mode: str) -> None:
        self.root, self.left, self.mode = root, number, mode

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._is_change(event, args):
            return
        self.left -= 1
        if self.left > 0:
            return
        if self.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if event in NEEDS_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _is_change(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "ctypes.dlsym":
            return str(args[1]) == "renameat2"
        if event == "open":
            path, _, flags = args
            return flags & (os.O_WRONLY | os.O_RDWR) != 0 and self._inside(path)
        if event in ("os.remove", "os.rmdir"):
            path, descriptor = args
            return self._inside(path if descriptor == -1 else Path(f"/proc/self/fd/{descriptor}").readlink() / path)
        return event in CHANGES and any(self._inside(path) for path in args)

    def _inside(self, path: Any) -> bool:
        return isinstance(path, str | Path) and str(Path(path).absolute()).startswith(self.root)


def run(root: str, number: int, mode: str, command: list[str]) -> tuple[int, str]:
    """Run ``bismooth COMMAND…`` in a child; its exit status and stderr."""
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.addaudithook(Interrupt(root, number, mode))
            from bismooth.tools.cli import main

            try:
                status: Any = main(command)
            except SystemExit as exit:
                status = exit.code
            sys.stderr.flush()
            os._exit(status or 0)
        _, result = os.waitpid(child, 0)
        errors.seek(0)
        return os.waitstatus_to_exitcode(result), errors.read()


def snapshot(root: Path) -> dict[str, tuple[str, int]]:
    """Path → SHA-256 and time of the last modification, of all files."""
    return {
        str(path.relative_to(root)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def artifacts(root: Path) -> dict[str, list[str] | None]:
    """Folder → the files that its manifest lists, or None if it does not load."""
    from bismooth.export.artifact import Artifact
    from bismooth.export.errors import BismoothError

    result: dict[str, list[str] | None] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        try:
            result[folder.name] = sorted(Artifact.load(folder).manifest.files)
        except BismoothError:
            result[folder.name] = None
    return result


def main(mode: str, root: str, *command: str) -> None:
    for module in ("bismooth.passes.quantize", "bismooth.tools.stages"):  # what every child needs is imported once
        import_module(module)
    number = 0
    status = -1
    while status != 0:
        number += 1
        status, errors = run(root, number, mode, list(command))
        found = {"files": snapshot(Path(root)), "artifacts": artifacts(Path(root))}
        print(json.dumps({"status": status, "errors": errors, **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
