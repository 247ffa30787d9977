"""What every engine builder takes and gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from ..export.errors import BismoothError
from ..export.graph_names import BATCH, PAST_LENGTH, SEQUENCE, TOTAL
from .audit import Audit

Shape = tuple[int, ...]
Logits = Literal["last", "all"]
"""Positions for which an engine computes logits."""

Shapes = Mapping[str, tuple[Shape, Shape, Shape]]
"""Of each input by name: minimum, optimum and maximum shape."""

_RECORD_TYPES = {"runtime": str, "version": str, "bytes": int, "sha256": str, "source": dict}


@dataclass(frozen=True)
class Span:
    """The sizes one dynamic dimension may have: from ``minimum`` to ``maximum``, and fastest at ``optimum``."""

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise BismoothError(
                "profile: expected 1 <= minimum <= optimum <= maximum, "
                f"got {self.minimum}, {self.optimum}, {self.maximum}."
            )


@dataclass(frozen=True)
class Profile:
    """The sizes an engine accepts, by symbolic name of the dimension: ``batch``, ``sequence`` and any ``others``.

    Attributes:
        capacity: of a graph with caches, positions that a row has room for.
    """

    batch: Span = Span(1, 1, 4)
    sequence: Span = Span(1, 128, 512)
    others: Mapping[str, Span] = field(default_factory=dict[str, Span])
    capacity: int | None = None

    def spans(self) -> dict[str, Span]:
        """Sizes of every dimension; where there are caches, they and the mask are as long as the capacity."""
        fixed = Span(self.capacity, self.capacity, self.capacity) if self.capacity else None
        lengths = dict.fromkeys((PAST_LENGTH, TOTAL), fixed) if fixed else {}
        return {BATCH: self.batch, SEQUENCE: self.sequence, **lengths, **self.others}

    def shapes(self, tensor: str, dimensions: tuple[int | str | None, ...]) -> tuple[Shape, Shape, Shape]:
        """Minimum, optimum and maximum shape of the input ``tensor``, whose dimensions are sizes or symbolic names.

        Raises:
            BismoothError: a dynamic dimension has no name, or one that this profile does not cover.
        """
        spans = [self._span(tensor, axis, dimension) for axis, dimension in enumerate(dimensions)]
        return tuple(s.minimum for s in spans), tuple(s.optimum for s in spans), tuple(s.maximum for s in spans)

    def _span(self, tensor: str, axis: int, dimension: int | str | None) -> Span:
        if isinstance(dimension, int):
            return Span(dimension, dimension, dimension)
        spans = self.spans()
        if dimension not in spans:
            raise BismoothError(
                f"profile: no sizes for dimension {axis} of input '{tensor}', named {dimension!r}. "
                f"Expected one of: {', '.join(spans)}. "
                "Name the dimension in the ONNX file, or add its sizes to the profile."
            )
        return spans[dimension]


@dataclass(frozen=True)
class BuildRequest:
    """One engine to build. Engines are always strongly typed: precision is what the ONNX graph says.

    Attributes:
        onnx: the graph; its external data lies in the same folder.
        engine: the file to write, with :func:`audit_path` beside it. Both are replaced only when the build succeeds.
        capabilities: compute capabilities (``86`` for SM86) of an ahead-of-time build; empty for the host's own GPU.
        meant_int8: linears that the recipe computes in INT8, by ONNX node: ``model.layers.0.self_attn.q_proj/MatMul``.
        allow_float: accept an engine in which some of ``meant_int8`` run in float; otherwise a :class:`GateError`.
        log: where to keep the builder's whole verbose log; ``None`` drops it.
        source: what the engine was made of (source hash, recipe, …), recorded with it.
        copy_weights: copy weight files that become part of an engine's folder, instead of linking them.
        logits: ``all`` positions, or the ``last`` of each row alone; ``None``: the last, if the graph has caches. For
            engines on a CPU: on a GPU a decoder says which it wants.
        part: a part of the graph, serialized, which is built in its place. If the profile has a capacity, it is a part
            of a model with caches, whether or not they are in it.
        placed: weight files that the engine's folder has already, from parts that were built before.
    """

    onnx: Path
    engine: Path
    capabilities: tuple[int, ...] = ()
    profile: Profile = Profile()
    meant_int8: frozenset[str] = frozenset()
    allow_float: bool = False
    log: Path | None = None
    source: Mapping[str, Any] = field(default_factory=dict[str, Any])
    copy_weights: bool = False
    logits: Logits | None = None
    part: bytes | None = None
    placed: frozenset[str] = frozenset()


WRITE_INDICES, LOGITS_AT = "write_indices", "logits_at"
"""Inputs of engines that keep caches, see :class:`Caches`."""

KEPT = "kept"
"""The dimension of logits in place of ``sequence``: as many positions as ``logits_at`` lists."""


@dataclass(frozen=True)
class Caches:
    """How an engine keeps the keys and values of earlier positions: in place, in buffers that its caller binds.

    The engine has two optimization profiles, one for prompts and one for single tokens. In a run, the new keys and
    values of each row are written where the input ``write_indices`` [batch] says, and nothing else is moved. Logits are
    those of the new positions that the input ``logits_at`` [kept] lists.

    Attributes:
        capacity: positions that a row has room for; also the length of ``attention_mask``.
        aliases: input → output, each [batch, heads, capacity, head size], bound to one buffer. It must not hold NaN.
        decode: shapes of the second profile, where they differ from the first's, which are the record's.
    """

    capacity: int
    aliases: Mapping[str, str]
    decode: Shapes

    def to_json(self) -> dict[str, Any]:
        return {
            "capacity": self.capacity,
            "aliases": dict(self.aliases),
            "decode": shapes_to_json(self.decode),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Caches:
        """Inverse of :meth:`to_json`; raises ``KeyError``, ``TypeError`` or ``ValueError`` on anything else."""
        if type(capacity := data["capacity"]) is not int:
            raise TypeError(f"capacity is {capacity!r}")
        return Caches(capacity, dict(data["aliases"]), shapes_from_json(data["decode"]))


@dataclass(frozen=True)
class EngineRecord:
    """What an engine file is: stored beside it, so that it can be checked before it is loaded.

    Attributes:
        shapes: input name → minimum, optimum and maximum shape; empty if any sizes do.
        sha256: of the engine file.
        caches: of an engine that decodes on a GPU.
    """

    runtime: str
    version: str
    capabilities: tuple[int, ...]
    shapes: Shapes
    bytes: int
    sha256: str
    source: Mapping[str, Any]
    caches: Caches | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "runtime": self.runtime,
            "version": self.version,
            "capabilities": list(self.capabilities),
            "shapes": shapes_to_json(self.shapes),
            "bytes": self.bytes,
            "sha256": self.sha256,
            "source": dict(self.source),
            **({"caches": self.caches.to_json()} if self.caches else {}),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> EngineRecord:
        """Inverse of :meth:`to_json`; raises ``KeyError``, ``TypeError`` or ``ValueError`` on anything else."""
        fields = dict(data)
        fields["capabilities"] = tuple(fields["capabilities"])
        fields["shapes"] = shapes_from_json(fields["shapes"])
        if "caches" in fields:
            fields["caches"] = Caches.from_json(fields["caches"])
        record = EngineRecord(**fields)
        for key, kind in _RECORD_TYPES.items():
            if type(value := getattr(record, key)) is not kind:
                raise TypeError(f"{key} is {value!r}")
        return record


@dataclass(frozen=True)
class BuildResult:
    """A finished build.

    Attributes:
        seconds: wall time.
        peak_rss: peak resident memory of the builder in bytes; ``None`` where the system does not tell.
    """

    engine: Path
    audit_file: Path
    record: EngineRecord
    audit: Audit
    seconds: float
    peak_rss: int | None


@dataclass(frozen=True)
class Phase:
    """Where a build is: the innermost phase, with ``done`` of ``total`` steps."""

    name: str
    done: int
    total: int


PhaseCallback = Callable[[Phase], None]


class EngineBuilder(Protocol):
    """Builds engines for one runtime."""

    @property
    def name(self) -> str:
        """What users call the runtime: ``tensorrt-rtx``."""
        ...

    def build(self, request: BuildRequest, on_phase: PhaseCallback | None = None) -> BuildResult:
        """Build, audit and store one engine; a build that fails writes nothing.

        Raises:
            BismoothError: the graph, the request or the machine does not permit the build.
            GateError: a linear that was meant to be INT8 is not, and ``request.allow_float`` is false.
        """
        ...


def shapes_to_json(shapes: Shapes) -> dict[str, list[list[int]]]:
    return {name: [list(shape) for shape in triple] for name, triple in shapes.items()}


def shapes_from_json(data: Mapping[str, list[list[int]]]) -> Shapes:
    """Inverse of :func:`shapes_to_json`; raises ``TypeError`` or ``ValueError`` on anything else."""
    return {name: _triple(shapes) for name, shapes in data.items()}


def _triple(shapes: list[list[int]]) -> tuple[Shape, Shape, Shape]:
    minimum, optimum, maximum = (tuple(shape) for shape in shapes)
    return minimum, optimum, maximum


def audit_path(engine: Path) -> Path:
    """The JSON file with an engine's record and audit: ``model.engine`` → ``model.audit.json``."""
    return engine.with_name(f"{engine.stem}.audit.json")
