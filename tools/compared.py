"""What ``compare`` returns: figures of artifacts with their confidence intervals, and differences between artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bootstrap import CONFIDENCE, RESAMPLES, SEED, Interval

FORMAT, FORMAT_VERSION = "bismooth-compare", 1

SHOWN = {
    "kl": "#.3g",
    "kl_p99": "#.3g",
    "perplexity_ratio": ".4f",
    "top1": ".4f",
    "cosine_p5": ".5f",
    "sqnr_db": ".1f",
}
"""What a terminal shows of the figures, and how. The interval of the perplexity itself tells of the text."""


@dataclass(frozen=True)
class Estimate:
    """A figure, or a difference of two, with its confidence interval; ``None`` where there is but one window."""

    value: float
    interval: Interval | None

    @property
    def excludes_0(self) -> bool | None:
        return self.interval and self.interval.excludes(0.0)

    def to_json(self) -> dict[str, Any]:
        low, high = (self.interval.low, self.interval.high) if self.interval else (None, None)
        return {"value": self.value, "low": low, "high": high}

    def bounds(self, spec: str) -> str:
        """The interval in words; empty where there is none."""
        return f"{self.interval.low:{spec}}…{self.interval.high:{spec}}" if self.interval else ""


@dataclass(frozen=True)
class Compared:
    """One artifact against the reference.

    Attributes:
        artifact: The folder, as it was given.
        recipe: None for a float artifact.
        weights_bytes: INT8 weights, scales and 16-bit weights; None for a float artifact.
        figures: By name; none where the artifact's outputs are not finite.
        differences: By name of the figure, to the first artifact; none for that itself.
        engines: Of each engine in the artifact what ``build`` says of it, with ``build_seconds``.
        seconds: Wall time.
    """

    artifact: Path
    recipe: str | None
    weights_bytes: int | None
    figures: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    engines: tuple[Mapping[str, Any], ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "artifact": str(self.artifact),
            "recipe": self.recipe,
            "weights_bytes": self.weights_bytes,
            "figures": {name: figure.to_json() for name, figure in self.figures.items()},
            "differences": {
                name: item.to_json() | {"excludes_0": item.excludes_0} for name, item in self.differences.items()
            },
            "engines": [dict(engine) for engine in self.engines],
            "seconds": round(self.seconds, 2),
        }

    def figures_row(self) -> dict[str, Any]:
        """The figures, with the intervals below them."""
        shown = {
            name: f"{item.value:{spec}}\n{item.bounds(spec)}".rstrip()
            for name, spec in SHOWN.items()
            if (item := self.figures.get(name))
        }
        return {"artifact": str(self.artifact), **shown}

    def difference_rows(self) -> list[dict[str, Any]]:
        return [
            {"artifact": str(self.artifact), "figure": name, **item.to_json(), "excludes_0": item.excludes_0}
            for name, item in self.differences.items()
        ]

    def engine_rows(self) -> list[dict[str, Any]]:
        keys = ("engine_bytes", "kernels", "int8_linears", "int8_mac_share", "build_seconds")
        return [
            {
                "artifact": str(self.artifact),
                "engine": Path(engine["engine"]).name,
                **{key: engine[key] for key in keys},
            }
            for engine in self.engines
        ]


@dataclass(frozen=True)
class CompareResult:
    """Artifacts against one reference, on the same windows.

    Attributes:
        reference: The artifact whose float32 graph is the reference.
        windows, length: The text: windows of so many tokens.
        reference_perplexity: None where the outputs are no logits.
        artifacts: In the order in which they were given.
        notes: What to know when reading the figures, a sentence each.
        data: Where the text came from, with the SHA-256 of its tokens.
        tools: Versions.
    """

    reference: Path
    windows: int
    length: int
    reference_perplexity: float | None
    artifacts: tuple[Compared, ...]
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tools: Mapping[str, str] = field(default_factory=dict[str, str])

    def brief(self) -> dict[str, Any]:
        """What fits a terminal."""
        interval = f", {CONFIDENCE:.0%} intervals below the figures" if self.windows > 1 else ""
        differences = [row for item in self.artifacts for row in item.difference_rows()]
        engines = [row for item in self.artifacts for row in item.engine_rows()]
        made = [
            {"artifact": str(item.artifact), "recipe": item.recipe, "weights_bytes": item.weights_bytes}
            for item in self.artifacts
        ]
        return {
            "reference": f"float graph of {self.reference}",
            "text": f"{self.windows} windows of {self.length} tokens{interval}",
            **({} if self.reference_perplexity is None else {"reference_perplexity": self.reference_perplexity}),
            **({"notes": "\n".join(self.notes)} if self.notes else {}),
            "figures": [item.figures_row() for item in self.artifacts],
            **({"differences_from_the_first": differences} if differences else {}),
            "artifacts": made,
            **({"engines": engines} if engines else {}),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "reference": str(self.reference),
            "windows": self.windows,
            "length": self.length,
            **self.data,
            "reference_perplexity": self.reference_perplexity,
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "seed": SEED,
            "artifacts": [item.to_json() for item in self.artifacts],
            "notes": list(self.notes),
            "tools": dict(self.tools),
        }
