"""Run a part of a graph in this process, and say on stdout what it takes: as it was told before, and as it was.

``python -m tests.measured GRAPH MODE WINDOWS LENGTH FIRST STOP [taps] [batches]``: segments from FIRST on; STOP 0 means
all; all windows at once, or in batches of one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from bismooth.calibrators.observe import KEPT_ROWS, OUTLIERS, SAMPLED, instrument
from bismooth.calibrators.run import Sample
from bismooth.engines.budget import base_memory
from bismooth.engines.memory import peak_rss
from bismooth.engines.onnxruntime import Mode
from bismooth.engines.piece_run import Batch
from bismooth.engines.pieces import Piece
from bismooth.engines.subgraph import load_graph
from bismooth.passes.graph import load
from bismooth.passes.linears import find_linears
from tests.streaming import streamed

ROWS = 64


def main(
    path: Path, mode: Mode, windows: int, length: int, first: int, stop: int, *, taps: bool, batches: bool
) -> dict[str, Any]:
    vocabulary = max(tensor.dims[0] for tensor in load_graph(path).graph.initializer if tensor.dims)
    ids = np.random.default_rng(0).integers(0, vocabulary, (windows, length))
    run = streamed(path, ids, mode, 1 if batches else windows)
    sample = Sample(np.arange(ROWS), length)
    if taps:
        values = run.maker.by_segment([linear.x for linear in find_linears(load(path))])
        prepare = partial(instrument, histograms=True)
        run = replace(run, values=values, prepare=prepare, dims={SAMPLED: ROWS, KEPT_ROWS: OUTLIERS})
    piece = Piece(first, stop or run.stop)
    need = run.need(piece)
    with tempfile.TemporaryDirectory() as folder:
        entry = run.maker.segments[first].entry
        if entry is not None:
            file = run.file(entry, Path(folder))
            file.create(windows)
            file.write(Batch(0, windows), np.random.default_rng(0).standard_normal((windows, *file.shape)))
        base = base_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        with run.running(piece, Path(folder), threads=2) as opened:
            for batch in 2 * run.batches:
                opened(batch, sample.feeds(batch) if taps else None)
    return {"need": need, "taken": (peak_rss() or 0) - base}


if __name__ == "__main__":
    graph, chosen, *numbers = sys.argv[1:7]
    options = {option: option in sys.argv[7:] for option in ("taps", "batches")}
    result = main(Path(graph), cast(Mode, chosen), *map(int, numbers), **options)
    sys.stdout.write(json.dumps(result))
