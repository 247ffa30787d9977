"""A chain: engines of consecutive parts of one graph, for models that are too large to be built in one piece.

The file ``chain.json`` says in which order the parts run, and which tensors go from one to the next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..export.errors import BismoothError

CHAIN = "chain.json"
FORMAT, FORMAT_VERSION = "bismooth-chain", 1


@dataclass(frozen=True)
class Carried:
    """A tensor that one part computes and the next reads.

    Attributes:
        name: in the graphs of both.
        type: of its elements, as numpy names it: ``float16``.
        shape: sizes, and names of those that vary.
    """

    name: str
    type: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class BuiltPart:
    """One engine of a chain.

    Attributes:
        name: ``part-00``, by which its files are called.
        holds: ``embedding``, ``blocks`` or ``head``.
        blocks: numbers of the first block, and of the one behind the last; none for what has no blocks.
        file: the engine, beside which its audit lies.
        sha256: of that file.
        reads: what the part before computes.
        gives: what the next part reads.
        inputs: names of all inputs, ``reads`` included.
        outputs: names of all outputs, ``gives`` included.
        linears: ONNX nodes of its linears.
        weights_bytes: bytes of the weights that its graph refers to.
        estimated_memory_bytes: of the builder, as estimated before.
        peak_rss_bytes: of the builder, as measured; None where the system does not tell.
        build_seconds: wall time.
    """

    name: str
    holds: str
    blocks: tuple[int, int] | None
    file: str
    sha256: str
    reads: Carried | None
    gives: Carried | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    linears: tuple[str, ...]
    weights_bytes: int
    estimated_memory_bytes: int
    peak_rss_bytes: int | None
    build_seconds: float

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> BuiltPart:
        """Inverse of ``asdict``; raises ``KeyError``, ``TypeError`` or ``ValueError`` on anything else."""
        fields = dict(data)
        for key in ("inputs", "outputs", "linears"):
            fields[key] = tuple(fields[key])
        if fields["blocks"] is not None:
            first, stop = fields["blocks"]
            fields["blocks"] = (first, stop)
        for key in ("reads", "gives"):
            if (carried := fields[key]) is not None:
                fields[key] = Carried(carried["name"], carried["type"], tuple(carried["shape"]))
        part = BuiltPart(**fields)
        if Path(part.file).name != part.file:
            raise ValueError(f"it names a file outside of its folder: {part.file}")
        return part


@dataclass(frozen=True)
class Chain:
    """Parts in the order in which they run."""

    parts: tuple[BuiltPart, ...]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": FORMAT_VERSION, "parts": [asdict(part) for part in self.parts]}

    @staticmethod
    def load(path: Path) -> Chain:
        """Read ``chain.json``.

        Raises:
            BismoothError: it is missing or damaged, or its parts do not fit together.
        """
        try:
            document = json.loads(path.read_text("utf-8"))
            if (document["format"], document["version"]) != (FORMAT, FORMAT_VERSION):
                raise ValueError(f"it is of format {document['format']!r}, version {document['version']!r}")
            chain = Chain(tuple(map(BuiltPart.from_json, document["parts"])))
            chain._check()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BismoothError(f"{path}: not a chain of engines: {error}. Build the engine again.") from error
        return chain

    def _check(self) -> None:
        if not self.parts:
            raise ValueError("it has no parts")
        for part, following in zip(self.parts, self.parts[1:], strict=False):
            if part.gives is None or part.gives != following.reads:
                raise ValueError(f"{following.name} does not read what {part.name} gives")
