"""Thresholds of verification, by hop, so that a failure names the hop it happened in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from ..export.errors import BismoothError
from .nearest import nearest


class Hop(StrEnum):
    """The steps from the source to the engine; each is compared with the one it names."""

    FLOAT = "float"
    """torch FP32 → ONNX FP32."""
    FOLDED = "folded"
    """ONNX FP32 → the float graph with smoothing folded in."""
    REFERENCE = "reference"
    """ONNX FP32 → the Q/DQ graph in float arithmetic."""
    INT8 = "int8"
    """The Q/DQ graph in float arithmetic → INT8 kernels in ONNX Runtime."""
    DECODE = "decode"
    """Whole windows → token by token with a cache; and greedy continuations, FP32 → INT8 kernels."""
    HALF = "half"
    """FP32 graphs → FP16 graphs, rounded to half at every edge."""
    AUDIT = "audit"
    """The Q/DQ graph → the kernels of the built engine."""
    DEVICE = "device"
    """FP16 engine → INT8 engine, on a GPU."""


def _at_most(hop: Hop) -> Any:
    return field(default=None, metadata={"hop": hop, "bound": "at most"})


def _at_least(hop: Hop) -> Any:
    return field(default=None, metadata={"hop": hop, "bound": "at least"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """One threshold per metric, ``None``: not judged. What each metric is stands in ``recipe.schema.json``."""

    float_error: float | None = _at_most(Hop.FLOAT)
    float_kl: float | None = _at_most(Hop.FLOAT)
    folded_error: float | None = _at_most(Hop.FOLDED)
    kl: float | None = _at_most(Hop.REFERENCE)
    kl_p99: float | None = _at_most(Hop.REFERENCE)
    perplexity_ratio: float | None = _at_most(Hop.REFERENCE)
    top1: float | None = _at_least(Hop.REFERENCE)
    top1_stable: float | None = _at_least(Hop.REFERENCE)
    cosine_p5: float | None = _at_least(Hop.REFERENCE)
    int8_kl_vs_reference: float | None = _at_most(Hop.INT8)
    decode_kl: float | None = _at_most(Hop.DECODE)
    greedy_agreement: float | None = _at_least(Hop.DECODE)
    half_max_ratio: float | None = _at_most(Hop.HALF)
    int8_mac_share: float | None = _at_least(Hop.AUDIT)
    device_kl: float | None = _at_most(Hop.DEVICE)

    @staticmethod
    def hop(name: str) -> Hop:
        """The hop that the gate ``name`` judges.

        Raises:
            BismoothError: there is no such gate.
        """
        return _metadata(name)["hop"]

    def missed(self, name: str, value: float) -> str | None:
        """The sentence to report if ``value`` misses the gate ``name``, else ``None``. NaN misses any gate that is set.

        Raises:
            BismoothError: there is no such gate.
        """
        metadata = _metadata(name)
        limit = self.to_dict()[name]
        if limit is None or (value >= limit if metadata["bound"] == "at least" else value <= limit):
            return None
        return f"{metadata['hop']}: {name} is {value:.6g}. Expected {metadata['bound']} {limit:g}."

    def replaced(self, limits: Mapping[str, float | None]) -> Gates:
        """These gates with some limits changed.

        Raises:
            BismoothError: there is no such gate, or a limit is out of range.
        """
        for name, limit in limits.items():
            share = _metadata(name)["bound"] == "at least"
            if limit is not None and not (0 <= limit <= 1 if share else limit >= 0):
                expected = "a share from 0 to 1" if share else "0 or more"
                raise BismoothError(f"gates: {name}: Expected {expected}, got {limit:g}.")
        return replace(self, **limits)

    def to_dict(self) -> dict[str, float | None]:
        """Limits by name, in the order of the hops."""
        return asdict(self)


_METADATA: dict[str, Mapping[str, Any]] = {gate.name: gate.metadata for gate in fields(Gates)}


def _metadata(name: str) -> Mapping[str, Any]:
    if name not in _METADATA:
        raise BismoothError(f"gates: There is no gate {name!r}.{nearest(name, _METADATA)}")
    return _METADATA[name]
