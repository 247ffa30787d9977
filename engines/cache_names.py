"""The names by which graphs and engines of language models with caches know their inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable

from ..export.cache_names import is_past

INPUT_IDS, ATTENTION_MASK, POSITION_IDS = "input_ids", "attention_mask", "position_ids"
LOGITS = "logits"
CACHE_LENGTHS = ("past", "total")
"""The dimensions of graphs that count the positions before a run, and those after it."""

WRITE_INDICES = "write_indices"
"""Engines alone: where the first new position of each row goes, [batch]."""

LOGITS_AT = "logits_at"
"""Engines alone: new positions whose logits are computed, [kept]."""

KEPT = "kept"
"""The dimension that takes the place of ``sequence`` in the logits."""


def has_caches(inputs: Iterable[str]) -> bool:
    """Whether a graph with these inputs takes the keys and values of earlier positions."""
    return any(map(is_past, inputs))
