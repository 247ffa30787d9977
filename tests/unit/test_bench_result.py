"""Figures of measured times, against figures computed by hand, and what is shown of them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from bismooth.tools import console
from bismooth.tools.bench_result import Benched, BenchResult, Latency, Measured
from bismooth.tools.bench_timing import Timing
from bismooth.tools.roofline import bounds, find_gpus
from tests.benched import CASE, COST, rtx, subject, timings

FIRST = timings((0.100, 0.010), (0.120, 0.012), (0.110, 0.011))
OTHER = timings((0.050, 0.005), (0.040, 0.004), (0.055, 0.011))
(L4,) = find_gpus(["L4"])


def result() -> BenchResult:
    a, b, c = subject("a", source={}), subject("b"), rtx("c")
    engines = (Benched(a, (0.5, 0.7), 10**8), Benched(b, (0.25,), 5 * 10**7), Benched(c, reason="there is no GPU."))
    measured = (Measured(a, CASE, FIRST, None), Measured(b, CASE, OTHER, FIRST))
    found = tuple((2, bound) for bound in bounds(L4, COST, 2, 8, 5))
    settings = {"new_tokens": 5, "prompts": "random token ids, seed 0"}
    return BenchResult(engines, measured, found, settings, {"cores": 2}, ("c: was not measured: there is no GPU.",))


def test_quantiles_are_those_of_linear_interpolation() -> None:
    found = Latency.of([float(number) for number in range(101)])
    assert vars(found) == {"count": 101, "p5": 5.0, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
    assert Latency.of([0.25]).p5 == Latency.of([0.25]).p99 == 0.25
    assert Latency.of([0.0101, 0.0099, 0.0100]).in_ms() == ("10", "9.91…10.09")


def test_times_of_one_engine() -> None:
    item = Measured(subject(), CASE, FIRST, None)
    assert (item.prefill.p50, item.prefill.count) == (0.110, 3)
    assert item.first_token.p50 == pytest.approx(0.111)
    assert (item.token.p50, item.token.count) == (0.011, 12)
    assert item.prefill_rate == pytest.approx(2 * 8 / 0.110)
    assert item.decode_rate == pytest.approx(2 / 0.011), "of both rows"
    assert item.read_rate == pytest.approx((3100 + 2 * 10 * 128) / 0.011), "weights once and caches, at 10 positions"
    assert replace(item, subject=subject(cost=None)).read_rate is None
    assert item.speedups == {}


def test_ratios_are_of_rounds() -> None:
    found = Measured(subject(), CASE, OTHER, FIRST).speedups
    assert found["prefill"].value == pytest.approx(2.0)  # of 2, 3 and 2
    decode = found["decode"]  # of 2, 3 and 1
    assert decode.value == pytest.approx(2.0)
    assert decode.interval is not None
    assert (decode.interval.low, decode.interval.high) == pytest.approx((1.0, 3.0))
    assert not decode.interval.excludes(1.0)


def test_noise_that_hits_both_cancels_out() -> None:
    busy = timings((0.9, 0.10), (0.3, 0.03), (0.6, 0.06))
    half = tuple(Timing(item.prefill / 2, 0.0, tuple(time / 2 for time in item.tokens)) for item in busy)
    for ratio in Measured(subject(), CASE, half, busy).speedups.values():
        assert ratio.interval is not None
        assert (ratio.value, ratio.interval.low, ratio.interval.high) == pytest.approx((2, 2, 2))


def test_one_round_has_no_interval() -> None:
    found = Measured(subject(), CASE, OTHER[:1], FIRST[:1])
    assert found.speedups["decode"].interval is None
    assert found.to_json()["speedup"]["decode"] == {"value": pytest.approx(2.0), "low": None, "high": None}
    assert found.to_row()["decode_speedup"] == "2.00"


def test_the_report() -> None:
    report: Any = json.loads(console.json_text(result().to_json()))
    assert (report["format"], report["version"], report["interrupted"]) == ("bismooth-bench", 1, False)
    assert (report["prompts"], report["machine"]) == ("random token ids, seed 0", {"cores": 2})
    first, second, third = report["engines"]
    assert (first["engine"], first["load_seconds"], first["peak_rss_bytes"]) == ("a", [0.5, 0.7], 10**8)
    assert (second["weight_bytes"], second["cache_bytes_per_position"]) == (3100, 128)
    assert (third["measured"], third["reason"], third["capabilities"]) == (False, "there is no GPU.", [89])
    one, two = report["measured"]
    assert (one["batch"], one["prompt_length"], one["speedup"]) == (2, 8, None)
    assert one["token"]["p50"] == 0.011
    assert two["rounds"][1] == {"prefill": 0.040, "decode": pytest.approx(0.016)}
    estimates = report["estimates"]
    assert "not measured" in estimates["what"]
    assert [gpu["source"] for gpu in estimates["gpus"]] == [L4.source]
    assert [(step["engine"], step["phase"]) for step in estimates["steps"]] == [("c", "prefill"), ("c", "decode")]
    assert json.loads(console.json_text(replace(result(), bounds=()).to_json()))["estimates"] is None


def shown(found: BenchResult) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(console.render(found))
    return stream.getvalue()


def test_what_a_terminal_shows() -> None:
    text = shown(result())
    for words in (
        "random token ids, seed 0",
        "3, 5 new tokens. Below medians: 5 % and 95 % quantiles",
        "c: was not measured: there is no GPU.",
        "An upper bound from published figures",
        "1.00…3.00",
        "2 × 10",
        "0.6 s",
        "memory",
    ):
        assert words in text
    assert "interrupted" not in text
    assert "interrupted" in shown(replace(result(), interrupted=True))


def test_estimates_alone() -> None:
    text = shown(BenchResult((Benched(rtx()),), (), tuple((0, bound) for bound in bounds(L4, COST, 1, 8, 5)), {}))
    assert "estimated, not measured" in text
    assert "rounds" not in text
    assert "load" not in text
