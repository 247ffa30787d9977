"""The page of bench: what stands in its figures and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest

from bismooth.tools.bench_page import bench_page
from bismooth.tools.bench_result import Benched, BenchResult, Measured
from bismooth.tools.bench_subject import Case
from bismooth.tools.page import Page, Panel, Section, Table
from bismooth.tools.roofline import bounds, find_gpus
from tests.benched import COST, rtx, subject, timings

A, B, RTX = subject("a"), subject("b"), rtx("c")
CASES = [Case(batch, length, 5) for batch in (1, 4) for length in (8, 16)]
SETTINGS = {"new_tokens": 5, "prompts": "random token ids, seed 0"}
GPUS = find_gpus(["L4", "RTX4090"])


def result(engines: int = 2) -> BenchResult:
    measured: list[Measured] = []
    for number, case in enumerate(CASES, 1):
        first = timings((0.1 * number, 0.01), (0.2 * number, 0.02), (0.3 * number, 0.03))
        measured.append(Measured(A, case, first, None))
        if engines > 1:
            measured.append(Measured(B, case, timings((0.1, 0.005), (0.1, 0.01), (0.1, 0.015)), first))
    found = [(2, bound) for gpu in GPUS for case in CASES for bound in bounds(gpu, COST, case.batch, 8, 5)]
    benched = (Benched(A, (0.5,), 10**8), Benched(B, (0.25,), None), Benched(RTX, reason="no GPU."))
    return BenchResult(benched, tuple(measured), tuple(found), SETTINGS, {"cores": 2}, ("A note.",))


def section(page: Page, title: str) -> Section:
    (found,) = (section for section in page.sections if section.title == title)
    return found


def panel(page: Page, title: str, name: str) -> Panel:
    (found,) = (block for block in section(page, title).blocks if isinstance(block, Panel) and block.name == name)
    return found


def traces(panel: Panel, view: str) -> list[Mapping[str, Any]]:
    (figure,) = next(item for item in panel.views if item.name == view).figures
    return list(figure.traces)


def test_the_page_is_plain_data() -> None:
    page = bench_page(result())
    assert json.dumps(asdict(page), allow_nan=False)
    titles = ["Latency", "Throughput", "Ratios", "Rooflines (estimates)", "Engines"]
    assert [section.title for section in page.sections] == titles
    assert page.facts == {"cores": "2", "new tokens": "5", "prompts": "random token ids, seed 0"}


def test_the_verdict() -> None:
    page = bench_page(result())
    assert page.good
    assert page.verdict == "b decodes 1 × 8 tokens 2.00 times as fast as a (2.00…2.00). A note."
    stopped = bench_page(replace(result(), interrupted=True))
    assert not stopped.good
    assert stopped.verdict.startswith("Interrupted: this is what was measured until then. b decodes")


def test_latency_over_batch_and_length() -> None:
    token = panel(bench_page(result()), "Latency", "token")
    assert [view.name for view in token.views] == ["batch 1", "batch 4", "prompts of 8", "prompts of 16"]
    first, second = traces(token, "batch 4")
    assert (first["name"], first["x"], first["y"]) == ("a", [8, 16], pytest.approx([20, 20]))
    assert second["y"] == pytest.approx([10, 10])
    assert first["error_y"]["array"] == pytest.approx([10, 10]), "to the 95 % quantile"
    prefill = panel(bench_page(result()), "Latency", "prefill")
    assert traces(prefill, "prompts of 16")[0]["x"] == [1, 4]
    assert traces(prefill, "prompts of 16")[0]["y"] == pytest.approx([400, 800])


def test_one_batch_has_no_views_over_batches() -> None:
    found = result()
    one = replace(found, measured=tuple(item for item in found.measured if item.case.batch == 1))
    assert [view.name for view in panel(bench_page(one), "Latency", "token").views] == ["batch 1"]


def test_the_table_of_latencies() -> None:
    table = section(bench_page(result()), "Latency").blocks[-1]
    assert isinstance(table, Table)
    assert table.rows[0][:5] == ("a", "1 × 8", "200 (110…290)", "201 (111…291)", "20 (10…30)")


def test_ratios_stand_beside_1() -> None:
    ratios = panel(bench_page(result()), "Ratios", "ratios")
    (decode,) = traces(ratios, "decode")
    assert (decode["y"][0], decode["x"]) == ("b, 1 × 8", pytest.approx([2] * 4))
    assert ratios.views[0].figures[0].layout["shapes"][0]["x0"] == 1
    (prefill,) = traces(ratios, "prefill")
    assert prefill["x"] == pytest.approx([2, 4, 6, 8])
    assert prefill["error_x"]["array"] == pytest.approx([1, 2, 3, 4])
    alone = bench_page(result(1))
    assert "Ratios" not in [section.title for section in alone.sections]
    assert alone.verdict == "A note."


def test_rooflines_are_called_estimates() -> None:
    rooflines = section(bench_page(result()), "Rooflines (estimates)")
    assert "estimated, not measured" in rooflines.text
    drawn = panel(bench_page(result()), "Rooflines (estimates)", "roofline")
    assert [view.name for view in drawn.views] == ["L4", "RTX4090"]
    assert "Not measured." in drawn.views[0].text
    int8, half, prefill, decode = traces(drawn, "L4")
    assert int8["y"][1:] == pytest.approx([242.5e12] * 2)
    assert half["y"][1:] == pytest.approx([121e12] * 2)
    assert int8["x"][1] == pytest.approx(242.5e12 / 300e9)
    assert (prefill["name"], decode["name"]) == ("c, prefill", "c, decode")
    for x, y in zip(decode["x"], decode["y"], strict=True):
        assert y == pytest.approx(x * 300e9), "what reads stands on the slope"
    table, published = (block for block in rooflines.blocks if isinstance(block, Table))
    assert table.rows[0][:4] == ("c", "L4", "prefill", "1 × 8")
    assert published.rows[0][-1] == "https://www.nvidia.com/en-us/data-center/l4/"


def test_estimates_alone() -> None:
    page = bench_page(replace(result(), measured=(), settings={"new_tokens": 5}, machine={}, notes=()))
    assert page.title == "Bounds of a, b, c"
    assert page.verdict == "Nothing was measured: these are bounds from published figures."
    assert [section.title for section in page.sections] == ["Rooflines (estimates)", "Engines"]


def test_engines() -> None:
    (table,) = section(bench_page(result()), "Engines").blocks
    assert isinstance(table, Table)
    assert table.rows[0] == ("a", "onnxruntime 1.2", "w8a8", 2.0, "0.50 s", "100 MB")
    assert [row[-2:] for row in table.rows[1:]] == [("0.25 s", "–"), ("–", "–")]
