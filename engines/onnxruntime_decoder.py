"""Generate text in ONNX Runtime on the CPU.

Prompts run in pieces: where caches are updated in place, attention's scores are as many as new positions times room.
The parts of a chain are all loaded, and run one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..export.artifact import MANIFEST, Artifact
from ..export.errors import BismoothError
from ..export.graph_names import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, has_caches, is_past
from .chain import CHAIN, Chain
from .decoder import Positions
from .onnxruntime import Session
from .onnxruntime_runs import Run, RunOfParts, find_run, size_of

PIECE = 256
"""Positions of a prompt that run at once: of 128 to 1024, the fastest for 1024, and near the least in memory."""

CAPACITY = 2048
"""Positions of a row where no manifest says how many the model takes."""

Ids = NDArray[np.int64]


class OnnxRuntimeDecoder:
    """A :class:`.decoder.Decoder` on the CPU.

    Args:
        engine: the graph in a folder that ``bismooth build`` made, or any float32 graph with caches; or the list of
            the parts of a chain, ``chain.json``.
        threads: threads per operator; one per core by default.
        capacity: the most positions of a row; as many as the model takes by default.

    Raises:
        BismoothError: the graph has no caches, or other inputs than text has, or cannot be loaded.
    """

    def __init__(self, engine: Path, *, threads: int | None = None, capacity: int | None = None) -> None:
        self._positions = Positions(str(engine), capacity or _positions_of(engine.parent))
        with ExitStack() as stack:  # after an interrupt too: weights are not the garbage collector's to free
            sessions: list[Session] = []
            for file in _files(engine):
                sessions.append(Session(file, threads=threads, spinning=True))
                stack.callback(sessions[-1].close)
            self._run = _run(str(engine), sessions, self.capacity)
            self._opened = stack.pop_all()

    @property
    def vocab_size(self) -> int:
        return size_of(self._run.output, 2)

    @property
    def capacity(self) -> int:
        return self._positions.capacity

    @property
    def length(self) -> int:
        return self._positions.length

    def prefill(self, ids: Ids, mask: Ids | None = None) -> NDArray[np.float32]:
        """See :class:`.decoder.Decoder`."""
        begin = self.length
        positions = self._positions.append(self._positions.mask_of(ids, mask))
        pieces = [slice(start, start + PIECE) for start in range(0, ids.shape[1], PIECE)]
        seen = self._positions.mask
        logits = [
            self._run(
                {
                    INPUT_IDS: ids[:, piece],
                    ATTENTION_MASK: seen[:, : begin + piece.stop],
                    POSITION_IDS: positions[:, piece],
                }
            )[:, -1]
            for piece in pieces
        ]
        return logits[-1]

    def decode(self, tokens: Ids) -> NDArray[np.float32]:
        """See :class:`.decoder.Decoder`."""
        return self.prefill(tokens[:, None])

    def reset(self) -> None:
        """See :class:`.decoder.Decoder`."""
        self._positions.reset()
        self._run.reset()

    def close(self) -> None:
        """Free the graph, its weights and the caches."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _files(engine: Path) -> list[Path]:
    if engine.name != CHAIN:
        return [engine]
    return [engine.parent / part.file for part in Chain.load(engine).parts]


def _run(label: str, sessions: Sequence[Session], capacity: int) -> Run:
    """What runs the graphs, each of which reads what those before have computed.

    Raises:
        BismoothError: text does not tell one of their inputs, or they have no caches.
    """
    runs = [find_run(session, capacity) for session in sessions]
    inputs = [port.name for session in sessions for port in session.inputs]
    known = {INPUT_IDS, ATTENTION_MASK, POSITION_IDS, *(run.output.name for run in runs[:-1])}
    unknown = [name for name in inputs if name not in known and not is_past(name)]
    if unknown or not has_caches(inputs):
        got = f"the input '{unknown[0]}'" if unknown else "none"
        raise BismoothError(
            f"{label}: cannot generate text. Expected {INPUT_IDS}, {ATTENTION_MASK}, {POSITION_IDS} and caches "
            f"as inputs, got {got}. Export the model with --kv-cache and build the engine again."
        )
    return runs[0] if len(runs) == 1 else RunOfParts(runs)


def _positions_of(folder: Path) -> int:
    """How many positions the model takes, by the manifest of an engine folder."""
    dims = Artifact.load(folder).manifest.dims if (folder / MANIFEST).is_file() else {}
    return dims.get("max_position_embeddings", CAPACITY)
