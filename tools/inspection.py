"""What ``inspect`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHOWN = 10
"""Rows of a table on a terminal."""


@dataclass(frozen=True)
class Inspection:
    """What a path holds.

    Attributes:
        document: Everything, as plain data.
        shown: What of it fits a terminal.
        failures: What makes it unusable, a sentence each.
    """

    document: Mapping[str, Any]
    shown: Mapping[str, Any]
    failures: tuple[str, ...] = ()

    def brief(self) -> dict[str, Any]:
        return {**self.shown, "failures": list(self.failures)}

    def to_json(self) -> dict[str, Any]:
        return {**self.document, "failures": list(self.failures)}
