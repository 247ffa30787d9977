"""Calibrate again and again, each time killed at another moment and then run to its end.

``python tests/killed_calibration.py FOLDER OUTPUT MEMORY COUNT``: ``model.onnx`` in FOLDER. Each run is a fork of this process. It
writes one line of JSON per kill: how many segments were done by then, and the hash of the file that came out.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from bismooth.export.hashing import file_sha256
from bismooth.export.state import read_units, state_folder
from tests.calibrating import main


def start(folder: Path, output: Path, memory: int) -> int:
    """A run in a process of its own, with its messages dropped."""
    if child := os.fork():
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(main(folder, output, memory))


def complete(folder: Path, output: Path, memory: int) -> str:
    """Run to the end; the hash of what came out."""
    _, status = os.waitpid(start(folder, output, memory), 0)
    assert status == 0
    return file_sha256(output)


def kill(folder: Path, output: Path, memory: int, seconds: float) -> int:
    """Kill a run after so many seconds; how many segments are on record then."""
    child = start(folder, output, memory)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    state = state_folder(output)
    return len(read_units(state)[0]) if (state / "state.json").exists() else 0


if __name__ == "__main__":
    source, target, budget = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    began = time.perf_counter()
    complete(source, target, budget)
    duration = time.perf_counter() - began
    moments = random.Random(0)
    for _ in range(int(sys.argv[4])):
        target.unlink(missing_ok=True)
        done = kill(source, target, budget, moments.uniform(0, duration))
        sys.stdout.write(json.dumps({"done": done, "sha256": complete(source, target, budget)}) + "\n")
