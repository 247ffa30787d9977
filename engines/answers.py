"""The stdout of a process that answers with JSON lines."""

from __future__ import annotations

import os
from typing import TextIO


def claim_stdout() -> TextIO:
    """The real stdout, for answers alone: what native code prints there goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers
