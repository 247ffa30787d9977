"""Where two records differ, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

_FIRST = ("source", "files")
_EXPLAINED_BY = {
    "data_sha256": ("windows", "skip_windows", "length", "seed", "tokenizer_sha256"),
    "graph_sha256": _FIRST,
    "weights": _FIRST,
}
"""Hashes, and the values whose difference makes them differ."""


def difference(name: str, found: Any, wanted: Any) -> str | None:
    """Where plain data differ: ``recipe.gates.kl is 0.02, and would be 0.05; seed is 0, and would be 1``.

    Every value of a record is named that differs, with the first place in it; a hash only where nothing explains it.

    Args:
        name: what both are called; empty for a whole record.
        found: what is there.
        wanted: what would be made now.
    """
    return "; ".join(_differences(name, found, wanted)) or None


def _differences(name: str, found: Any, wanted: Any) -> list[str]:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        old, new = cast(Mapping[str, Any], found), cast(Mapping[str, Any], wanted)
        differing: dict[str, str] = {}
        for key in sorted({**old, **new}, key=lambda key: bool(name) or key not in _FIRST):
            if texts := _differences(f"{name}.{key}" if name else key, old.get(key), new.get(key)):
                differing[key] = texts[0]
        return [text for key, text in differing.items() if differing.keys().isdisjoint(_EXPLAINED_BY.get(key, ()))]
    left, right = _shown(found), _shown(wanted)
    return [] if left == right else [f"{name} is {left}, and would be {right}"]


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)
