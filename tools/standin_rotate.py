"""The rotated stand-in: measures what the stream is like, chooses a basis, and writes the model in it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..calibrators.run import calibrate
from ..export.artifact import Artifact
from ..export.errors import BismoothError
from ..passes.graph import Index, load, stored_place
from ..passes.linears import Layout, Linear, find_linears
from ..passes.open_graph import OpenGraph
from ..passes.residual import Norm, Reader, Residual, find_residual
from ..passes.rotation import (
    Float,
    Rotation,
    Traffic,
    loud_directions,
    make_rotation,
    quiet_direction,
    second_moment,
    wall_heights,
)
from ..passes.walls import MAX_SHARE
from ..passes.weight_reader import WeightReader
from . import console
from .model_copy import Place, Target, write_model

_TOKENS_PER_CHANNEL = 4
"""Random tokens that the stream is measured on, per channel: enough to see which directions are quiet."""

_LENGTH = 128


@dataclass(frozen=True)
class Rotated:
    """What was done to a model.

    Attributes:
        channels: The channels with walls and outliers.
        linears: Per norm of the chosen blocks the linears with walls.
        removed: Share of the energy of the stream along the direction that was removed, the largest over these norms.
        outlier: Root mean square of x in those channels over that in the others, the smallest over these norms.
    """

    channels: tuple[int, ...]
    linears: Mapping[str, tuple[str, ...]]
    removed: float
    outlier: float


def rotate(
    artifact: Artifact, folder: Path, prefixes: tuple[str, ...], channels: int, factor: float, seed: int
) -> Rotated:
    """Write the model of a float artifact into ``folder``, rotated, with walls in the linears behind some norms.

    Args:
        artifact: what :func:`..exporting.float_artifact` gives.
        folder: an empty folder.
        prefixes: what the names of the norms begin with.
        channels: how many channels get walls.
        factor: how many times as large they are as the other weights.
        seed: chooses the tokens, the channels and the walls.

    Raises:
        BismoothError: the stream cannot be rotated, no norm has such a name, or there are too many channels.
    """
    path = artifact.graph("float32")
    graph = load(path)
    linears = find_linears(graph)
    residual = find_residual(graph, linears)
    readers = {
        norm: [reader.linear for reader in residual.readers if reader.norm == norm]
        for norm in residual.norms
        if norm.name.startswith(prefixes)
    }
    _check(residual, readers, channels)
    index, weights, random = Index.of(graph), WeightReader(OpenGraph(graph)), np.random.default_rng(seed)
    gammas = {norm: _gamma(index, norm) for norm in residual.norms}
    moments = _measure(artifact, list(readers), residual.width, random)
    traffic = [
        Traffic(moment, _gram(weights, readers[norm], gammas[norm]))
        for norm, moment in zip(readers, moments, strict=True)
    ]
    quiet = quiet_direction(traffic)
    loud = loud_directions(traffic, quiet, channels - 1)
    rotation = make_rotation(quiet, loud, random)
    plan = _Plan(index, path.parent, residual, rotation, gammas, {norm.node for norm in readers}, factor, seed)
    write_model(artifact, folder, plan.targets())
    _write_config(folder, plan.heads())
    return Rotated(
        rotation.channels,
        {norm.name: tuple(linear.name for linear in behind) for norm, behind in readers.items()},
        max(float(quiet @ item.x @ quiet) / residual.width for item in traffic),
        min(_outlier(item.x, rotation) for item in traffic),
    )


def _check(residual: Residual, readers: Mapping[Norm, Sequence[Linear]], channels: int) -> None:
    most = max(2, int(residual.width * MAX_SHARE))
    if not 2 <= channels <= most:
        raise BismoothError(
            f"--channels {channels}: Expected 2 to {most} of the {residual.width} channels of the residual stream: one "
            "alone cannot hold a wall and an outlier, and more are no walls, but an uneven matrix."
        )
    if not any(readers.values()):
        raise BismoothError(
            f"--blocks: these blocks have no norm between the residual stream and linears. It has "
            f"{len(residual.norms)}, first {', '.join(norm.name for norm in residual.norms[:3])}."
        )


def _measure(artifact: Artifact, norms: Sequence[Norm], width: int, random: np.random.Generator) -> Iterator[Float]:
    """E[x xᵀ] behind each norm without its gamma, over random tokens."""
    length = min(_LENGTH, artifact.manifest.dims.get("max_position_embeddings", _LENGTH))
    windows = -(-_TOKENS_PER_CHANNEL * width // length)
    ids = random.integers(artifact.manifest.dims["vocab_size"], size=(windows, length), dtype=np.int64)
    with tempfile.TemporaryDirectory() as temporary, console.progress() as progress:
        statistics = calibrate(
            artifact.path,
            dict.fromkeys((norm.x for norm in norms), width),
            ids,
            Path(temporary) / "statistics.safetensors",
            graph=artifact.graph("float32").name,
            rows=ids.size,
            progress=lambda _, done, total: progress("measure", done, total),
        )
        for norm in norms:
            yield second_moment(statistics.rows(norm.x), norm.epsilon)


def _gram(weights: WeightReader, linears: Sequence[Linear], gamma: Float) -> Float:
    """Wᵀ W over linears behind a norm, its gamma folded in."""
    total = np.zeros((gamma.size, gamma.size), np.float32)
    for linear in linears:
        for block in weights.blocks(linear):
            folded = block * gamma
            total += folded.T @ folded
    return total


def _gamma(index: Index, norm: Norm) -> Float:
    gamma = index.array(norm.gamma)
    assert gamma is not None, "find_residual refuses gammas that are computed"
    return gamma.astype(np.float32).reshape(-1)


def _outlier(moment: Float, rotation: Rotation) -> float:
    energy: Float = np.sum(rotation.basis * (moment @ rotation.basis), axis=0)
    inside = np.isin(np.arange(energy.size), rotation.channels)
    return float(np.sqrt(energy[inside].mean() / energy[~inside].mean()))


@dataclass(frozen=True, eq=False)
class _Plan:
    """Which stored tensors change, and how."""

    index: Index
    folder: Path
    residual: Residual
    rotation: Rotation
    gammas: Mapping[Norm, Float]
    walled: set[str]
    factor: float
    seed: int

    def targets(self) -> dict[Place, list[Target]]:
        """The changes by stored tensor: one of it under its own name; of a tied embedding also the head's."""
        targets: dict[Place, list[Target]] = {}
        for name, change in self.written():
            self.add(targets, name, Target(change))
        tied = self.heads()
        for place, reader in enumerate(self.residual.readers):
            new = f"{reader.linear.name}.weight" if reader.linear.name in tied else None
            self.add(targets, reader.linear.weight, Target(self.read(reader, place), new))
        return targets

    def add(self, targets: dict[Place, list[Target]], value: str, target: Target) -> None:
        targets.setdefault(stored_place(self.index, value, self.folder), []).append(target)

    def heads(self) -> frozenset[str]:
        """Names of the linears that share the table of an embedding."""
        tables = {embedding.weight for embedding in self.residual.embeddings}
        return frozenset(reader.linear.name for reader in self.residual.readers if reader.linear.weight in tables)

    def written(self) -> Iterator[tuple[str, _Turn | _Ones]]:
        """What goes into the stream, where v is removed from all that the chosen norms see; and the gammas."""
        last = max(self.index.order[node] for node in self.walled)
        full, silenced = self.rotation.basis, self.rotation.silenced
        for embedding in self.residual.embeddings:
            yield embedding.weight, _Turn(silenced, "NK")
        for linear in self.residual.writers:
            basis = silenced if self.index.order[linear.node] < last else full
            yield linear.weight, _Turn(basis, "KN" if linear.layout == "NK" else "NK")
            if linear.bias is not None:
                yield linear.bias.initializer, _Turn(basis, "NK")
        for norm in self.residual.norms:
            yield norm.gamma, _Ones()

    def read(self, reader: Reader, place: int) -> _Turn:
        linear, norm = reader.linear, reader.norm
        gamma = None if norm is None else self.gammas[norm]
        if norm is None or norm.node not in self.walled:
            return _Turn(self.rotation.basis, linear.layout, gamma)
        walls = _Walls(self.rotation, self.factor, (self.seed, place))
        return _Turn(self.rotation.basis, linear.layout, gamma, walls)


@dataclass(frozen=True, eq=False)
class _Walls:
    """c vᵀ, in the new basis, for a weight [N, d]."""

    rotation: Rotation
    factor: float
    seed: tuple[int, int]

    def of(self, weight: Float) -> Float:
        random = np.random.default_rng(self.seed)
        heights = wall_heights(weight, len(self.rotation.channels), self.factor, random)
        return np.outer(heights, self.rotation.wall)


@dataclass(frozen=True, eq=False)
class _Turn:
    """W → (W · gamma) R + walls, for the axis of a tensor that is the stream: the last in layout NK, else the first."""

    basis: Float
    layout: Layout
    gamma: Float | None = None
    walls: _Walls | None = None

    def dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        return np.dtype(np.float32)

    def apply(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        weight = (values if self.layout == "NK" else values.T).astype(np.float32)
        if self.gamma is not None:
            weight *= self.gamma
        turned = weight @ self.basis
        if self.walls is not None:
            turned += self.walls.of(weight)
        return turned if self.layout == "NK" else turned.T


@dataclass(frozen=True, eq=False)
class _Ones:
    """A gamma that was folded."""

    def dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        return stored

    def apply(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        return np.ones_like(values)


def _write_config(folder: Path, untied: frozenset[str]) -> None:
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    config["dtype"] = "float32"
    config.pop("torch_dtype", None)
    if untied:
        config["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
