"""Run the parts of a chain in ONNX Runtime, on whole windows of text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..export.graph_names import is_present
from .chain_cut import cut_at
from .lean import make_lean
from .onnxruntime import InMemoryGraph, Mode, Session
from .subgraph import load_graph

Ids = NDArray[np.int64]


class ChainSession:
    """Graphs of which each reads what the one before computes; a context manager, which frees the memory on exit.

    Args:
        graphs: files or graphs in memory, in the order in which they run. The first output that is no cache is what
            the next one reads.
        mode: as of :class:`.onnxruntime.Session`.
        resident: keep all graphs in memory. Otherwise there is one at a time, loaded anew for each call.
        lean: as of :class:`.onnxruntime.Session`.
    """

    def __init__(
        self, graphs: Sequence[Path | InMemoryGraph], *, mode: Mode = "int8", resident: bool = False, lean: bool = False
    ) -> None:
        self._graphs, self._lean = graphs, lean
        self._mode: Mode = mode
        self._sessions: list[Session] = []
        if resident:
            with ExitStack() as stack:
                for graph in graphs:
                    self._sessions.append(stack.enter_context(self._open(graph)))
                self._opened = stack.pop_all()
        else:
            self._opened = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs that are kept."""
        self._opened.close()

    def windows(self, ids: Ids) -> list[NDArray[np.float32]]:
        """Logits [1, S, V] of each window of token ids [N, S] without padding, with empty caches.

        Each graph runs on all windows before the next: in between, their hidden states are in memory.

        Raises:
            BismoothError: a graph cannot be loaded or run, or reads something else.
        """
        known: list[dict[str, NDArray[Any]]] = [{} for _ in ids]
        for number, graph in enumerate(self._graphs):
            with ExitStack() as stack:
                session = self._sessions[number] if self._sessions else stack.enter_context(self._open(graph))
                output = next(port.name for port in session.outputs if not is_present(port.name))
                for place, window in enumerate(ids):
                    feeds = session.token_feeds(window[None], known[place])
                    known[place] = session.run(feeds, [output])
        return [next(iter(values.values())).astype(np.float32, copy=False) for values in known]

    def _open(self, graph: Path | InMemoryGraph) -> Session:
        return Session(graph, mode=self._mode, lean=self._lean)


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
