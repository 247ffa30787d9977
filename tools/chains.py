"""Judge the chains of an artifact: whether its graph computes the same if it is cut where they are.

The graph for the CPU stands for that of the engines, whose parts have the same borders and the same names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..engines.budget import base_memory
from ..engines.chain import Chain
from ..engines.chain_windows import chain_windows, lean_parts
from ..engines.footprint import footprint
from ..engines.memory import format_bytes
from ..engines.onnxruntime import InMemoryGraph
from ..engines.pieces import PieceMaker
from ..engines.streaming import Streamed
from ..engines.subgraph import load_graph, parse_graph
from ..export.artifact import Artifact
from ..export.errors import BismoothError
from .comparison import Comparison, Figures, Ids, Track, Values, comparison_of
from .programs import Program, Programs, in_float
from .shipped import ShippedEngine

MOST_KL, MOST_ERROR = 1e-6, 1e-6
"""How far outputs may be apart, logits and others: the same operators run on the same numbers."""


def judge_chains(
    artifact: Artifact, chains: Sequence[ShippedEngine], programs: Programs, count: int
) -> tuple[dict[str, Figures], list[str]]:
    """Run the artifact's graph on the first ``count`` windows, as a whole and in the parts of each chain.

    Returns:
        By chain ``parts``, ``equal`` (bit for bit) and the figures of the comparison, or ``skipped``, why it was not
        run; and a sentence per chain whose parts compute something else.

    Raises:
        BismoothError: the graph as a whole cannot be run.
    """
    whole = in_float(artifact, count)
    comparison = comparison_of(artifact, programs.output(whole.path))
    expected = list(programs.outputs(whole, "run the graph in one piece"))
    figures: dict[str, Figures] = {}
    failures: list[str] = []
    by_borders: dict[tuple[str, ...], tuple[Figures, str | None]] = {}
    for number, engine in enumerate(chains, 1):
        name, chain = engine.folder.name, Chain.load(engine.file)
        borders = tuple(part.gives.name for part in chain.parts if part.gives is not None)
        if borders not in by_borders:
            by_borders[borders] = _judge(whole, borders, programs, expected, comparison())
        found, failure = by_borders[borders]
        if found:
            figures[name] = {"parts": len(chain.parts), **found}
        failures += [f"{name}: {failure}"] if failure else []
        programs.progress("run the parts of chains", number, len(chains))
    return figures, failures


def _judge(
    whole: Program,
    borders: Sequence[str],
    programs: Programs,
    expected: Sequence[Values],
    comparison: Comparison,
) -> tuple[Figures, str | None]:
    """Figures of the graph in parts, and what is wrong with it."""
    path, mode, ids = whole.path, whole.mode, programs.ids[: len(expected)]
    try:
        parts = lean_parts(path, borders)
        need = _need(parts, Streamed(path, PieceMaker(load_graph(path)), mode, ids, 1))
        need += sum(values.nbytes for values in expected)  # as much comes out
        if programs.budget is not None and need > programs.budget:
            return {"skipped": f"its largest part takes {format_bytes(need)} of memory"}, None
        got = [values[0] for values in chain_windows(parts, ids, mode)]
    except BismoothError as error:
        return {}, str(error)
    return _compare(ids, expected, got, comparison)


def _need(parts: Sequence[InMemoryGraph], whole: Streamed) -> int:
    """Bytes that this process takes with the largest of the parts."""
    models = (parse_graph(part.data, part.name) for part in parts)
    return base_memory() + max(footprint(model, whole.sizes, whole.mode, whole.rows) for model in models)


def _compare(
    ids: Ids, expected: Sequence[Values], got: Sequence[Values], comparison: Comparison
) -> tuple[Figures, str | None]:
    track = Track(comparison)
    for window, values, candidate in zip(ids, expected, got, strict=True):
        track.update(window, values, candidate)
    equal = all(np.array_equal(*pair) for pair in zip(expected, got, strict=True))
    figures = {key: value for key, value in track.figures().items() if key in ("kl", "relative_error")}
    if track.failure:
        return {"equal": equal}, track.failure
    key, most = ("kl", MOST_KL) if "kl" in figures else ("relative_error", MOST_ERROR)
    failure = (
        None
        if figures[key] <= most
        else (
            f"its parts compute something else than the whole: {key} is {figures[key]:.6g}. Expected at most {most:g}. "
            "Build the chain again."
        )
    )
    return {"equal": equal, **figures}, failure
