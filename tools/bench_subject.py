"""An engine to bench: what its folder says of it, before it is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engines.base import EngineRecord, audit_path
from ..engines.cache_names import INPUT_IDS
from ..engines.publish import read_record
from ..engines.tensorrt_runtime import RUNTIMES
from ..export.errors import BismoothError
from .cost import CostModel
from .engines import engine_file
from .roofline import Gpu
from .shipped import engine_of
from .text_model import engine_folder
from .verify import read_audit


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
    """An engine folder.

    Attributes:
        path: as it was given.
        engine: which engine it is, as ``build --engine`` names it.
        cost: of its steps; None where that cannot be told, and ``problem`` says why.
    """

    path: Path
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


def load_subjects(engines: Sequence[str | Path]) -> tuple[Subject, ...]:
    """The engines of these folders.

    Raises:
        BismoothError: none, one of them twice, or one that is no whole engine folder.
    """
    if not engines:
        raise BismoothError("bench: Expected one or more engine folders, got none.")
    seen: dict[Path, Path] = {}
    for path in map(Path, engines):
        if (first := seen.setdefault(path.resolve(), path)) is not path:
            raise BismoothError(f"{path}: is given twice, as {first} before. Expected each engine once.")
    return tuple(map(_load, map(Path, engines)))


def check_room(path: Path, capacity: int, cases: Sequence[Case]) -> None:
    """Raise :class:`BismoothError` if a case needs more positions than ``capacity``."""
    for case in cases:
        if case.positions > capacity:
            raise BismoothError(
                f"{path}: has room for {capacity} positions per row. --prompt-length {case.prompt_length} with "
                f"--new-tokens {case.new_tokens} takes {case.positions}. Choose less, or build the engine with a "
                "larger --capacity."
            )


def _load(path: Path) -> Subject:
    folder = engine_folder(path)
    engine = engine_of(folder)
    file = path / engine_file(engine)
    record, audit = read_record(file), read_audit(audit_path(file))
    try:
        return Subject(path, engine, record, CostModel.of(audit, folder.manifest.dims, str(path)))
    except BismoothError as error:
        return Subject(path, engine, record, None, str(error))
