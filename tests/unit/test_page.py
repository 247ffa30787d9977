"""Pages: one file that needs nothing else, whatever their text holds, and that replaces pages alone."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bismooth.export.errors import BismoothError
from bismooth.tools.cli_errors import explain
from bismooth.tools.page import Command, Figure, Page, Panel, Section, Table, View, check_page, rounded, write_page

NASTY = "</script><b>&\"'"
FIGURE = Figure("a line", [{"type": "scatter", "x": [1, 2], "y": [3, 4], "marker": {"color": "--bad"}}], {})


def page(*blocks: Panel | Table | Command) -> Page:
    return Page(f"title {NASTY}", f"verdict {NASTY}", False, {"facts": "3"}, [Section("part", "text", blocks)])


def written(folder: Path, *blocks: Panel | Table | Command) -> str:
    write_page(folder / "page.html", page(*blocks))
    return (folder / "page.html").read_text("utf-8")


def own(text: str) -> str:
    """The page without plotly.js."""
    return re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)


def test_text_is_escaped(tmp_path: Path) -> None:
    panel = Panel("p", NASTY, [View(NASTY, [FIGURE], NASTY, group=NASTY), View("other", [FIGURE])])
    text = own(written(tmp_path, panel, Table({NASTY: ""}, [[NASTY]]), Command(NASTY, NASTY)))
    assert NASTY not in text
    assert text.count("<b>") == 0
    (document,) = re.findall(r'<script type="application/json" id="panels">(.*?)</script>', text, re.DOTALL)
    views: Any = json.loads(document)["p"]["views"]
    assert [view["name"] for view in views] == [NASTY, "other"]


def test_nothing_is_loaded(tmp_path: Path) -> None:
    text = written(tmp_path, Panel("p", "", [View("", [FIGURE])]))
    assert "default-src 'none'" in text
    assert not re.search(r"<(script|img|iframe)[^>]*\ssrc=|<link[^>]*href=\"(?!data:)|@import|url\(", own(text))


def test_a_control_lists_the_views_by_group(tmp_path: Path) -> None:
    views = [View(name, [FIGURE], group=group) for name, group in (("a", "x"), ("b", "x"), ("c", "y"))]
    text = own(written(tmp_path, Panel("p", "Layer", views)))
    (control,) = re.findall(r"<select>(.*?)</select>", text, re.DOTALL)
    assert re.findall(r"<option>(.)|<optgroup label=\"(.)|(</optgroup)", control) == [
        ("", "x", ""),
        ("a", "", ""),
        ("b", "", ""),
        ("", "", "</optgroup"),
        ("", "y", ""),
        ("c", "", ""),
        ("", "", "</optgroup"),
    ]
    assert "<select>" not in own(written(tmp_path, Panel("p", "", views[:1])))


def test_there_is_room_for_the_most_figures_of_any_view(tmp_path: Path) -> None:
    text = written(tmp_path, Panel("p", "", [View("a", [FIGURE]), View("b", [FIGURE, FIGURE])], height=321))
    assert text.count('<div class="figure" role="img" style="height: 321px">') == 2


def test_numbers_of_tables_are_formatted(tmp_path: Path) -> None:
    text = own(written(tmp_path, Table({"name": "", "share": ".1%"}, [["a", 0.1234]])))
    assert '<td class="number">12.3%</td>' in text
    assert "<td>a</td>" in text


def test_rounded() -> None:
    assert rounded([1.23456, 1e-9, 0.0], 3) == [1.23, 1e-9, 0.0]


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    check_page(file)
    written(tmp_path)
    check_page(file)
    file.write_text("<!doctype html><p>mine", "utf-8")
    with pytest.raises(BismoothError, match=r"page\.html: exists and is not a page of bismooth, so"):
        check_page(file)


@pytest.mark.parametrize("library", ["jinja2", "plotly"])
def test_what_is_to_be_installed(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline" if library == "plotly" else library, None)
    with pytest.raises(ModuleNotFoundError) as missing:
        check_page(tmp_path / "page.html")
    message = f'The module {library!r} is not installed. Run: pip install "bismooth[report]"'
    assert explain(missing.value, "diagnose") == (2, message)
