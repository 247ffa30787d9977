"""Run the parts of a graph in ONNX Runtime, one after the other, on whole windows of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.graph_names import is_present
from .chain_cut import cut_at
from .lean import make_lean
from .onnxruntime import InMemoryGraph, Mode, Session
from .subgraph import load_graph

Ids = NDArray[np.int64]


def chain_windows(parts: Sequence[InMemoryGraph], ids: Ids, mode: Mode) -> list[NDArray[np.float32]]:
    """Logits [1, S, V] of each window of token ids [N, S] without padding, with empty caches.

    Args:
        parts: in the order in which they run. The first output that is no cache is what the next one reads. One of them
            is in memory at a time; all windows pass it, and in between, their hidden states are in memory.
        ids: token ids.
        mode: as of :class:`.onnxruntime.Session`.

    Raises:
        BismoothError: a part cannot be loaded or run, or reads something else.
    """
    known: list[dict[str, NDArray[Any]]] = [{} for _ in ids]
    for part in parts:
        with Session(part, mode=mode, lean=True) as session:
            output = next(port.name for port in session.outputs if not is_present(port.name))
            for place, window in enumerate(ids):
                known[place] = session.run(session.token_feeds(window[None], known[place]), [output])
    return [next(iter(values.values())).astype(np.float32, copy=False) for values in known]


def lean_parts(path: Path, values: Sequence[str]) -> list[InMemoryGraph]:
    """Parts of the graph in a file, cut at ``values``, that run with little memory, in any mode but "int8".

    Raises:
        BismoothError: the graph cannot be cut there.
    """
    models = cut_at(load_graph(path), str(path), values)
    for model in models:
        make_lean(model, fuse=True)
    return [
        InMemoryGraph(f"{path}: part {number} of {len(models)}", model.SerializeToString(), path.parent)
        for number, model in enumerate(models, 1)
    ]
