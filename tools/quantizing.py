"""The stage ``quantize``: a float artifact becomes a quantized one."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.memory import current_rss, format_bytes, return_large_blocks
from ..export.artifact import Artifact, check_apart, finish_folder, new_folder, place_file
from ..export.errors import BismoothError
from ..export.fingerprint import run_fingerprint
from ..export.hashing import file_sha256, hashing
from ..export.state import open_state
from ..export.versions import tool_versions
from ..passes.recipe import WALLS, Recipe
from . import console
from .executors import open_executor
from .exporting import copies_weights
from .meant import statistics_record
from .results import QuantizeStageResult

if TYPE_CHECKING:
    from ..calibrators.statistics import Statistics
    from ..passes.quantize import QuantizeResult

STATISTICS = "statistics.safetensors"
_WORKERS = 2


def quantize(
    artifact: str | Path,
    recipe: str | Path | Recipe,
    output: str | Path,
    *,
    data_free: bool = False,
    statistics: str | Path | None = None,
    alpha: float | None = None,
    max_share: float | None = None,
    memory: int | None = None,
    executor: str = "local",
    force: bool = False,
    restart: bool = False,
) -> QuantizeStageResult:
    """Smooth and quantize a float artifact by a recipe. A run that was broken off goes on where it was.

    Args:
        artifact: the float artifact.
        recipe: a name, a file or a recipe.
        output: the folder to make.
        data_free: use no statistics.
        statistics: those to use, instead of the artifact's.
        alpha: see :func:`load_recipe`.
        max_share: see :func:`load_recipe`.
        memory: bytes that this process may take, or on a cluster each that works there; by default what two workers
            take, or one.
        executor: who works on the weights, see :func:`.executors.open_executor`.
        force: replace a quantized artifact at ``output``.
        restart: discard what an unfinished run has left.

    Raises:
        BismoothError: recipe and model do not fit, statistics are missing or of another model, a weight is broken,
            what an unfinished run has left was made of something else, or the executor cannot be used.
    """
    from ..calibrators.calibration import StatisticsCalibration
    from ..passes.quantize import WEIGHTS, quantize_graph
    from ..passes.resuming import ResumingExecutor

    start = time.perf_counter()
    return_large_blocks()
    artifact, output, statistics = Path(artifact), Path(output), Path(statistics) if statistics else None
    inputs = [path for path in (artifact, statistics) if path is not None]
    check_apart(output, inputs)
    loaded = Artifact.load(artifact, "float")
    chosen = load_recipe(recipe, alpha, max_share, data_free=data_free)
    _check_statistics(statistics, chosen, data_free=data_free)
    found = None if data_free else _find_statistics(loaded, statistics, chosen)
    calibration = None if found is None else StatisticsCalibration(found)
    source, role = loaded.graph("float32"), chosen.compute_dtype.value
    narrow = loaded.graph(role) if role != "float32" and role in loaded.manifest.graphs else None
    workers, need = _workers(source, found, memory, executor)
    with console.progress(transient=True) as progress:  # with Gram matrices, statistics are as large as models
        progress("hash the statistics", 0, 1)
        fingerprint = _fingerprint(loaded, chosen, found)
    with open_state(output, "quantize", fingerprint, restart=restart) as state:
        console.note_resumed(state.resumed, state.progress)
        grown = state.folder / WEIGHTS
        with console.progress() as progress, new_folder(output, "quantized", force=force, inputs=inputs) as folder:
            weights = _carry(loaded, folder)
            with (
                hashing(weights, state) as hashes,
                open_executor(executor, _shared(loaded, found, folder), workers, need) as opened,
                ResumingExecutor(opened, state, grown) as resuming,
            ):
                result = quantize_graph(
                    source,
                    folder,
                    chosen,
                    calibration,
                    progress,
                    narrow_source=narrow,
                    executor=resuming,
                    grown=grown,
                )
                digests = hashes() | {WEIGHTS: result.sha256}
            loaded.check_files()  # nobody has modified the weights meanwhile
            manifest = replace(
                loaded.manifest,
                kind="quantized",
                graphs=result.graphs,
                tools=tool_versions(),
                stages=(*loaded.manifest.stages, _entry(chosen, found, result)),
            )
            finish_folder(folder, manifest, digests, own=[WEIGHTS])
            size = (folder / WEIGHTS).stat().st_size
    return QuantizeStageResult(output, chosen.name, result, size, time.perf_counter() - start)


def _workers(graph: Path, statistics: Statistics | None, memory: int | None, executor: str) -> tuple[int, int | None]:
    """How many workers fit into the memory, two at most; and the bytes that a process of one takes, if that matters.

    Raises:
        BismoothError: not even one does.
    """
    if memory is None and executor == "local":
        return _WORKERS, None
    from ..passes.graph import load
    from ..passes.linears import find_linears
    from ..passes.quantize_memory import quantize_memory

    linears, tokens = find_linears(load(graph)), 0 if statistics is None else len(statistics.row_numbers)
    needs = {workers: current_rss() + quantize_memory(linears, tokens, workers) for workers in range(_WORKERS, 0, -1)}
    fitting = [workers for workers, need in needs.items() if memory is None or need <= memory]
    if memory is not None and not fitting:
        raise BismoothError(
            f"--memory {format_bytes(memory)}: is too little to quantize {graph.parent}. Expected "
            f"{format_bytes(needs[1])} or more."
        )
    return fitting[0], needs[1]


def _shared(artifact: Artifact, statistics: Statistics | None, folder: Path) -> list[Path]:
    """Files that whoever works on the weights must see: what is read, and what is already where the output is made."""
    made = [path for path in folder.rglob("*") if path.is_file()]
    return [*artifact.files.values(), *([] if statistics is None else [statistics.path]), *made]


def _fingerprint(artifact: Artifact, recipe: Recipe, statistics: Statistics | None) -> dict[str, Any]:
    """All that decides the result."""
    from ..calibrators.run import hash_model

    record = None if statistics is None else statistics_record(statistics) | {"sha256": file_sha256(statistics.path)}
    return run_fingerprint(
        artifact.files,
        source=artifact.manifest.source,
        weights=hash_model(artifact.graph("float32")),
        recipe={"name": recipe.name} | recipe.to_dict(),
        statistics=record,
    )


def _entry(recipe: Recipe, statistics: Statistics | None, result: QuantizeResult) -> dict[str, Any]:
    """The manifest's entry of the stage."""
    return {
        "stage": "quantize",
        "recipe": recipe.to_dict() | {"name": recipe.name},
        "fingerprint": recipe.fingerprint,
        "statistics": None if statistics is None else statistics_record(statistics),
        "quantized": [asdict(linear) for linear in result.linears],
        "float": list(result.float_linears),
        "broken": result.broken and list(result.broken),
        "sites": [asdict(choice) for choice in result.choices],
        "rejected": [asdict(item) for item in result.rejected],
        "fold_errors": result.fold_errors,
        "fold_errors_compute": {name: asdict(error) for name, error in result.fold_errors_compute.items()},
        "passes": [asdict(record) for record in result.passes],
    }


def load_recipe(
    source: str | Path | Recipe,
    alpha: float | None = None,
    max_share: float | None = None,
    *,
    data_free: bool = False,
) -> Recipe:
    """The recipe, with its α fixed to ``alpha`` and its ``max_share`` set.

    Raises:
        BismoothError: there is no such recipe, it is not valid, or ``alpha`` or ``max_share`` changes nothing.
    """
    recipe = Recipe.load(source)
    if max_share is not None:
        if not 0 <= max_share <= 1:
            raise BismoothError(f"--max-share {max_share:g}: Expected a share from 0 to 1.")
        if not recipe.selects_walls:
            raise BismoothError(
                f"--max-share {max_share:g}: has no effect: the recipe {recipe.name} has no rule for {WALLS}. Leave it "
                "out, or take a recipe that has one (w8a8-mixed)."
            )
        recipe = replace(recipe, max_share=max_share)
    if alpha is None:
        return recipe
    if data_free or not recipe.smooths:
        reason = f"the recipe {recipe.name} does not smooth. Leave it out, or take a recipe that smooths."
        if recipe.smooths:
            reason = "without data, the weights alone decide. Leave it out, or smooth with statistics."
        raise BismoothError(f"--alpha {alpha:g}: has no effect: {reason}")
    return recipe.with_alpha(alpha)


def _check_statistics(statistics: Path | None, recipe: Recipe, *, data_free: bool) -> None:
    if statistics is not None and (data_free or not recipe.needs_statistics):
        reason = "--data none" if data_free else f"the recipe {recipe.name}"
        raise BismoothError(f"--statistics {statistics}: has no effect with {reason}. Leave one of them out.")


def _find_statistics(artifact: Artifact, statistics: Path | None, recipe: Recipe) -> Statistics | None:
    from ..calibrators.run import hash_model
    from ..calibrators.statistics import Statistics

    path = statistics or artifact.path / STATISTICS
    if not path.is_file():
        if statistics is None and not recipe.needs_statistics:
            return None
        raise BismoothError(
            f"{path}: there are no statistics. Expected those of 'bismooth calibrate {artifact.path} --data FILE'. "
            "Run it first, or pass --data none to smooth by the weights alone."
        )
    loaded = Statistics.load(path)
    loaded.check_graph(hash_model(artifact.graph("float32")))
    return loaded


def _carry(artifact: Artifact, folder: Path) -> dict[str, Path]:
    """Bring the files that later stages need: weights as links, what lies beside them as copies; the former, by name.

    Graphs, statistics and weight files that no graph refers to stay behind.
    """
    from ..export.external_data import weight_files

    weights = weight_files(artifact.graph("float32"))
    beside = [name for name in artifact.manifest.files if Path(name).suffix not in (".onnx", ".safetensors")]
    for name in dict.fromkeys([*weights, *beside]):
        path, target = artifact.path / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in weights:
            place_file(path, target, copy=copies_weights(artifact))
        else:
            shutil.copyfile(path, target)
    return {name: folder / name for name in weights}
