"""A float graph becomes the graphs and the weight file of a quantized artifact.

Written into the output folder, which already holds the float graph's weight files:

``model.onnx``
    Q/DQ graph that computes in float32 (ONNX Runtime on a CPU).
``model.float16.onnx``, ``model.bfloat16.onnx``
    The same for the recipe's 16-bit compute type (TensorRT).
``reference.onnx``, ``reference.float16.onnx``, ``reference.bfloat16.onnx``
    The float graph, unchanged, and in the 16-bit type.
``folded.onnx``
    The float graph with the smoothing factors folded in, as multiplications on its weights; only if there are any.
``quantized.safetensors``
    INT8 weights, scales and 16-bit weights of both Q/DQ graphs.

Weights pass through memory some rows at a time; an :mod:`.executor` does the work, a linear or a site at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import floor
from pathlib import Path
from typing import Protocol

from ..export.errors import BismoothError
from ..export.replacing import replacing
from ._gs import Graph
from .driver import PassRecord, run_passes
from .executor import LOCAL, Executor
from .fold import Edit, Factor, Factors, fold_graph, weight_edits
from .fold_passes import FoldConstants, StoreFolded
from .foldcheck import TOLERANCE, ComputeError, FoldErrors, check_folds
from .graph import load, save
from .linears import Linear, find_head, find_linears
from .open_graph import OpenGraph
from .precision import NARROW_TYPES, SetPrecision, stored_casts
from .progress import Counter, Progress, silent
from .qdq import InsertQdq
from .recipe import GATED_PRODUCT, HEAD, WALLS, Recipe
from .rounding import Rounding
from .sites import Rejected, Site, find_sites
from .smoothing import Activations, Choice, choose_factors
from .spec import ComputeType, LinearSpec, SiteKind
from .static_ranges import Ranges, StaticRanges, static_ranges
from .unsigned import UseUnsignedActivations
from .wall_groups import Broken, find_broken, fitting, group_walls
from .weight_file import WeightFile, write_weights
from .weight_reader import WeightReader
from .weight_tasks import QuantizedLinear, WeightSources, folded_blocks

LEAST_OPSET = 18
"""Reductions take their axes as an input from here on."""

WEIGHTS = "quantized.safetensors"


class Calibration(Activations, Ranges, Protocol):
    """What calibration knows of the activations."""


@dataclass(frozen=True)
class QuantizeResult:
    """What was done.

    Attributes:
        graphs: role → file name.
        linears: The quantized linears.
        float_linears: Names of those left in float.
        broken: Names of those that one scale per output channel breaks, the worst first; None if the recipe does not
            ask.
        choices: Per fold site, how it was smoothed.
        rejected: Norms and linears that are no fold site, with the reason.
        fold_errors: Per smoothed site the relative error of the fold in float32.
        fold_errors_compute: The same in the deployed graph's 16-bit type, with and without the fold.
        passes: What was run on the graphs.
        sha256: Of the weight file.
    """

    graphs: dict[str, str]
    linears: tuple[QuantizedLinear, ...]
    float_linears: tuple[str, ...]
    broken: tuple[str, ...] | None
    choices: tuple[Choice, ...]
    rejected: tuple[Rejected, ...]
    fold_errors: dict[str, float]
    fold_errors_compute: dict[str, ComputeError]
    passes: tuple[PassRecord, ...]
    sha256: str


def quantize_graph(
    source: Path,
    folder: Path,
    recipe: Recipe,
    calibration: Calibration | None,
    progress: Progress = silent,
    *,
    narrow_source: Path | None = None,
    executor: Executor = LOCAL,
    grown: Path | None = None,
) -> QuantizeResult:
    """Quantize the float32 graph ``source`` by ``recipe`` into ``folder``, where its weight files are already.

    Args:
        source: ``model.onnx`` of a float artifact.
        folder: Where the new files go.
        recipe: What to do with each linear.
        calibration: Statistics of the activations, or None to smooth by the weights alone.
        progress: Called with a step's name, how much of it is done, and how much there is.
        narrow_source: The same graph in the recipe's 16-bit type, if the artifact has it; otherwise it is made.
        executor: Does the work on the weights.
        grown: Where the weight file grows, for an executor that goes on from an earlier run; it stays there, and
            becomes a second name of the file in ``folder``. None: nothing is kept of a run that fails.

    Raises:
        BismoothError: the recipe does not fit the model, needs statistics that are missing, a weight holds NaN or
            overflows the compute type, or a fold changes the function.
    """
    graph, model = load(source), OpenGraph.load(source)  # to change, and to read from
    if graph.opset < LEAST_OPSET:
        raise BismoothError(
            f"{source}: has opset {graph.opset}. Expected {LEAST_OPSET} or newer, for the quantized graph. Export "
            "the model at a newer opset, or convert it with onnx.version_converter."
        )
    reader = WeightReader(model)
    linears = find_linears(graph)
    sites, rejected = find_sites(graph, linears)
    specs, factors, choices, broken = _plan(recipe, graph, sites, linears, reader, calibration, progress, executor)
    edits = weight_edits(sites, factors)
    graphs = _save_float(graph, source, narrow_source, folder, edits, recipe.compute_dtype)
    ranges = static_ranges(linears, specs, sites, factors, calibration)
    file = WeightFile(folder / WEIGHTS, grown=grown)
    records = run_passes(graph, _lowering(linears, specs, edits, ranges, file))
    narrowed, more = _narrowed(graph, recipe.compute_dtype)
    errors = _checked_folds(model, sites, factors, narrowed, recipe.compute_dtype, progress, executor)
    sources = WeightSources(reader, linears, specs, edits, ranges, recipe.compute_dtype)
    saved, (quantized, sha256), last = _save_quantized(graph, narrowed, folder, file, sources, progress, executor)
    return QuantizeResult(
        graphs=graphs | saved,
        linears=quantized,
        float_linears=tuple(linear.name for linear in linears if not specs[linear.name].quantized),
        broken=None if broken is None else tuple(item.name for item in broken),
        choices=tuple(choices),
        rejected=tuple(rejected),
        fold_errors=errors.exact,
        fold_errors_compute=errors.compute,
        passes=(*records, *more, *last),
        sha256=sha256,
    )


def _plan(
    recipe: Recipe,
    graph: Graph,
    sites: Sequence[Site],
    linears: Sequence[Linear],
    reader: WeightReader,
    calibration: Calibration | None,
    progress: Progress,
    executor: Executor,
) -> tuple[dict[str, LinearSpec], dict[str, Factor], list[Choice], list[Broken] | None]:
    """How each linear is computed, the smoothing factors, and the linears that one scale per output channel breaks.

    The latter are looked for in the smoothed weights. Sites of linears that are then computed otherwise are smoothed
    again.
    """
    specs = _specs(recipe, linears, graph, sites)
    choose = partial(
        choose_factors,
        linears={linear.name: linear for linear in linears},
        blocks=reader.blocks,
        activations=calibration,
        executor=executor,
    )
    shown = progress if recipe.smooths else silent
    factors, choices = choose(sites, specs=specs, on_site=Counter(shown, "smooth", len(sites)))
    if not recipe.asks_for_walls:
        return specs, factors, choices, None
    edits = weight_edits(sites, factors)
    quantized = [linear for linear in linears if specs[linear.name].quantized]
    count = Counter(progress, "look for walls", len(quantized))
    broken = find_broken(quantized, partial(folded_blocks, reader, edits=edits), count, executor)
    final = _with_walls(recipe, specs, broken, lambda names: _specs(recipe, linears, graph, sites, walls=names))
    final = group_walls(final, linears, broken)
    changed = [site for site in sites if any(final[item.linear] != specs[item.linear] for item in site.consumers)]
    count = Counter(shown, "smooth again", len(changed))
    again, better = choose(changed, specs=final, on_site=count, earlier=factors, step="smooth again")
    names = {site.name for site in changed}
    kept = {name: factor for name, factor in factors.items() if name not in names}
    chosen = {choice.site: choice for choice in better}
    return final, kept | again, [chosen.get(choice.site, choice) for choice in choices], broken


def _with_walls(
    recipe: Recipe,
    specs: Mapping[str, LinearSpec],
    broken: Sequence[Broken],
    resolve: Callable[[Collection[str]], dict[str, LinearSpec]],
) -> dict[str, LinearSpec]:
    """The specifications with the rules for broken linears: for as many as the recipe allows, the worst first.

    Those that other rules keep as they are do not count.
    """
    concerned = resolve([item.name for item in broken])
    names = [item.name for item in broken if concerned[item.name] != specs[item.name]]
    if recipe.max_share is None:
        return concerned
    return resolve(names[: floor(recipe.max_share * len(specs) + 1e-9)])


def _specs(
    recipe: Recipe, linears: Sequence[Linear], graph: Graph, sites: Sequence[Site], walls: Collection[str] = ()
) -> dict[str, LinearSpec]:
    gated = [site for site in sites if site.kind is SiteKind.GATED_PRODUCT]
    selected = {
        HEAD: {linear.name for linear in find_head(linears, graph)},
        GATED_PRODUCT: {consumer.linear for site in gated for consumer in site.consumers},
        WALLS: walls,
    }
    specs = fitting(recipe.resolve([linear.name for linear in linears], selected), linears)
    if recipe.settings.weights is not None and not any(spec.quantized for spec in specs.values()):
        raise BismoothError(
            f"recipe {recipe.name}: there is nothing to quantize. Expected linear layers (MatMul or Gemm with a "
            f"constant matrix) that the recipe does not leave float, got {len(linears)} linears, all float. "
            "Convolutions are not quantized; take the recipe fp16, or another model."
        )
    return specs


def _checked_folds(
    model: OpenGraph,
    sites: Sequence[Site],
    factors: Factors,
    deployed: Graph | None,
    compute: ComputeType,
    progress: Progress,
    executor: Executor,
) -> FoldErrors:
    rounding = None if deployed is None else Rounding.of(deployed, NARROW_TYPES[compute.value])
    errors = check_folds(model, sites, factors, rounding, Counter(progress, "check folds", len(factors)), executor)
    for name, error in errors.exact.items():
        if not error <= TOLERANCE:
            raise BismoothError(
                f"{name}: folding the smoothing factors here changes the function. Expected a relative error of at "
                f"most {TOLERANCE:g}, got {error:.3g}. Leave the site out with a layer rule (smoothing: null), and "
                "report it."
            )
    for name, error in errors.compute.items():
        if not error.is_kept:
            got = "values that are not finite" if error.folded is None else f"{error.folded:.3g}"
            wider = "float32" if compute is ComputeType.BFLOAT16 else "bfloat16 or float32"
            raise BismoothError(
                f"{name}: folding the smoothing factors here costs accuracy in {compute}. Expected a relative error of "
                f"at most {error.limit:.3g} (without them: {error.unfolded:.3g}), got {got}. Compute in {wider}, or "
                "leave the site out with a layer rule (smoothing: null)."
            )
    return errors


def _lowering(
    linears: Sequence[Linear],
    specs: Mapping[str, LinearSpec],
    edits: Mapping[str, Edit],
    ranges: StaticRanges,
    file: WeightFile,
) -> list[FoldConstants | StoreFolded | InsertQdq]:
    """From the float32 graph to the float32 Q/DQ graph, step by step."""
    weights = {linear.weight for linear in linears}
    return [
        FoldConstants({name: edit for name, edit in edits.items() if name not in weights}),
        StoreFolded([linear for linear in linears if not specs[linear.name].quantized], edits, file.declare),
        InsertQdq(linears, specs, ranges, file.declare),
    ]


def _save_float(
    graph: Graph,
    source: Path,
    narrow_source: Path | None,
    folder: Path,
    edits: Mapping[str, Edit],
    compute: ComputeType,
) -> dict[str, str]:
    """Write the graphs that others are compared with; role → file name."""
    graphs = {"reference": "reference.onnx"}
    _copy(source, folder / graphs["reference"])
    if edits:
        graphs["folded"] = "folded.onnx"
        folded = graph.copy()
        fold_graph(folded, edits)
        save(folded, folder / graphs["folded"])
    if compute is ComputeType.FLOAT32:
        return graphs
    role = f"reference_{compute}"
    graphs[role] = f"reference.{compute}.onnx"
    if narrow_source is not None:
        _copy(narrow_source, folder / graphs[role])
    elif (narrowed := _narrowed(graph, compute)[0]) is not None:
        save(narrowed, folder / graphs[role])
    return graphs


def _copy(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def _narrowed(graph: Graph, compute: ComputeType) -> tuple[Graph | None, tuple[PassRecord, ...]]:
    """A copy of the graph in its 16-bit type; None if it is to compute in float32."""
    if compute is ComputeType.FLOAT32:
        return None, ()
    narrowed = graph.copy()
    return narrowed, run_passes(narrowed, [SetPrecision(compute.value)])


def _save_quantized(
    graph: Graph,
    narrowed: Graph | None,
    folder: Path,
    file: WeightFile,
    sources: WeightSources,
    progress: Progress,
    executor: Executor,
) -> tuple[dict[str, str], tuple[tuple[QuantizedLinear, ...], str], tuple[PassRecord, ...]]:
    """Write the weight file and the graphs that read it: for the CPU, and in the 16-bit type."""
    casts = () if narrowed is None else stored_casts(narrowed)
    written = write_weights(file, sources, casts, progress, executor)
    graphs = {"float32": "model.onnx"}
    file.place(graph)
    records = run_passes(graph, [UseUnsignedActivations()])
    save(graph, folder / graphs["float32"])
    if narrowed is not None:
        role = sources.compute.value
        graphs[role] = f"model.{role}.onnx"
        file.place_casts(narrowed, casts)
        save(narrowed, folder / graphs[role])
    return graphs, written, records
