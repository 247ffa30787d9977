"""A graph file as tasks hold it: pickled as its path, and opened once by each process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from ._gs import Graph
from .graph import Index, load


@dataclass(frozen=True, eq=False)
class OpenGraph:
    """A graph that nobody changes.

    Attributes:
        graph: As its file has it.
        path: The file; None for a graph without one, which cannot be pickled.
    """

    graph: Graph
    path: Path | None = None

    @cached_property
    def index(self) -> Index:
        """Look-ups over the graph."""
        return Index.of(self.graph)

    @staticmethod
    def load(path: Path) -> OpenGraph:
        """The graph of an ONNX file, as :func:`.graph.load` reads it; the same object while the file stays the same.

        Raises:
            BismoothError: as :func:`.graph.load`.
        """
        try:
            status = path.stat()
        except OSError:
            return OpenGraph(load(path), path)  # which says what is wrong
        return _load(path.absolute(), (status.st_ino, status.st_size, status.st_mtime_ns))

    def __reduce__(self) -> tuple[Callable[[Path], OpenGraph], tuple[Path]]:
        if self.path is None:
            raise TypeError("a graph without a file cannot be pickled")
        return OpenGraph.load, (self.path,)


@lru_cache(maxsize=1)
def _load(path: Path, _version: tuple[int, int, int]) -> OpenGraph:
    return OpenGraph(load(path), path)
