"""The known word nearest to a mistyped one, for error messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?``, or `` Expected one of …`` where nothing comes near. Starts with a space."""
    names = list(known)
    if near := get_close_matches(word, names, n=1):
        return f" Did you mean {near[0]!r}?"
    return f" Expected one of {', '.join(names)}."
