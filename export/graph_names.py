"""Names of the inputs, outputs and dimensions of language models' graphs; each has one place here, and no other."""

from __future__ import annotations

from collections.abc import Iterable

INPUT_IDS, ATTENTION_MASK, POSITION_IDS = "input_ids", "attention_mask", "position_ids"
LOGITS = "logits"
PAST, PRESENT = "past_key_values", "present"
PARTS = ("key", "value")

BATCH, SEQUENCE, PAST_LENGTH, TOTAL = "batch", "sequence", "past", "total"
"""Dynamic dimensions; total = past + sequence."""


def cache_name(prefix: str, number: int, part: str) -> str:
    """The input (``PAST``) or the output (``PRESENT``) with the ``key`` or ``value`` of a layer."""
    return f"{prefix}.{number}.{part}"


def is_past(name: str) -> bool:
    """Whether an input holds keys or values of earlier positions."""
    return name.startswith(f"{PAST}.")


def is_present(name: str) -> bool:
    """Whether an output holds those of all positions, to be the input of the next run."""
    return name.startswith(f"{PRESENT}.")


def past_of(present: str) -> str:
    """The input that takes what the output ``present`` gave in the run before."""
    return PAST + present.removeprefix(PRESENT)


def has_caches(inputs: Iterable[str]) -> bool:
    """Whether a graph with these inputs takes the keys and values of earlier positions."""
    return any(map(is_past, inputs))
