"""The steps of the bench by size, and the rows of those that are finished."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..export.errors import BismoothError
from ..export.replacing import replacing

LARGE, WHOLE, STREAMED = "LLaMA3-70B shape", "SmolLM2-135M, whole", "SmolLM2-135M, streamed"
SMALL, TARGETS = "small", "targets"
"""Further steps: the small model, streamed and whole; and models of forecasts, as far as these need no weights."""

NO_BUDGET = "none"
"""In the place of a budget."""

FLOAT, QUANTIZED = "float", "quantized"
"""Names of artifacts, the latter of whichever recipe."""

LENGTH = 128
"""Tokens per window of the large models."""


@dataclass(frozen=True)
class Step:
    """A stage, as it is measured on a large model.

    Attributes:
        needs: the steps whose files it reads.
        windows: of text.
        makes: name of the artifact that it makes.
        recipe: of ``quantize``.
        rounds: how often it is measured: the median of the times counts, and the largest of the peaks.
        beside: what reads and writes as many bytes: ``cat`` reads the model, ``cat both`` the model and as much again
            as ``quantize`` wrote, ``cp`` reads the model and writes that much.
    """

    needs: tuple[str, ...] = ()
    windows: int = 0
    makes: str = ""
    recipe: str = ""
    rounds: int = 1
    beside: str | None = None

    @property
    def has_budget(self) -> bool:
        """Whether its command takes ``--memory``."""
        return bool(self.windows or self.recipe)

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return self.windows * LENGTH


ROUNDS = 3
"""Of short steps: how long the system takes for new pages varies by a factor of two, and peaks are high where two
threads have theirs at the same time."""

MORE = " more"
"""Ends the names of steps that run a second time, on more text, to tell the tokens' share of the time."""

STEPS: Mapping[str, Step] = {
    "export": Step(makes=FLOAT, rounds=ROUNDS, beside="cat"),
    "calibrate": Step(("export",), 4, beside="cat"),
    "calibrate more": Step(("export",), 16),
    "diagnose": Step(("export",), rounds=ROUNDS, beside="cat"),
    "convert": Step(("export",), makes=QUANTIZED, recipe="w8a8-per-channel", rounds=ROUNDS, beside="cp"),
    "quantize": Step(("export", "calibrate"), makes=QUANTIZED, recipe="w8a8", rounds=ROUNDS, beside="cp"),
    "verify": Step(("export", "calibrate", "quantize"), 4, beside="cat both"),
    "verify more": Step(("export", "calibrate", "quantize"), 16),
}
"""In their order. ``convert`` is ``quantize`` without the search for smoothing factors before it."""

BASELINES: Mapping[str, int] = {"cp": ROUNDS, "cat": 1, "cat both": 1}
"""Each with its rounds."""


@dataclass(frozen=True)
class Row:
    """A finished step: seconds of wall time, and bytes of peak memory and of the files that it left."""

    model: str
    blocks: int
    step: str
    seconds: float
    peak_bytes: int
    written_bytes: int = 0
    figures: Mapping[str, float] = field(default_factory=dict[str, float])


class Rows:
    """Rows of finished steps, on disk as soon as they are there."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, restart: bool = False) -> None:
        """Take up what ``path`` has, but for ``restart``.

        Raises:
            BismoothError: that is of other settings.
        """
        self.settings = dict(settings)
        self._path = path
        self._rows: dict[tuple[str, int, str], Row] = {}
        if restart or not path.is_file():
            return
        document = json.loads(path.read_text("utf-8"))
        for name, value in settings.items():
            if (had := document["settings"].get(name)) != value:
                raise BismoothError(
                    f"{path}: an unfinished bench had the {name} {had}, this one has {value}. Finish that one, or "
                    "discard it with --restart."
                )
        rows = [Row(**row) for row in document["rows"]]
        self._rows = {(row.model, row.blocks, row.step): row for row in rows}

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def get(self, model: str, blocks: int, step: str) -> Row | None:
        """The row of a step, if it is there."""
        return self._rows.get((model, blocks, step))

    def add(self, row: Row) -> None:
        """Keep it, in place of an earlier one of the same step."""
        self._rows[row.model, row.blocks, row.step] = row
        document = {"settings": self.settings, "rows": [asdict(row) for row in self]}
        with replacing(self._path) as path:
            path.write_text(json.dumps(document, indent=2) + "\n", "utf-8")

    def finish(self) -> None:
        """Forget what is on disk: the next bench measures all anew."""
        self._path.unlink(missing_ok=True)
