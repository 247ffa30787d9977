"""The first place where two records differ, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast


def difference(name: str, found: Any, wanted: Any) -> str | None:
    """The first place where plain data differ: ``recipe.gates.kl is 0.02, and would be 0.05``.

    Args:
        name: what both are called; empty for a whole record.
        found: what is there.
        wanted: what would be made now.
    """
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        old, new = cast(Mapping[str, Any], found), cast(Mapping[str, Any], wanted)
        for key in {**old, **new}:
            if text := difference(f"{name}.{key}" if name else key, old.get(key), new.get(key)):
                return text
        return None
    left, right = _shown(found), _shown(wanted)
    return None if left == right else f"{name} is {left}, and would be {right}"


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)
