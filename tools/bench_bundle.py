"""Measure how long a bundle takes to start: from a new process to the logits of one token.

Each start is a process of its own. The files are in the page cache, as after the first start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.bundle import Bundle
from . import console
from .cli_errors import report

ROUNDS = 5
CHECKS = ("size", "full", "beside", "none")
"""How large files are checked: not at all, before the engine loads, while it loads; ``none`` opens no bundle."""
_SCRIPT = """
import json, sys, time
start, seconds = time.perf_counter(), {}
def took(step):
    seconds[step] = time.perf_counter() - start
import numpy as np
from pathlib import Path
from bismooth.engines.bundle import Bundle
from bismooth.engines.bundle_choice import choose_engine
from bismooth.engines.onnxruntime import Session
took("import")
path, check = sys.argv[1:]
if check == "none":
    session = Session(Path(path) / "engines/onnxruntime/model.onnx")
else:
    bundle = Bundle.load(path, "full" if check == "full" else "size")
    took("check")
    engine = choose_engine(bundle, "onnxruntime").engine
    if check == "beside":
        with bundle.hashing(engine) as verify:
            session = Session(bundle.path / engine.file)
            verify()
    else:
        session = Session(bundle.path / engine.file)
took("load")
session.logits(np.zeros((1, 1), np.int64))
took("first_token")
seconds["cpu"] = time.process_time()
print(json.dumps(seconds))
"""


@dataclass(frozen=True)
class StartResult:
    """Medians per way to check the files, in seconds: from the first import to the end of each step, and CPU time."""

    rows: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return {"starts": list(self.rows)}


def measure(bundle: Path, rounds: int = ROUNDS) -> StartResult:
    """Start ``rounds`` times with each of :data:`CHECKS`, in turns.

    Raises:
        BismoothError: it is no sound bundle, or has no engine called onnxruntime.
    """
    Bundle.load(bundle).engine("onnxruntime")
    runs: dict[str, list[dict[str, float]]] = {check: [] for check in CHECKS}
    for _ in range(rounds):
        for check in CHECKS:
            runs[check].append(_start(bundle, check))
    return StartResult(tuple({"check": check, **_medians(found)} for check, found in runs.items()))


def _start(bundle: Path, check: str) -> dict[str, float]:
    command = [sys.executable, "-c", _SCRIPT, str(bundle), check]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {f"{step}_seconds": statistics.median(run[step] for run in runs) for step in runs[0]}


def main(arguments: Iterable[str] | None = None) -> int:
    """Entry point of ``python -m bismooth.tools.bench_bundle``."""
    parser = argparse.ArgumentParser(description="Measure how long a bundle takes to start on ONNX Runtime.")
    parser.add_argument("bundle", type=Path, help="bundle with an engine called onnxruntime")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"starts of each kind ({ROUNDS})")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        console.show(measure(options.bundle, options.rounds), as_json=False)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return report(error, "bench", False)


if __name__ == "__main__":
    sys.exit(main())
