"""The known word nearest to a mistyped one, for error messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?``, or nothing where no known word comes near. Starts with a space."""
    near = get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """:func:`did_you_mean`, or `` Expected one of …`` where no known word comes near."""
    names = list(known)
    return did_you_mean(word, names) or f" Expected one of {', '.join(names)}."
