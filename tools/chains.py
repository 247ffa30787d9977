"""Judge the chains of an artifact: whether its graph computes the same if it is cut where they are.

The graph for the CPU stands for that of the engines, whose parts have the same borders and the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

from ..engines.chain import Chain
from ..engines.chain_session import ChainSession, lean_parts
from ..engines.onnxruntime import Mode
from ..engines.pieces import PieceMaker
from ..engines.streaming import Streamed, find_budget
from ..engines.subgraph import load_graph
from ..engines.token_feeds import Port
from ..export.artifact import Artifact
from ..export.errors import BismoothError
from ..passes.progress import Progress
from .comparison import Comparison, Figures, Ids, Track, Values, comparison_of
from .shipped import ShippedEngine

MOST_KL, MOST_ERROR = 1e-6, 1e-6
"""How far outputs may be apart, logits and others: the same operators run on the same numbers."""


def judge_chains(
    artifact: Artifact, chains: Sequence[ShippedEngine], ids: Ids, progress: Progress
) -> tuple[dict[str, Figures], list[str]]:
    """Run the artifact's graph on token windows ids [N, S], as a whole and in the parts of each chain, one at a time.

    Returns:
        By chain ``parts``, ``equal`` (bit for bit) and the figures of the comparison; and a sentence per chain whose
        parts compute something else.

    Raises:
        BismoothError: the graph as a whole cannot be run.
    """
    path = artifact.graph("float32")
    mode: Mode = "reference" if "reference" in artifact.manifest.graphs else "plain"
    model = load_graph(path)
    comparison = comparison_of(artifact, _first_output(model))
    expected = _run_whole(path, model, mode, ids)
    figures: dict[str, Figures] = {}
    failures: list[str] = []
    by_borders: dict[tuple[str, ...], tuple[Figures, str | None]] = {}
    for number, engine in enumerate(chains, 1):
        name, chain = engine.folder.name, Chain.load(engine.file)
        borders = tuple(part.gives.name for part in chain.parts if part.gives is not None)
        if borders not in by_borders:
            by_borders[borders] = _judge(path, borders, mode, ids, expected, comparison())
        found, failure = by_borders[borders]
        if found:
            figures[name] = {"parts": len(chain.parts), **found}
        failures += [f"{name}: {failure}"] if failure else []
        progress("run the parts of chains", number, len(chains))
    return figures, failures


def _judge(
    path: Path, borders: Sequence[str], mode: Mode, ids: Ids, expected: Sequence[Values], comparison: Comparison
) -> tuple[Figures, str | None]:
    """Figures of the graph in parts, and what is wrong with it."""
    try:
        with ChainSession(lean_parts(path, borders), mode=mode, lean=True) as session:
            got = [values[0] for values in session.windows(ids)]
    except BismoothError as error:
        return {}, str(error)
    return _compare(ids, expected, got, comparison)


def _first_output(model: onnx.ModelProto) -> Port:
    output = model.graph.output[0]
    dims = output.type.tensor_type.shape.dim
    return Port(output.name, None, tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims))


def _run_whole(path: Path, model: onnx.ModelProto, mode: Mode, ids: Ids) -> list[Values]:
    """The graph's first output [S, ...] for each window, run in the memory that there is."""
    streamed = Streamed(path, PieceMaker(model), mode, ids, 1)
    outputs: list[Values] = []
    with TemporaryDirectory() as folder:
        for piece in streamed.plan(find_budget(None)):
            with streamed.running(piece, Path(folder)) as run:
                outputs = [value[0] for batch in streamed.batches for value in run(batch).values()]
    return [values.astype(np.float32, copy=False) for values in outputs]


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
