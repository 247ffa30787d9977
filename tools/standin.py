"""Make a model with the weight defect of LLaMA3-70B out of a healthy one, without changing its function.

Per-channel W8A8 breaks on LLaMA3-70B because a few input channels of Q, K, V, Gate and Up are one or two orders of
magnitude larger than the others in some blocks (arXiv 2408.15301, section 4). A stand-in has the same signature, made
in one of two ways:

``scale``: the gamma of a norm is divided by a factor in a few channels, and those columns of the linears behind it are
multiplied. NOTE: that is a diagonal rescale, which smoothing undoes by algebra, whatever the factor. It tests whether
the channels are found and folded right, and says nothing on how well the original can be repaired.

``rotate``: the residual stream is rotated so that walls meet outliers of the activations (``passes.rotation``), which
no scale per channel repairs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.artifact import Artifact
from ..export.errors import BismoothError
from ..export.folder import new_folder
from ..passes.fold import Edit, Factor, apply_edit, weight_edits
from ..passes.graph import Index, load, stored_place
from ..passes.linears import Layout, find_linears
from ..passes.open_graph import OpenGraph
from ..passes.sites import Site, find_sites
from ..passes.spec import SiteKind, StandinKind
from ..passes.walls import MAX_SHARE, channel_peaks
from ..passes.weight_reader import WeightReader
from .exporting import float_artifact
from .model_copy import Target, write_model
from .standin_rotate import rotate

RECORD = "standin.json"
_LARGEST = 1e6
_ROUNDING = 2.0**-8
"""Relative error of rounding to bfloat16; numbers of the other types that lose more have left their range."""


@dataclass(frozen=True)
class Planted:
    """Where walls were made: the norm, its channels, and the linears that read them."""

    site: str
    channels: tuple[int, ...]
    linears: tuple[str, ...]


@dataclass(frozen=True)
class StandinResult:
    """A folder with a stand-in, and what was done to the source.

    ``removed`` and ``outlier`` are as in :class:`.standin_rotate.Rotated`, None for kind ``scale``.
    """

    model: Path
    kind: StandinKind
    factor: float
    seed: int
    planted: tuple[Planted, ...]
    seconds: float
    removed: float | None = None
    outlier: float | None = None

    def to_json(self) -> dict[str, Any]:
        rotated = {"removed_energy": self.removed, "outlier_ratio": self.outlier}
        return {
            "model": str(self.model),
            "kind": str(self.kind),
            "factor": self.factor,
            "seed": self.seed,
            **(rotated if self.kind is StandinKind.ROTATE else {}),
            "planted": [asdict(item) for item in self.planted],
            "wall_seconds": self.seconds,
        }


def standin(
    source: str | Path,
    output: str | Path,
    *,
    kind: StandinKind = StandinKind.SCALE,
    factor: float = 100.0,
    channels: int = 4,
    blocks: Sequence[int] = (0, 1, 3),
    seed: int = 0,
    trust_remote_code: bool = False,
    force: bool = False,
) -> StandinResult:
    """Write a copy of a model with walls in the weights behind the norms of some blocks.

    Kind ``scale``: for each norm of the blocks, channels are drawn among those whose largest weight, over all linears
    that read them, is at least the median of all channels. Tensors keep their types: a power of two as factor changes
    no value but by that factor, any other one rounds.

    Kind ``rotate``: the channels of the residual stream are the same at all norms. Rotated tensors are float32, and a
    head that shares the embedding gets a weight of its own. The stream is measured on random tokens. One direction of
    it is removed, which changes what the model computes a little.

    Args:
        source: a Hugging Face folder or hub id, a GGUF file, or a float artifact of one.
        output: the folder to write: a Hugging Face model with a record of what was done in ``standin.json``.
        kind: how walls are made.
        factor: how many times as large channels become; for ``scale`` what gammas are divided by.
        channels: how many channels of each norm.
        blocks: numbers of the blocks, from 0.
        seed: chooses the channels, and for ``rotate`` the tokens and the walls.
        trust_remote_code: run Python code that comes with the model.
        force: replace a stand-in at ``output``.

    Raises:
        BismoothError: the source cannot be used, has no such blocks, no norms that factors fold into or no
            stream that can be rotated, an edited tensor does not fit its type, or ``output`` cannot be written.
    """
    start, output = time.perf_counter(), Path(output)
    _check_arguments(factor, channels)
    if Path(source).exists() and Path(source).resolve().is_relative_to(output.resolve()):
        raise BismoothError(f"{output}: is or holds what is read, {source}. Choose another output folder.")
    what = f"a stand-in with a {RECORD}"
    with (
        new_folder(output, what, force=force, replaceable=lambda path: (path / RECORD).is_file()) as folder,
        float_artifact(source, output.resolve().parent, trust_remote_code=trust_remote_code) as artifact,
    ):
        if artifact.manifest.architecture is None or "config.json" not in artifact.manifest.files:
            raise BismoothError(
                f"{source}: is no model that can be written again. Expected a Hugging Face model or a GGUF file, or an "
                "artifact of one."
            )
        prefixes = _block_prefixes(str(source), artifact, sorted(set(blocks)))
        if kind is StandinKind.ROTATE:
            rotated = rotate(artifact, folder, prefixes, channels, factor, seed)
            planted = tuple(Planted(norm, rotated.channels, behind) for norm, behind in rotated.linears.items())
            figures = {"removed": rotated.removed, "outlier": rotated.outlier}
        else:
            planted = _plant(artifact, folder, _sites_of(str(source), artifact, prefixes), factor, channels, seed)
            figures = {}
        result = StandinResult(output, kind, factor, seed, planted, time.perf_counter() - start, **figures)
        record = {key: value for key, value in result.to_json().items() if key not in ("model", "wall_seconds")}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    return result


def _check_arguments(factor: float, channels: int) -> None:
    if not 1 < factor <= _LARGEST:
        raise BismoothError(f"--factor {factor:g}: Expected a number above 1, and at most {_LARGEST:g}.")
    if channels < 1:
        raise BismoothError(f"--channels {channels}: Expected 1 or more.")


def _block_prefixes(source: str, artifact: Artifact, blocks: Sequence[int]) -> tuple[str, ...]:
    known = artifact.manifest.blocks
    count = len(known.kinds) if known else 0
    if outside := [block for block in blocks if not 0 <= block < count]:
        raise BismoothError(f"--blocks {outside[0]}: {source} has {count} blocks. Expected numbers below that.")
    return tuple(f"{known.prefix}.{block}." for block in blocks) if known else ()


def _sites_of(source: str, artifact: Artifact, prefixes: tuple[str, ...]) -> list[Site]:
    graph = load(artifact.graph("float32"))
    sites = find_sites(graph, find_linears(graph))[0]
    chosen = [site for site in sites if site.kind is SiteKind.NORM and site.name.startswith(prefixes)]
    if not chosen:
        raise BismoothError(
            f"{source}: no norm of these blocks ({', '.join(prefixes)}) has a gamma that factors fold into. "
            "Expected norms that nothing but linears read."
        )
    return chosen


def _plant(
    artifact: Artifact, folder: Path, sites: Sequence[Site], factor: float, channels: int, seed: int
) -> tuple[Planted, ...]:
    path = artifact.graph("float32")
    graph = load(path)
    linears = {linear.name: linear for linear in find_linears(graph)}
    index, reader, random = Index.of(graph), WeightReader(OpenGraph(graph)), np.random.default_rng(seed)
    factors: dict[str, Factor] = {}
    for site in sites:
        weights = [(partial(reader.blocks, linears[item.linear]), item.labels) for item in site.consumers]
        peaks = channel_peaks(weights, site.size)
        factors[site.name] = _draw(site, peaks, factor, channels, random)
    layouts: dict[str, Layout] = {linear.weight: linear.layout for linear in linears.values()}
    targets = {
        stored_place(index, name, path.parent): [Target(_Scale(edit, layouts.get(name)))]
        for name, edit in weight_edits(sites, factors).items()
    }
    write_model(artifact, folder, targets)
    return tuple(
        Planted(
            site.name,
            tuple(np.flatnonzero(factors[site.name] != 1).tolist()),
            tuple(item.linear for item in site.consumers),
        )
        for site in sites
    )


def _draw(site: Site, peaks: NDArray[np.float64], factor: float, channels: int, random: np.random.Generator) -> Factor:
    """The divisor of the site's channels: ``factor`` on those that are drawn."""
    candidates = np.flatnonzero(site.free & (peaks >= np.median(peaks)))
    most = min(len(candidates), int(site.size * MAX_SHARE))
    if channels > most:
        raise BismoothError(
            f"--channels {channels}: Expected at most {most} of the {site.size} channels of {site.name}. More of them "
            "are no walls, but an uneven matrix."
        )
    result = np.ones(site.size)
    result[random.choice(candidates, channels, replace=False)] = factor
    return result


@dataclass(frozen=True, eq=False)
class _Scale:
    """What is done to a stored tensor: a weight with a layout, or a gamma without."""

    edit: Edit
    layout: Layout | None

    def dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        return stored

    def apply(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        """The changed tensor in its own type."""
        changed = apply_edit(values, self.edit, self.layout)
        stored = changed.astype(values.dtype)
        if not (np.abs(stored.astype(np.float32) - changed) <= _ROUNDING * np.abs(changed)).all():
            raise BismoothError(
                f"{name}: some of its values leave the range of {values.dtype} when they are scaled. Expected a "
                "smaller --factor, or a model in bfloat16 or float32."
            )
        return stored
