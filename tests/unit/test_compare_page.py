"""The page of compare: what stands in its figures and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bismooth.tools.bootstrap import Interval
from bismooth.tools.compare_page import comparison_page
from bismooth.tools.compared import Compared, CompareResult, Estimate
from bismooth.tools.page import Page, Panel, Table

ENGINE = {
    "engine": "a/engines/null",
    "engine_bytes": 2_000_000,
    "kernels": 3,
    "int8_linears": 2,
    "int8_mac_share": 1.0,
    "build_seconds": 1.25,
}


def estimate(value: float, spread: float = 0.01) -> Estimate:
    return Estimate(value, Interval(value - spread, value + 2 * spread))


def item(name: str, figures: Mapping[str, Estimate], differences: Mapping[str, Estimate] = {}) -> Compared:
    engines = (ENGINE,) if name == "a" else ()
    return Compared(Path(name), "w8a8", 3_000_000, figures, differences, engines, 1.0)


def page(*items: Compared, notes: tuple[str, ...] = (), perplexity: float | None = 19.5) -> Page:
    found = comparison_page(CompareResult(Path("ref"), 16, 512, perplexity, items, notes))
    assert json.dumps(asdict(found), allow_nan=False)
    return found


def panel(page: Page, section: str) -> Panel:
    (found,) = (section_ for section_ in page.sections if section_.title == section)
    (panel,) = (block for block in found.blocks if isinstance(block, Panel))
    return panel


def table(page: Page, section: str) -> Table:
    (found,) = (section_ for section_ in page.sections if section_.title == section)
    (table,) = (block for block in found.blocks if isinstance(block, Table))
    return table


def trace(panel: Panel, view: int = 0) -> Mapping[str, Any]:
    (figure,) = panel.views[view].figures
    (trace,) = figure.traces
    return trace


def two() -> Page:
    return page(
        item("a", {"kl": estimate(0.03), "perplexity": estimate(20), "top1": estimate(0.9)}),
        item("b", {"kl": estimate(0.02), "perplexity": estimate(20), "top1": estimate(0.8)}, {"kl": estimate(-0.01)}),
        notes=("A note.",),
    )


def test_every_figure_has_a_view_with_its_intervals() -> None:
    figures = panel(two(), "Distance from the reference")
    assert [view.name for view in figures.views] == ["KL divergence", "top-1 agreement"]
    points = trace(figures)
    assert (points["x"], points["y"]) == ([0.03, 0.02], ["a", "b"])
    assert points["error_x"]["array"] == pytest.approx([0.02, 0.02])
    assert points["error_x"]["arrayminus"] == pytest.approx([0.01, 0.01])
    assert table(two(), "Distance from the reference").rows[1] == (
        "b",
        "0.0200 (0.0100…0.0400)",
        "0.8000 (0.7900…0.8200)",
    )


def test_differences_stand_beside_0() -> None:
    differences = panel(two(), "Differences from the first")
    assert (trace(differences)["x"], trace(differences)["y"]) == ([-0.01], ["b"])
    axis = differences.views[0].figures[0].layout["xaxis"]
    assert (axis["title"]["text"], axis["rangemode"]) == ("KL divergence less that of a", "tozero")


def test_the_verdict_names_the_closest() -> None:
    assert two().verdict == "Closest to the reference is b: KL divergence 0.0200 (0.0100…0.0400). A note."
    assert two().facts == {"windows": "16", "tokens each": "512", "reference perplexity": "19.5"}
    features = page(item("a", {"sqnr_db": estimate(30, 1)}), item("b", {"sqnr_db": estimate(20, 1)}), perplexity=None)
    assert features.verdict == "Closest to the reference is a: signal to noise 30.0 (29.0…32.0)."
    assert features.good
    assert "reference perplexity" not in features.facts


def test_sizes_and_engines() -> None:
    assert table(two(), "Artifacts").rows[0] == ("a", "w8a8", "3.0 MB")
    assert table(two(), "Engines").rows == [("a", "null", 2.0, 3, 2, 1.0, "1.2 s")]


def test_an_artifact_without_figures() -> None:
    broken = page(item("x", {}), item("y", {"kl": estimate(0.02)}), notes=("x: holds NaN.",))
    assert not broken.good
    assert trace(panel(broken, "Distance from the reference"))["y"] == ["y"]
    assert table(broken, "Distance from the reference").rows[0] == ("x", "–")
    assert [section.title for section in broken.sections] == ["Distance from the reference", "Artifacts"]
    nothing = page(item("x", {}), notes=("x: holds NaN.",))
    assert (nothing.verdict, [section.title for section in nothing.sections]) == ("x: holds NaN.", ["Artifacts"])


def test_what_is_infinite_is_not_drawn() -> None:
    infinite = Estimate(math.inf, Interval(math.inf, math.inf))
    half = Estimate(30.0, Interval(29.0, math.inf))
    found = page(item("x", {"sqnr_db": infinite}), item("y", {"sqnr_db": half}, {"sqnr_db": infinite}))
    points = trace(panel(found, "Distance from the reference"))
    assert (points["y"], points["error_x"]["array"], points["error_x"]["arrayminus"]) == (["y"], [0], [1])
    assert trace(panel(found, "Differences from the first"))["y"] == []
    assert table(found, "Distance from the reference").rows[0] == ("x", "inf (inf…inf)")


def test_one_window_has_no_bars() -> None:
    single = CompareResult(Path("ref"), 1, 512, 19.5, (item("x", {"kl": Estimate(0.02, None)}),))
    found = comparison_page(single)
    assert trace(panel(found, "Distance from the reference"))["error_x"]["visible"] is False
    assert table(found, "Distance from the reference").rows[0] == ("x", "0.0200")
    assert "intervals" not in found.sections[0].text
