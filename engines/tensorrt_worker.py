"""Build engines in a process of their own, and talk to it.

The builder process reads one JSON line, the request, from stdin and answers with JSON lines on stdout: ``phase``, then
one of ``done``, ``error`` (a message for the user) and ``bug`` (a traceback). Whatever TensorRT prints goes to stderr,
which the caller keeps to itself. The process ends when its stdin does, so a killed caller leaves neither a running
builder nor files.
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
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

from ..export.errors import BismoothError
from .answers import claim_stdout
from .base import Phase, PhaseCallback, shapes_from_json
from .tensorrt_build import PlanReport, PlanRequest, build_plan
from .tensorrt_runtime import RUNTIMES, load_module

_TAIL_LINES = 3


def run_worker(request: PlanRequest, on_phase: PhaseCallback | None = None) -> PlanReport:
    """Build the engine in a new process; files are as :func:`.tensorrt_build.build_plan` says.

    If this process is killed, the builder process deletes its files and their folder, if nothing else is in it.

    Raises:
        BismoothError: the build is not possible, or the builder process crashed.
        RuntimeError: a bug in this package, with the traceback of the builder process.
    """
    command = [sys.executable, "-P", "-m", "bismooth.engines.tensorrt_worker"]
    with tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, text=True, encoding="utf-8"
        )
        try:
            answer = _converse(process, request, on_phase)
        finally:
            process.kill()
            status = process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    cast(IO[str], pipe).close()
        if answer is None:
            raise _crash(request, status, noise)
    return _report(answer)


def _converse(
    process: subprocess.Popen[str], request: PlanRequest, on_phase: PhaseCallback | None
) -> dict[str, Any] | None:
    """The final answer, or ``None`` if the process ended without one."""
    requests, answers = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
    with suppress(BrokenPipeError):
        requests.write(json.dumps(asdict(request)) + "\n")
        requests.flush()
    for line in answers:
        answer = cast(dict[str, Any], json.loads(line))
        if "phase" not in answer:
            process.wait()
            return answer
        if on_phase:
            on_phase(Phase(*answer["phase"]))
    process.wait()
    return None


def _report(answer: dict[str, Any]) -> PlanReport:
    if "bug" in answer:
        raise RuntimeError(f"the builder process failed:\n{answer['bug']}")
    if "error" in answer:
        raise BismoothError(answer["error"])
    done = answer["done"]
    shapes = tuple(map(shapes_from_json, done["shapes"]))
    return PlanReport(done["version"], tuple(done["capabilities"]), shapes, done["peak_rss"])


def _crash(request: PlanRequest, status: int, noise: IO[bytes]) -> BismoothError:
    noise.seek(0)
    printed = noise.read().decode("utf-8", "replace").splitlines()
    log = Path(request.log)
    logged = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    lines = (line.strip().rstrip(".") for line in [*logged[-_TAIL_LINES:], *printed[-_TAIL_LINES:]])
    last = " | ".join(line[:200] for line in lines if line)
    how = signal.Signals(-status).name if -status in set(signal.Signals) else f"exit status {status}"
    hint = "The system ended it, most likely for lack of memory. " if how == "SIGKILL" else ""
    return BismoothError(
        f"{request.onnx}: {request.runtime} crashed while building the engine ({how}). {hint}"
        f"Its last words: {last or 'none'}. "
        "Try another version of it, or a smaller part of the graph to find the node."
    )


def main() -> None:
    """Serve one request; the entry point of the builder process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who then ends this process
    answers = claim_stdout()
    request = _read_request(sys.stdin.readline())
    threading.Thread(target=_end_with_caller, args=[request], daemon=True).start()

    def answer(kind: str, content: object) -> None:
        with suppress(BrokenPipeError):
            print(json.dumps({kind: content}), file=answers, flush=True)

    try:
        runtime = RUNTIMES[request.runtime]
        report = build_plan(
            load_module(runtime), runtime, request, lambda phase: answer("phase", [phase.name, phase.done, phase.total])
        )
        answer("done", asdict(report))
    except BismoothError as error:
        answer("error", str(error))
    except OSError as error:
        answer(
            "error",
            f"{request.onnx}: the engine cannot be written: {error}. Choose a folder on a disk with enough space.",
        )
    except Exception:  # a defect: the parent process shows it
        answer("bug", traceback.format_exc())


def _read_request(line: str) -> PlanRequest:
    fields: dict[str, Any] = json.loads(line)
    profiles = tuple({name: tuple(sizes) for name, sizes in spans.items()} for spans in fields["profiles"])
    fields |= {"capabilities": tuple(fields["capabilities"]), "profiles": profiles}
    return PlanRequest(**fields)


def _end_with_caller(request: PlanRequest) -> None:
    """Wait for the caller's end, then leave nothing behind."""
    sys.stdin.read()
    for file in filter(None, (request.plan, request.log, request.graph)):
        Path(file).unlink(missing_ok=True)
    with suppress(OSError):
        Path(request.plan).parent.rmdir()
    os._exit(1)


if __name__ == "__main__":
    main()
