"""Calibrate in a process of its own, which says on stdout how much memory it has taken and how many pieces it ran.

``python tests/calibrating.py FOLDER OUTPUT MEMORY [NAME=VALUE…]``: ``model.onnx`` in FOLDER, the inputs of its linears,
12 windows of 16 tokens, with further options of ``calibrate`` as JSON. Exit status 2: the message is on stderr.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from bismooth.calibrators.run import calibrate
from bismooth.engines.memory import peak_rss
from bismooth.export.errors import BismoothError
from bismooth.passes.graph import load
from bismooth.passes.linears import find_linears

WINDOWS, LENGTH = 12, 16


def main(folder: Path, output: Path, memory: int, *options: str) -> int:
    values = {linear.x: linear.k for linear in find_linears(load(folder / "model.onnx"))}
    ids = np.random.default_rng(0).integers(0, 16, (WINDOWS, LENGTH))
    settings = {name: json.loads(value) for name, _, value in (option.partition("=") for option in options)}
    totals: list[int] = []

    def progress(step: str, _done: int, total: int) -> None:
        totals.extend([total] if step == "calibrate" else [])

    try:
        calibrate(folder, values, ids, output, memory=memory, threads=1, progress=progress, **settings)
    except BismoothError as error:
        sys.stderr.write("\n".join([str(error), *getattr(error, "__notes__", [])]))
        return 2
    sys.stdout.write(json.dumps({"peak": peak_rss(), "pieces": totals[-1] // WINDOWS}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
