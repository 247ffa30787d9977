"""What the stages return: frozen values with ``to_json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .meant import groups_of, quantize_stage

if TYPE_CHECKING:
    from ..engines.audit import Audit
    from ..engines.base import BuildResult
    from ..engines.chain import Chain
    from ..export.artifact import Artifact
    from ..passes.quantize import QuantizeResult
    from ..passes.recipe import Recipe
    from .verify import VerifyResult


@dataclass(frozen=True)
class Listing:
    """The built-in recipes."""

    recipes: tuple[Recipe, ...]

    def to_json(self) -> dict[str, Any]:
        return {"recipes": [{"name": recipe.name, "description": recipe.description} for recipe in self.recipes]}


@dataclass(frozen=True)
class ExportResult:
    """A float artifact: its folder, the model's class, its graphs, the bytes of its weights, and the time taken."""

    artifact: Path
    architecture: str | None
    graphs: tuple[str, ...]
    linears: int
    weights_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "artifact": str(self.artifact),
            "architecture": self.architecture,
            "graphs": list(self.graphs),
            "linears": self.linears,
            "weights_bytes": self.weights_bytes,
            "wall_seconds": self.seconds,
        }


@dataclass(frozen=True)
class CalibrateResult:
    """A statistics file, and what it was made from."""

    statistics: Path
    values: int
    windows: int
    length: int
    data_sha256: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "statistics": str(self.statistics),
            "values": self.values,
            "windows": self.windows,
            "length": self.length,
            "data_sha256": self.data_sha256,
            "wall_seconds": self.seconds,
        }


@dataclass(frozen=True)
class QuantizeStageResult:
    """A quantized artifact."""

    artifact: Path
    recipe: str
    result: QuantizeResult
    weights_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        result = self.result
        return {
            "artifact": str(self.artifact),
            "recipe": self.recipe,
            "quantized_linears": len(result.linears),
            "float_linears": list(result.float_linears),
            **groups_of([asdict(linear) for linear in result.linears], result.broken),
            "sites_folded": sum(choice.channels > 0 for choice in result.choices),
            "sites_found": len(result.choices),
            "largest_fold_error": max(result.fold_errors.values(), default=0.0),
            "weights_bytes": self.weights_bytes,
            "wall_seconds": self.seconds,
        }


def decode_figures(audit: Audit) -> dict[str, int]:
    """The kernels that an engine with caches runs for one token per row; others run only what the audit itself says."""
    return {
        name: value
        for figures in audit.others
        for name, value in (("decode_kernels", figures.kernels), ("decode_fused_attention", figures.fused_attention))
    }


def part_rows(chain: Chain, audit: Audit) -> list[dict[str, Any]]:
    """A row per part; ``audit`` is that of the chain."""
    int8 = {linear.node for linear in audit.linears if linear.int8}
    return [
        {
            "part": part.name,
            "holds": part.holds if part.blocks is None else f"blocks {part.blocks[0]}-{part.blocks[1] - 1}",
            "weights_bytes": part.weights_bytes,
            "int8_linears": f"{len(int8.intersection(part.linears))} of {len(part.linears)}",
            "estimated_bytes": part.estimated_memory_bytes,
            "peak_rss_bytes": part.peak_rss_bytes,
        }
        for part in chain.parts
    ]


@dataclass(frozen=True)
class BuildStageResult:
    """An engine folder: its builder, what it is for, and the share of linear MACs that run as INT8 × INT8.

    Attributes:
        estimated: bytes that the largest build was expected to take; None for an engine that was there.
        chain: the parts, if it is no engine in one piece.
    """

    folder: Path
    result: BuildResult
    estimated: int | None = None
    chain: Chain | None = None

    def to_json(self) -> dict[str, Any]:
        audit, record = self.result.audit, self.result.record
        return {
            "engine": str(self.folder),
            "runtime": f"{record.runtime} {record.version}",
            "capabilities": list(record.capabilities),
            "engine_bytes": record.bytes,
            "int8_linears": sum(linear.int8 for linear in audit.linears),
            "linears": len(audit.linears),
            "int8_gemms": audit.int8_gemms,
            "kernels": audit.kernels,
            "fused_attention": audit.fused_attention,
            **decode_figures(audit),
            "int8_mac_share": audit.int8_share(with_head=False),
            "int8_mac_with_head_share": audit.int8_share(with_head=True),
            "wall_seconds": self.result.seconds,
            **self._memory(),
            **({} if self.chain is None else {"parts": part_rows(self.chain, audit)}),
        }

    def _memory(self) -> dict[str, int]:
        measured = {"estimated_memory_bytes": self.estimated, "peak_rss_bytes": self.result.peak_rss}
        return {name: value for name, value in measured.items() if value is not None}

    def to_row(self) -> dict[str, Any]:
        """The engine as a line of a table; ``share`` is that of linear MACs in INT8, without and with the head."""
        audit = self.result.audit
        return {
            "engine": self.folder.name,
            "engine_bytes": self.result.record.bytes,
            "int8_gemms": audit.int8_gemms,
            "int8_share": audit.int8_share(with_head=False),
            "with_head_share": audit.int8_share(with_head=True),
        }


@dataclass(frozen=True)
class CompileResult:
    """All stages of one run: the quantized artifact, its engines, the verdict.

    Attributes:
        kept: What an earlier run had made, as paths below the output folder.
    """

    artifact: Artifact
    engines: tuple[BuildStageResult, ...]
    verified: VerifyResult | None
    kept: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        stage = quantize_stage(self.artifact)
        document: dict[str, Any] = {
            "model": self.artifact.manifest.architecture,
            "artifact": str(self.artifact.path),
            "recipe": stage["recipe"]["name"],
            "quantized_linears": len(stage["quantized"]),
            "sites_folded": sum(site["channels"] > 0 for site in stage["sites"]),
            "sites_found": len(stage["sites"]),
            "kept": list(self.kept),
            "engines": [engine.to_json() for engine in self.engines],
        }
        if self.verified is not None:
            document |= self.verified.summary()
            document["hops"] = [hop.to_row() for hop in self.verified.hops]
            document["failures"] = list(self.verified.failures)
        document["verdict"] = "not verified" if self.verified is None else self.verified.verdict
        document["wall_seconds"] = self.seconds
        document["peak_rss_bytes"] = self.peak_rss_bytes
        return document

    def brief(self) -> dict[str, Any]:
        """What a terminal shows: single figures, then one line per engine and per hop."""
        document = self.to_json()
        document["engines"] = [engine.to_row() for engine in self.engines]
        failures = document.pop("failures", [])
        return {key: document.pop(key) for key in list(document) if key != "hops"} | document | {"failures": failures}
