"""An engine to bench: what its folder says of it, before it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engines.base import EngineRecord, audit_path
from ..engines.bundle import Bundle, BundledEngine
from ..engines.bundle_choice import choose_engine
from ..engines.bundle_manifest import MANIFEST as BUNDLE
from ..engines.publish import read_audit, read_record
from ..engines.tensorrt_runtime import RUNTIMES
from ..export.errors import BismoothError
from ..export.graph_names import INPUT_IDS
from .cost import CostModel
from .engine_folder import engine_of, file_of
from .roofline import Gpu
from .text_model import engine_folder


@dataclass(frozen=True)
class Case:
    """What is measured: a batch of prompts of one length, and the tokens that follow each."""

    batch: int
    prompt_length: int
    new_tokens: int

    @property
    def positions(self) -> int:
        """Positions of a row at the end; the last new token is not read any more."""
        return self.prompt_length + self.new_tokens - 1

    def __str__(self) -> str:
        return f"{self.batch} × {self.prompt_length}"


@dataclass(frozen=True)
class Subject:
    """An engine, in a folder of its own or in a bundle.

    Attributes:
        path: the folder, as it was given.
        name: what of the path tells it from the others.
        engine: which engine it is, as ``build --engine`` names it.
        cost: of its steps; None where that cannot be told, and ``problem`` says why.
    """

    path: Path
    name: str
    engine: str
    record: EngineRecord
    cost: CostModel | None
    problem: str = ""

    @property
    def runs_on_gpu(self) -> bool:
        return self.engine in RUNTIMES

    @property
    def runtime(self) -> str:
        return f"{self.record.runtime} {self.record.version}"

    @property
    def recipe(self) -> str | None:
        """The recipe by which it was quantized; None for a float engine."""
        return self.record.source.get("recipe")

    def is_for(self, gpu: Gpu) -> bool:
        """Whether it may run on this GPU, as far as is on record: TensorRT does not say for which one it built."""
        capabilities = self.record.capabilities
        return gpu.capability in capabilities if capabilities else self.runs_on_gpu

    def check(self, cases: Sequence[Case]) -> None:
        """See that the engine takes the cases, as far as its record tells.

        Raises:
            BismoothError: it keeps no caches, or has no room for that many rows or positions.
        """
        if not self.runs_on_gpu:
            return
        caches = self.record.caches
        if caches is None:
            raise BismoothError(
                f"{self.path}: has no caches, so it cannot generate text. Export the model with --kv-cache and build "
                "the engine again."
            )
        smallest, _, largest = self.record.shapes[INPUT_IDS]
        for case in cases:
            if not smallest[0] <= case.batch <= largest[0]:
                raise BismoothError(
                    f"--batch {case.batch}: {self.path} takes {smallest[0]} to {largest[0]} rows. "
                    "Choose another size, or build the engine for more with --batch."
                )
        check_room(self.path, caches.capacity, cases)


def load_subjects(engines: Sequence[str | Path], *, estimate: bool = False) -> tuple[Subject, ...]:
    """The engines of these folders; of a bundle the one that runs best here, or to ``estimate`` the first for a GPU.

    Raises:
        BismoothError: none, one of them twice, or one that is no whole engine folder or bundle.
    """
    if not engines:
        raise BismoothError("bench: Expected one or more engine folders or bundles, got none.")
    seen: dict[Path, Path] = {}
    for path in map(Path, engines):
        if (first := seen.setdefault(path.resolve(), path)) is not path:
            raise BismoothError(f"{path}: is given twice, as {first} before. Expected each engine once.")
    paths = [Path(path) for path in engines]
    names = short_names(paths)
    return tuple(_load(path, name, estimate=estimate) for path, name in zip(paths, names, strict=True))


def short_names(paths: Sequence[Path]) -> list[str]:
    """The paths without the folders that all begin with, and without those that all end with; of one its last part."""
    parts = [path.parts for path in paths]
    if len(parts) == 1:
        return [paths[0].resolve().name]
    start = _common(parts)
    end = _common([part[start:][::-1] for part in parts])
    return [str(Path(*part[start : len(part) - end])) for part in parts]


def _common(parts: Sequence[tuple[str, ...]]) -> int:
    """How many first parts are those of all, but for one that each keeps."""
    shortest = min(map(len, parts)) - 1
    return next((place for place in range(shortest) if len({part[place] for part in parts}) > 1), max(shortest, 0))


def check_room(path: Path, capacity: int, cases: Sequence[Case]) -> None:
    """Raise :class:`BismoothError` if a case needs more positions than ``capacity``."""
    for case in cases:
        if case.positions > capacity:
            raise BismoothError(
                f"{path}: has room for {capacity} positions per row. --prompt-length {case.prompt_length} with "
                f"--new-tokens {case.new_tokens} takes {case.positions}. Choose less. Engines for a GPU can "
                "be built with a larger --capacity."
            )


def _load(path: Path, name: str, *, estimate: bool) -> Subject:
    if (path / BUNDLE).is_file():
        bundle = Bundle.load(path, "size")
        chosen = _of_bundle(bundle, estimate=estimate)
        return _subject(path, name, chosen.runtime, path / chosen.file, bundle.manifest["dims"])
    folder = engine_folder(path)
    return _subject(path, name, engine_of(folder), file_of(folder), folder.manifest.dims)


def _of_bundle(bundle: Bundle, *, estimate: bool) -> BundledEngine:
    for_gpus = [engine for engine in bundle.engines if engine.runtime in RUNTIMES]
    if estimate and for_gpus:
        return for_gpus[0]
    try:
        return choose_engine(bundle).engine
    except BismoothError:  # opening it will say why none runs here
        return bundle.engines[0]


def _subject(path: Path, name: str, engine: str, file: Path, dims: Mapping[str, int]) -> Subject:
    record, audit = read_record(file), read_audit(audit_path(file))
    try:
        return Subject(path, name, engine, record, CostModel.of(audit, dims, str(path)))
    except BismoothError as error:
        return Subject(path, name, engine, record, None, str(error))
