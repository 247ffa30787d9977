"""A task in a process of its own: one JSON line with the request in, JSON lines out.

The process reads the request from stdin and answers on stdout: ``progress`` any number of times, then one of ``done``,
``error`` (a message for the user) and ``bug`` (a traceback). Whatever else it prints goes to stderr, which the caller
keeps to itself. It ends when its stdin does, so a killed caller leaves no process behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, TypeAlias, cast

from ..export.errors import BismoothError
from .answers import claim_stdout, leave_signals_to_caller

Request: TypeAlias = dict[str, Any]
Tell: TypeAlias = Callable[[Any], None]
_TAIL_LINES = 3


@dataclass
class ProcessEndedError(Exception):
    """The process ended without an answer.

    Attributes:
        how: the signal's name, or the exit status.
        printed: the last lines that it has printed.
    """

    how: str
    printed: list[str]

    @property
    def hint(self) -> str:
        """The likely reason, as a sentence with a space behind it; empty where there is none."""
        return "The system ended it, most likely for lack of memory. " if self.how == "SIGKILL" else ""


def ask(module: str, name: str, request: Mapping[str, Any], on_progress: Tell) -> Any:
    """Let ``python -m module``, which calls :func:`serve`, do a task; what it is done with, as plain data.

    Raises:
        BismoothError: what the task has raised.
        ProcessEndedError: the process ended without an answer.
        RuntimeError: a bug in this package, with the traceback of the process, which is called ``name``.
    """
    with tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            encoding="utf-8",
        )
        try:
            answer = _converse(process, request, on_progress)
        finally:
            process.kill()
            status = process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    cast(IO[str], pipe).close()
        if answer is None:
            raise _ended(status, noise)
    if "bug" in answer:
        raise RuntimeError(f"{name} failed:\n{answer['bug']}")
    if "error" in answer:
        raise BismoothError(answer["error"])
    return answer["done"]


def _converse(process: subprocess.Popen[str], request: Mapping[str, Any], on_progress: Tell) -> dict[str, Any] | None:
    """The final answer, or ``None`` if the process ended without one."""
    requests, answers = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
    with suppress(BrokenPipeError):
        requests.write(json.dumps(request) + "\n")
        requests.flush()
    for line in answers:
        answer = cast(dict[str, Any], json.loads(line))
        if "progress" not in answer:
            process.wait()
            return answer
        on_progress(answer["progress"])
    process.wait()
    return None


def _ended(status: int, noise: IO[bytes]) -> ProcessEndedError:
    noise.seek(0)
    printed = noise.read().decode("utf-8", "replace").splitlines()[-_TAIL_LINES:]
    how = signal.Signals(-status).name if -status in set(signal.Signals) else f"exit status {status}"
    return ProcessEndedError(how, printed)


def last_words(lines: list[str]) -> str:
    """Lines that a process has printed, in one for a message; ``none`` if there are none."""
    words = (line.strip().rstrip(".")[:200] for line in lines)
    return " | ".join(filter(None, words)) or "none"


def serve(task: Callable[[Request, Tell], Any], abandon: Callable[[Request], None] | None = None) -> None:
    """Serve one request; to be called by the process's entry point.

    Args:
        task: takes the request and what tells of progress; raises :class:`BismoothError` for the user.
        abandon: told the request before the process ends because its caller did.
    """
    leave_signals_to_caller()
    answers = claim_stdout()
    request: Request = json.loads(sys.stdin.readline())

    def end_with_caller() -> None:
        sys.stdin.read()
        if abandon is not None:
            abandon(request)
        os._exit(1)

    def answer(kind: str, content: object) -> None:
        with suppress(BrokenPipeError):
            print(json.dumps({kind: content}), file=answers, flush=True)

    threading.Thread(target=end_with_caller, daemon=True).start()
    try:
        answer("done", task(request, lambda told: answer("progress", told)))
    except BismoothError as error:
        answer("error", str(error))
    except Exception:  # a defect: the caller shows it
        answer("bug", traceback.format_exc())
