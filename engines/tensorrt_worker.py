"""Build engines in a process of their own (:mod:`.child_process`), and talk to it.

A killed caller leaves neither a running builder nor files.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..export.errors import BismoothError
from .base import Phase, PhaseCallback, shapes_from_json
from .child_process import ProcessEndedError, Request, Tell, ask, last_words, serve
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

    def tell(phase: list[Any]) -> None:
        if on_phase:
            on_phase(Phase(*phase))

    try:
        done = ask("bismooth.engines.tensorrt_worker", "the builder process", asdict(request), tell)
    except ProcessEndedError as end:
        raise _crash(request, end) from end
    shapes = tuple(map(shapes_from_json, done["shapes"]))
    return PlanReport(done["version"], tuple(done["capabilities"]), shapes, done["peak_rss"])


def _crash(request: PlanRequest, end: ProcessEndedError) -> BismoothError:
    log = Path(request.log)
    logged = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    return BismoothError(
        f"{request.onnx}: {request.runtime} crashed while building the engine ({end.how}). {end.hint}"
        f"Its last words: {last_words([*logged[-_TAIL_LINES:], *end.printed])}. "
        "Try another version of it, or a smaller part of the graph to find the node."
    )


def main() -> None:
    """Serve one request; the entry point of the builder process."""
    serve(_build, _leave_nothing)


def _build(fields: Request, tell: Tell) -> dict[str, Any]:
    request = _read_request(fields)
    runtime = RUNTIMES[request.runtime]
    try:
        report = build_plan(
            load_module(runtime), runtime, request, lambda phase: tell([phase.name, phase.done, phase.total])
        )
    except OSError as error:
        raise BismoothError(
            f"{request.onnx}: the engine cannot be written: {error}. Choose a folder on a disk with enough space."
        ) from error
    return asdict(report)


def _read_request(fields: Request) -> PlanRequest:
    profiles = tuple({name: tuple(sizes) for name, sizes in spans.items()} for spans in fields["profiles"])
    tuples: dict[str, Any] = {"capabilities": tuple(fields["capabilities"]), "profiles": profiles}
    return PlanRequest(**fields | tuples)


def _leave_nothing(request: Request) -> None:
    for file in filter(None, (request["plan"], request["log"], request["graph"])):
        Path(file).unlink(missing_ok=True)
    with suppress(OSError):
        Path(request["plan"]).parent.rmdir()


if __name__ == "__main__":
    main()
