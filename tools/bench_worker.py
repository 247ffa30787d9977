"""A process that holds one engine and times it, so that its memory is its own and others wait in theirs.

It reads JSON lines from stdin and answers each with one on stdout: ``opened`` or ``timed``, ``error`` (a message for
the user), or ``bug`` (a traceback). It ends with its stdin, so a killed caller leaves no engine behind.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.answers import claim_stdout, leave_signals_to_caller
from ..engines.decoder import Decoder
from ..engines.memory import peak_rss
from ..export.errors import BismoothError
from .bench_timing import time_run
from .text_model import open_decoder


class _Server:
    """Answers requests about one engine, which stays open until the ``resources`` are closed."""

    def __init__(self, resources: ExitStack) -> None:
        self._resources = resources
        self._decoder: Decoder | None = None

    def open(self, path: str, threads: int | None) -> dict[str, Any]:
        start = time.perf_counter()
        self._decoder = decoder = self._resources.enter_context(open_decoder(Path(path), threads))
        seconds = time.perf_counter() - start
        return {"opened": {"seconds": seconds, "vocab_size": decoder.vocab_size, "capacity": decoder.capacity}}

    def time(self, ids: list[list[int]], new_tokens: int) -> dict[str, Any]:
        assert self._decoder is not None, "it was opened"
        timing = time_run(self._decoder, np.array(ids, np.int64), new_tokens)
        return {"timed": {**asdict(timing), "peak_rss": peak_rss()}}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.open(**request["open"]) if "open" in request else self.time(**request["time"])
        except BismoothError as error:
            return {"error": str(error)}
        except Exception:  # a defect: the caller shows it
            return {"bug": traceback.format_exc()}


def main() -> None:
    """Serve requests; the entry point of the process."""
    leave_signals_to_caller()
    answers = claim_stdout()
    with ExitStack() as resources:
        server = _Server(resources)
        for line in sys.stdin:
            print(json.dumps(server.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
