"""What compare returns, as a table and as a report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from bismooth.tools import console
from bismooth.tools.bootstrap import Interval
from bismooth.tools.compared import Compared, CompareResult, Estimate

DOCS = Path(__file__).parents[2] / "docs/compare.md"
ENGINE: dict[str, Any] = {
    "engine": "a/engines/null",
    "engine_bytes": 2_000_000,
    "kernels": 3,
    "int8_linears": 2,
    "int8_mac_share": 1.0,
    "build_seconds": None,
}


def compared(
    name: str, kl: float, differences: Mapping[str, Estimate] = {}, engines: tuple[Mapping[str, Any], ...] = ()
) -> Compared:
    figures = {"kl": Estimate(kl, Interval(kl / 2, 2 * kl)), "perplexity": Estimate(20.0, None)}
    return Compared(Path(name), "w8a8", 3_000_000, figures, differences, engines, 1.0)


def result() -> CompareResult:
    less = {"kl": Estimate(-0.01, Interval(-0.02, 0.03)), "top1": Estimate(0.5, Interval(0.25, 0.75))}
    artifacts = (compared("a", 0.03, engines=(ENGINE,)), compared("b", 0.02, differences=less))
    return CompareResult(
        Path("ref"), 4, 16, 19.5, artifacts, ("One.", "Two."), {"data": ["text"], "data_sha256": "00"}, {"python": "3"}
    )


def table(result: CompareResult) -> str:
    terminal = Console(width=100)
    with terminal.capture() as capture:
        terminal.print(console.render(result))
    return capture.get()


def test_the_table() -> None:
    text = table(result())
    lines = [line.split() for line in text.splitlines()]
    assert ["a", "0.0300"] in lines
    assert ["0.0150…0.0600"] in lines
    assert ["b", "kl", "-0.01", "-0.02", "0.03", "no"] in lines
    assert ["b", "top1", "0.5", "0.25", "0.75", "yes"] in lines
    assert ["b", "w8a8", "3.0", "MB"] in lines
    assert ["a", "null", "2.0", "MB", "3", "2", "100.00%", "–"] in lines
    assert ["notes", "One."] in lines
    assert ["Two."] in lines
    assert "20.0" not in text, "the perplexity itself is not shown"


def test_a_table_without_figures() -> None:
    empty = Compared(Path("a"), None, None, {}, {}, (), 1)
    lines = [line.split() for line in table(CompareResult(Path("ref"), 1, 16, None, (empty,))).splitlines()]
    assert ["a", "–", "–"] in lines
    assert not any(line[:1] in (["differences"], ["engines"], ["notes"]) for line in lines)


def test_the_documented_keys_are_those_written() -> None:
    document = result().to_json()
    text = DOCS.read_text("utf-8").split("## Report")[1]
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(document)
    row = next(line for line in text.splitlines() if line.startswith("| `artifacts`"))
    assert set(re.findall(r"`(\w+)`", row)) == {"artifacts", *document["artifacts"][0]}
    difference = document["artifacts"][1]["differences"]["kl"]
    assert difference == {"value": -0.01, "low": -0.02, "high": 0.03, "excludes_0": False}
