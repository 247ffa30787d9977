"""An engine in a process of its own (:mod:`.bench_worker`), seen from the process that measures."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from .bench_timing import Timing

_TAIL_BYTES = 500


@dataclass(frozen=True)
class Opened:
    """What is known of an engine once it is open; ``seconds`` are those that opening it took."""

    seconds: float
    vocab_size: int
    capacity: int


class EngineProcess:
    """A process with an open engine; a context manager, which ends it.

    Attributes:
        opened: what the process said of the engine.
        peak_rss: resident memory of the process in bytes, the most until its last answer; ``None`` if not told.

    Raises:
        BismoothError: the engine cannot be opened.
    """

    def __init__(self, path: Path, threads: int | None) -> None:
        self._path = path
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115 close() closes it
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "bismooth.tools.bench_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._noise,
            text=True,
            encoding="utf-8",
        )
        self.peak_rss: int | None = None
        try:
            answer = self._ask({"open": {"path": str(path), "threads": threads}})
        except BaseException:  # an interrupt too: nobody else would end the process
            self.close()
            raise
        self.opened = Opened(**answer["opened"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def time(self, ids: NDArray[np.int64], new_tokens: int) -> Timing:
        """See :func:`.bench_timing.time_run`.

        Raises:
            BismoothError: the engine failed, or its process ended.
            RuntimeError: a bug in this package, with the traceback of the process.
        """
        timed = self._ask({"time": {"ids": ids.tolist(), "new_tokens": new_tokens}})["timed"]
        self.peak_rss = timed["peak_rss"]
        return Timing(timed["prefill"], timed["first_token"], tuple(timed["tokens"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._noise):
            with suppress(OSError):
                cast(IO[Any], stream).close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        requests, answers = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        with suppress(BrokenPipeError):
            requests.write(json.dumps(request) + "\n")
            requests.flush()
        line = answers.readline()
        if not line:
            raise self._crash()
        answer: dict[str, Any] = json.loads(line)
        if "bug" in answer:
            raise RuntimeError(f"the process of an engine failed:\n{answer['bug']}")
        if "error" in answer:
            raise BismoothError(answer["error"])
        return answer

    def _crash(self) -> BismoothError:
        status = self._process.wait()
        how = signal.Signals(-status).name if -status in set(signal.Signals) else f"exit status {status}"
        hint = " The system ended it, most likely for lack of memory: open --one-at-a-time." if how == "SIGKILL" else ""
        self._noise.seek(0)
        printed = " ".join(self._noise.read()[-_TAIL_BYTES:].decode("utf-8", "replace").split())
        return BismoothError(
            f"{self._path}: the process of the engine ended ({how}).{hint} Its last words: {printed or 'none'}."
        )
