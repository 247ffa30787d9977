"""The page of ``bismooth diagnose``: what it holds, and what a browser makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes.linears import Linear
from bismooth.passes.weight_scan import WeightScan, scan
from bismooth.tools.cli import main
from bismooth.tools.diagnose import DiagnoseResult, diagnose
from bismooth.tools.diagnose_page import Picture
from bismooth.tools.standin import standin
from tests.browser import chromium
from tests.quantized import make, save
from tests.tiny import make_tiny

SIZES: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 48}
FIRST, HEALTHY = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class Made:
    """A page, and the result that it shows."""

    path: Path
    result: DiagnoseResult

    @property
    def panels(self) -> dict[str, Any]:
        (document,) = re.findall(
            r'<script type="application/json" id="panels">(.*?)</script>', self.path.read_text("utf-8"), re.DOTALL
        )
        return json.loads(document)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("page")
    standin(make_tiny(folder, **SIZES).source, folder / "bad", factor=64, channels=3, blocks=(0, 2))
    return Made(folder / "page.html", diagnose(folder / "bad", html=folder / "page.html"))


def test_a_page_holds_the_result(made: Made) -> None:
    text, panels = made.path.read_text("utf-8"), made.panels
    assert f'<p class="verdict">{made.result.verdict}</p>' in text
    for remedy in made.result.remedies:
        assert f"{remedy.name}: for {remedy.linears} linears." in text
    names = [item.name for item in made.result.linears]
    assert sorted(view["name"] for view in panels["maxima"]["views"]) == sorted(names)
    flagged = {item.name for item in made.result.flagged}
    assert {view["name"] for view in panels["maxima"]["views"] if view["group"] == "at risk"} == flagged
    heat = panels["map"]["views"][0]["figures"][0]["traces"][0]
    cells: dict[str, float] = dict(zip(chain[str](*heat["customdata"]), chain[float](*heat["z"]), strict=True))
    for item in made.result.linears:
        if "layers" in item.name:
            assert 10 ** cells[item.name] == pytest.approx(item.absmax, rel=1e-3)
    for view in panels["surface"]["views"]:
        bad, healthy = (figure["layout"]["title"]["text"] for figure in view["figures"])
        assert bad in flagged
        assert healthy == re.sub(r"\d+", "1", bad), "the block between the two that have walls"


def test_a_page_without_blocks_and_walls(tmp_path: Path) -> None:
    graph = "(float[batch, 4] x) => (float[batch, 4] y) { y = MatMul(x, w) }"
    source = save(make(graph, w=np.eye(4, dtype=np.float32)), tmp_path / "linear")
    made = Made(tmp_path / "page.html", diagnose(source, html=tmp_path / "page.html"))
    assert set(made.panels) == {"maxima", "surface"}


def test_a_page_of_zeros(tmp_path: Path) -> None:
    graph = "(float[batch, 4] x) => (float[batch, 4] y) { y = MatMul(x, w) }"
    source = save(make(graph, w=np.zeros((4, 4), np.float32)), tmp_path / "linear")
    made = Made(tmp_path / "page.html", diagnose(source, html=tmp_path / "page.html"))
    assert made.panels["maxima"]["views"][0]["figures"][0]["traces"][0]["y"] == []


def scanned(n: int, k: int) -> WeightScan:
    w = np.random.default_rng(0).standard_normal((n, k), np.float32)
    linear = Linear("fc", "fc/MatMul", "x", "y", "fc.weight", "NK", k, n, None, False, ())
    return scan(linear, lambda count: (w.reshape(-1)[i : i + count] for i in range(0, w.size, count)))


@pytest.mark.parametrize("k", [3, 64, 5000])
def test_pictures_are_small_and_keep_the_largest_channels(k: int) -> None:
    seen = scanned(300, k)
    picture = Picture.of(seen)
    assert picture.ranks.size <= min(k, 320)
    assert picture.ranks[-1] == k
    np.testing.assert_array_equal(picture.maxima, np.sort(seen.peaks)[::-1][picture.ranks - 1])
    np.testing.assert_array_equal(picture.maxima, seen.peaks[picture.channels])
    exact = min(k, 64)
    np.testing.assert_array_equal(picture.ranks[:exact], np.arange(1, exact + 1))


def test_another_file_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.html").write_text("mine", "utf-8")
    with pytest.raises(BismoothError, match=r"notes\.html: exists and is not a page of bismooth"):
        diagnose(tmp_path / "no-model", html=tmp_path / "notes.html")
    assert main(["diagnose", str(tmp_path), "--html", str(tmp_path / "notes.html")]) == 2
    assert "Choose another place with --html." in capsys.readouterr().err


@dataclass
class Shown:
    """The page in a browser, what it asked for and what it complained of."""

    page: Any
    requests: list[str]
    complaints: list[str]

    def note_request(self, request: Any) -> None:
        self.requests.append(request.url)

    def note_error(self, error: Any) -> None:
        self.complaints.append(str(error))

    def note_message(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def values(self, panel: str, key: str) -> Any:
        """Of the first trace of a panel's first figure."""
        return self.page.evaluate(f"document.querySelector('#{panel} .figure').data[0].{key}")

    def caption(self, panel: str) -> str:
        return self.page.locator(f"#{panel} .caption").inner_text()

    def chosen(self, panel: str) -> str:
        return self.page.locator(f"#{panel} select").evaluate("control => control.value")


@pytest.fixture(scope="module")
def shown(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Generator[Shown]:
    options: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"}
    with chromium(tmp_path_factory.mktemp("profile"), **options) as context:
        page = context.new_page()
        result = Shown(page, [], [])
        page.on("request", result.note_request)
        page.on("pageerror", result.note_error)
        page.on("console", result.note_message)
        page.goto(made.path.as_uri())
        yield result


@pytest.mark.browser
def test_the_page_loads_nothing_and_complains_of_nothing(made: Made, shown: Shown) -> None:
    figures = shown.page.locator(".figure")
    assert figures.count() == sum(max(len(view["figures"]) for view in item["views"]) for item in made.panels.values())
    assert shown.page.locator(".figure .main-svg").count() > figures.count()
    assert shown.page.locator("#surface canvas").count() == 2, "surfaces are drawn with WebGL"
    assert [url for url in shown.requests if not url.startswith("data:")] == [made.path.as_uri()]
    assert shown.complaints == []


@pytest.mark.browser
def test_controls_change_what_is_shown(shown: Shown) -> None:
    before = shown.values("maxima", "y")
    shown.page.locator("#maxima select").select_option(HEALTHY)
    assert shown.values("maxima", "y") != before
    assert shown.caption("maxima").startswith("256 inputs, 192 outputs;")
    shown.page.locator("#maxima select").focus()
    shown.page.keyboard.press("ArrowUp")
    assert shown.chosen("maxima") != HEALTHY, "by the keyboard"
    colours = shown.values("map", "z")
    shown.page.locator("#map select").select_option(index=2)
    assert shown.values("map", "z") != colours
    title = "document.querySelector('#surface .figure').layout.title.text"
    shown.page.locator("#surface select").select_option(index=1)
    assert shown.page.evaluate(title) == shown.chosen("surface")
    assert shown.complaints == []


@pytest.mark.browser
def test_a_click_on_a_cell_opens_its_channels(shown: Shown) -> None:
    shown.page.locator("#maxima select").select_option(HEALTHY)
    box = shown.page.locator("#map .nsewdrag").bounding_box()
    shown.page.mouse.click(box["x"] + box["width"] / 6, box["y"] + box["height"] / 14)
    shown.page.wait_for_function(f"document.querySelector('#maxima select').value === '{FIRST}'")
    assert "bits lost to channels" in shown.caption("maxima")


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1280])
def test_narrow_and_dark(shown: Shown, width: int) -> None:
    """Without a horizontal scroll bar, in the colours of the scheme."""
    shown.page.set_viewport_size({"width": width, "height": 900})
    inks: list[str] = []
    for scheme in ("light", "dark"):
        shown.page.emulate_media(color_scheme=scheme)
        shown.page.wait_for_timeout(300)
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
        inks.append(shown.page.evaluate("document.querySelector('#maxima .figure').layout.font.color"))
    assert len(set(inks)) == 2
    assert shown.complaints == []
