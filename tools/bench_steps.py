"""Steps of a benchmark: processes of their own, so that the peak memory of each is its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.errors import BismoothError
from .demo import write_demo_text


@dataclass(frozen=True)
class Step:
    """A finished process: what it printed as JSON, its wall time in seconds and its peak memory in bytes.

    The peak is at least that of this process: Linux lets a new process inherit it.
    """

    name: str
    output: dict[str, Any]
    seconds: float
    peak_bytes: int

    def to_row(self) -> dict[str, Any]:
        return {"step": self.name, "wall_seconds": self.seconds, "peak_bytes": self.peak_bytes}


class Runner:
    """Runs steps one after the other and keeps what they cost."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def bismooth(self, *arguments: str | Path, label: str = "") -> Step:
        """A command of bismooth; ``label`` names the step, instead of the command."""
        command = [sys.executable, "-m", "bismooth", *map(str, arguments), "--json", "--quiet"]
        return self.process(label or str(arguments[0]), command)

    def process(self, name: str, command: Sequence[str]) -> Step:
        """A process that prints JSON.

        Raises:
            BismoothError: it failed; a missed gate is no failure, since some steps are there to show one.
        """
        sys.stderr.write(f"{name} …\n")
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            with process.stdout as pipe:
                text = pipe.read()
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # nothing works on after the bench, on files that it deletes
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        missed_gate = process.returncode == 1 and text
        if process.returncode and not missed_gate:
            raise BismoothError(f"{name}: ended with status {process.returncode}: {text.decode()[-500:]}")
        seconds = time.perf_counter() - start
        step = Step(name, json.loads(text or "{}"), seconds, usage.ru_maxrss * 1024)
        self.steps.append(step)
        return step


def add_texts(parser: argparse.ArgumentParser) -> None:
    """The options for the two texts."""
    parser.add_argument("--calibration", nargs="+", default=None, metavar="FILE", help="text to calibrate on")
    parser.add_argument("--evaluation", nargs="+", default=None, metavar="FILE", help="other text to evaluate on")


def texts(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The two texts; without files, the first and second half of the demo's."""
    if options.calibration and options.evaluation:
        return options.calibration, options.evaluation
    if options.calibration or options.evaluation:
        raise BismoothError("bench: expected both --calibration and --evaluation, or neither, got one of them.")
    whole = write_demo_text(options.output / "text.txt").read_text("utf-8")
    halves = [options.output / "calibration.txt", options.output / "evaluation.txt"]
    for path, text in zip(halves, (whole[: len(whole) // 2], whole[len(whole) // 2 :]), strict=True):
        path.write_text(text, "utf-8")
    return [str(halves[0])], [str(halves[1])]
