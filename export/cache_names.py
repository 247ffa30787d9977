"""Names of a graph's inputs and outputs that hold keys and values: ``past_key_values.0.key``, ``present.0.key``."""

from __future__ import annotations

PAST, PRESENT = "past_key_values", "present"
PARTS = ("key", "value")


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
