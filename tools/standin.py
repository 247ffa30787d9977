"""Make a model with the weight defect of LLaMA3-70B out of a healthy one, without changing its function.

Per-channel W8A8 breaks on LLaMA3-70B because a few input channels of Q, K, V, Gate and Up are one or two orders of
magnitude larger than the others in some blocks (arXiv 2408.15301, section 4). A stand-in has the same signature: the
gamma of a norm is divided by a factor in a few channels, and those columns of the linears behind it are multiplied.

NOTE: that is a diagonal rescale, which smoothing undoes by algebra, whatever the factor. A stand-in tests whether the
channels are found and folded right. It says nothing on how well the original can be repaired.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.artifact import Artifact
from ..export.errors import BismoothError
from ..export.external_data import weight_files
from ..export.folder import new_folder
from ..export.safetensors_file import DTYPES, SafetensorsWriter, TensorEntry, read_header, read_tensor
from ..export.source import INDEX
from ..passes.fold import Edit, Factor, apply_edit, weight_edits
from ..passes.graph import Index, load, stored_place
from ..passes.linears import Layout, find_linears
from ..passes.sites import Site, find_sites
from ..passes.spec import SiteKind
from ..passes.walls import MAX_SHARE, channel_peaks
from ..passes.weight_reader import WeightReader
from . import console
from .exporting import float_artifact

RECORD = "standin.json"
_PIECE_BYTES = 1 << 24
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
    """A folder with a stand-in, and what was done to the source."""

    model: Path
    factor: float
    seed: int
    planted: tuple[Planted, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "kind": "scale",
            "factor": self.factor,
            "seed": self.seed,
            "planted": [asdict(item) for item in self.planted],
            "wall_seconds": self.seconds,
        }


def standin(
    source: str | Path,
    output: str | Path,
    *,
    factor: float = 100.0,
    channels: int = 4,
    blocks: Sequence[int] = (0, 1, 3),
    seed: int = 0,
    trust_remote_code: bool = False,
    force: bool = False,
) -> StandinResult:
    """Write a copy of a model with walls in the weights behind the norms of some blocks.

    For each norm of the blocks, channels are drawn among those whose largest weight, over all linears that read them,
    is at least the median of all channels. Tensors keep their types: a power of two as factor changes no value but by
    that factor, any other one rounds.

    Args:
        source: a Hugging Face folder or hub id, a GGUF file, or a float artifact of one.
        output: the folder to write: a Hugging Face model with a record of what was done in ``standin.json``.
        factor: what weights are multiplied and gammas divided by.
        channels: how many channels of each norm.
        blocks: numbers of the blocks, from 0.
        seed: chooses the channels.
        trust_remote_code: run Python code that comes with the model.
        force: replace a stand-in at ``output``.

    Raises:
        BismoothError: the source cannot be used, has no such blocks or no norms that factors fold into, an edited
            tensor does not fit its type, or ``output`` cannot be written.
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
        chosen = _sites_in_blocks(str(source), artifact, sorted(set(blocks)))
        planted = _plant(artifact, folder, chosen, factor, channels, seed)
        result = StandinResult(output, factor, seed, planted, time.perf_counter() - start)
        record = {key: value for key, value in result.to_json().items() if key not in ("model", "wall_seconds")}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    return result


def _check_arguments(factor: float, channels: int) -> None:
    if not 1 < factor <= _LARGEST:
        raise BismoothError(f"--factor {factor:g}: Expected a number above 1, and at most {_LARGEST:g}.")
    if channels < 1:
        raise BismoothError(f"--channels {channels}: Expected 1 or more.")


def _sites_in_blocks(source: str, artifact: Artifact, blocks: Sequence[int]) -> list[Site]:
    known = artifact.manifest.blocks
    count = len(known.kinds) if known else 0
    if outside := [block for block in blocks if not 0 <= block < count]:
        raise BismoothError(f"--blocks {outside[0]}: {source} has {count} blocks. Expected numbers from 0.")
    prefixes = tuple(f"{known.prefix}.{block}." for block in blocks) if known else ()
    graph = load(artifact.graph("float32"))
    sites = find_sites(graph, find_linears(graph))[0]
    chosen = [site for site in sites if site.kind is SiteKind.NORM and site.name.startswith(prefixes)]
    if not chosen:
        raise BismoothError(
            f"{source}: no norm of the blocks {', '.join(map(str, blocks))} has a gamma that factors fold into. "
            "Expected norms that nothing but linears read."
        )
    return chosen


def _plant(
    artifact: Artifact, folder: Path, sites: Sequence[Site], factor: float, channels: int, seed: int
) -> tuple[Planted, ...]:
    path = artifact.graph("float32")
    graph = load(path)
    linears = {linear.name: linear for linear in find_linears(graph)}
    index, reader, random = Index.of(graph), WeightReader(graph), np.random.default_rng(seed)
    factors: dict[str, Factor] = {}
    for site in sites:
        weights = [(partial(reader.blocks, linears[item.linear]), item.labels) for item in site.consumers]
        peaks = channel_peaks(weights, site.size)
        factors[site.name] = _draw(site, peaks, factor, channels, random)
    layouts: dict[str, Layout] = {linear.weight: linear.layout for linear in linears.values()}
    changes = {
        stored_place(index, name, path.parent): _Change(edit, layouts.get(name))
        for name, edit in weight_edits(sites, factors).items()
    }
    _write_model(artifact, weight_files(path), folder, changes)
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
class _Change:
    """What is done to a stored tensor: a weight with a layout, or a gamma without."""

    edit: Edit
    layout: Layout | None

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


def _write_model(
    artifact: Artifact, files: Mapping[str, Path], folder: Path, changes: dict[tuple[str, int], _Change]
) -> None:
    """The model's files with some tensors changed, one tensor (or a piece of one) in memory at a time."""
    for name in artifact.manifest.files:
        if Path(name).suffix not in (".onnx", ".safetensors"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.path / name, folder / name)
    headers = {name: read_header(path) for name, path in files.items()}
    total, done = sum(map(len, headers.values())), 0
    with console.progress() as progress:
        for name, entries in headers.items():
            declared = [(entry.name, DTYPES[entry.dtype], entry.shape) for entry in entries.values()]
            with SafetensorsWriter(folder / name, declared, {"format": "pt"}) as writer:
                for entry in entries.values():
                    change = changes.get((name, entry.offset))
                    if change is None:
                        writer.write_pieces(entry.name, _pieces(files[name], entry))
                    else:
                        writer.write(entry.name, change.apply(read_tensor(files[name], entry), entry.name))
                    progress("write model", done := done + 1, total)
    if len(files) > 1:
        names = {tensor: name for name, entries in headers.items() for tensor in entries}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}, indent=2) + "\n", "utf-8")


def _pieces(path: Path, entry: TensorEntry) -> Iterator[NDArray[Any]]:
    dtype = DTYPES[entry.dtype]
    step = _PIECE_BYTES // dtype.itemsize * dtype.itemsize
    for start in range(0, entry.length, step):
        count = min(step, entry.length - start) // dtype.itemsize
        yield np.fromfile(path, dtype, count, offset=entry.offset + start)
