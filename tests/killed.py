"""Run a command again and again, each time killed at a random moment, until it was killed so many times.

``python tests/killed.py KILLS OUTPUT COMMAND…`` runs the command to its end, and keeps what it has made at OUTPUT for
comparison. Then it forks a process per run and kills it, as ``kill -9`` does, within the time that the first run took.
A run that comes through has made OUTPUT, a folder or a report, which is then removed: the next one begins anew. After
the last kill, one run is left alone. It writes one line of JSON per run: the exit status (negative: the signal), what
was said on stderr, and, of a run that came through, the files that differ from those of the first.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from bismooth.export.artifact import MANIFEST


def start(command: list[str], errors: int) -> int:
    """The process of ``bismooth COMMAND…``."""
    child = os.fork()
    if child == 0:
        os.dup2(errors, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        from bismooth.tools.cli import main

        status = main(command)
        sys.stderr.flush()
        os._exit(status)
    return child


def run(command: list[str], seconds: float | None) -> tuple[int, str, float]:
    """Exit status, stderr and duration; after ``seconds`` it is killed."""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        child = start(command, errors.fileno())
        ended, result = 0, 0
        while seconds is not None and not ended and time.monotonic() - begin < seconds:
            time.sleep(0.002)
            ended, result = os.waitpid(child, os.WNOHANG)
        if not ended:
            if seconds is not None:
                os.kill(child, signal.SIGKILL)
            _, result = os.waitpid(child, 0)
        errors.seek(0)
        return os.waitstatus_to_exitcode(result), errors.read(), time.monotonic() - begin


def contents(output: Path) -> dict[str, Any]:
    """All files, hidden ones too; of the manifest, and of a report, all but times."""
    if output.is_file():
        report = json.loads(output.read_text("utf-8"))
        for hop in report["hops"]:
            del hop["seconds"]
        return report
    files: dict[str, Any] = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*")}
    manifest = json.loads(files[MANIFEST])
    for record in manifest["stages"][-1]["passes"]:
        del record["seconds"]
    return files | {MANIFEST: manifest}


def remove(output: Path) -> None:
    if output.is_file():
        output.unlink()
    else:
        shutil.rmtree(output)


def main(kills: int, output: Path, command: list[str]) -> None:
    import_module("bismooth.tools.stages")  # what every child needs is imported once
    import_module("bismooth.passes.quantize")
    import_module("bismooth.tools.verify")
    resuming: Any = import_module("bismooth.passes.resuming")
    resuming.COLLECT_SECONDS = 0.01  # the models of tests take a second
    status, errors, duration = run(command, None)
    assert status == 0, errors
    expected = contents(output)
    remove(output)
    moments = random.Random(0)
    while kills >= 0:  # the last one is left alone
        status, errors, _ = run(command, moments.uniform(0, duration) if kills else None)
        kills -= status < 0 or not kills
        differing = None
        if output.exists():
            found = contents(output)
            differing = sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name))
            remove(output)
        print(json.dumps({"status": status, "errors": errors, "differing": differing}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
