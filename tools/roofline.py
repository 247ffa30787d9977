"""Lower bounds of how long a step takes on a GPU, from what its vendor publishes.

Roofline (Williams, Waterman, Patterson: Roofline: An Insightful Visual Performance Model for Multicore Architectures,
CACM 2009): a step takes at least as long as reading its bytes at the memory's bandwidth, and at least as long as its
operations at the peak rates of their types.

NOTE: nothing of this is measured. Caches that hold weights between steps would beat the bound, where a model is that
small.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from ..export.errors import BismoothError
from .cost import CostModel, StepCost

Phase = Literal["prefill", "decode"]

ESTIMATE = "An upper bound from published figures of the GPU and the audited engine: estimated, not measured."

_FILE = Path(__file__).with_name("gpus.yaml")


@dataclass(frozen=True)
class Gpu:
    """Published figures of a GPU.

    Attributes:
        name: as users write it; case, blanks and hyphens do not matter.
        capability: compute capability, 86 for SM86.
        memory_gb: 10^9 bytes.
        gb_per_second: memory bandwidth, 10^9 bytes per second.
        float16_tops, int8_tops: dense products on tensor cores, 10^12 operations per second.
        source: where the vendor publishes them.
        note: what else to know of the figures.
    """

    name: str
    capability: int
    memory_gb: float
    gb_per_second: float
    float16_tops: float
    int8_tops: float
    source: str
    note: str = ""

    def seconds(self, cost: StepCost) -> tuple[float, float]:
        """At least what reading the step's bytes takes, and what its operations take.

        Float32 products count as float16: no GPU here computes them faster.
        """
        reading = cost.bytes / (self.gb_per_second * 1e9)
        computing = cost.int8_operations / self.int8_tops + cost.float_operations / self.float16_tops
        return reading, computing / 1e12

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Bound:
    """The bound of one step on one GPU.

    Attributes:
        positions: tokens of the prompt, or positions that a new token sees.
        tokens: that the step reads or makes, of all rows.
    """

    gpu: Gpu
    phase: Phase
    batch: int
    positions: int
    tokens: int
    cost: StepCost

    @property
    def seconds(self) -> float:
        """The least that the step can take."""
        return max(self.gpu.seconds(self.cost))

    @property
    def limit(self) -> Literal["memory", "compute"]:
        reading, computing = self.gpu.seconds(self.cost)
        return "memory" if reading >= computing else "compute"

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu.name,
            "phase": self.phase,
            "batch": self.batch,
            "positions": self.positions,
            **self.cost.to_json(),
            "least_seconds": self.seconds,
            "most_tokens_per_second": self.tokens / self.seconds,
            "limit": self.limit,
        }


def bounds(gpu: Gpu, model: CostModel, batch: int, length: int, new_tokens: int) -> tuple[Bound, Bound]:
    """Of reading a prompt, and of a new token where half of the new ones are there."""
    context = length + new_tokens // 2
    return (
        Bound(gpu, "prefill", batch, length, batch * length, model.prefill(batch, length)),
        Bound(gpu, "decode", batch, context, batch, model.decode(batch, context)),
    )


@cache
def known_gpus() -> tuple[Gpu, ...]:
    """The GPUs of ``gpus.yaml``."""
    return tuple(Gpu(**entry) for entry in yaml.safe_load(_FILE.read_text("utf-8")))


def find_gpus(names: Sequence[str]) -> tuple[Gpu, ...]:
    """The GPUs of those names, each once.

    Raises:
        BismoothError: there are no figures of one of them; names those there are.
    """
    known = {_key(gpu.name): gpu for gpu in known_gpus()}
    for name in names:
        if _key(name) not in known:
            raise BismoothError(
                f"--gpu {name}: there are no figures of this GPU. "
                f"Expected some of: {', '.join(gpu.name for gpu in known_gpus())}."
            )
    return tuple(dict.fromkeys(known[_key(name)] for name in names))


def _key(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())
