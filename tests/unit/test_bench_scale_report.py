"""What the bench by size says of its rows: forecasts, limits, tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from bismooth.tools.bench_scale_report import ScaleResult
from bismooth.tools.bench_scale_rows import BASELINES, LARGE, STEPS, STREAMED, WHOLE, Row
from bismooth.tools.large_model import LLAMA3_70B, LLAMA3_405B, Shape

BLOCKS = (2, 4, 8)
MACHINE = {"processor": "Some CPU", "cores": 2, "memory_bytes": 24e9}
PEAK = 5_500_000_000


def seconds(step: str, shape: Shape) -> float:
    """5 s for 10⁹ parameters, and 1 s more for each of 512 tokens."""
    return shape.parameters * 1e-9 * (5 + STEPS[step].tokens / 512)


def written(step: str, shape: Shape) -> int:
    match step:
        case "calibrate":
            return shape.blocks * shape.block_channels * 1000 + 500 * shape.hidden
        case "convert" | "quantize":
            return shape.blocks * shape.block_parameters + 2 * shape.outer_parameters
        case _:
            return 0


def large() -> Iterator[Row]:
    for blocks in BLOCKS:
        shape = replace(LLAMA3_70B, blocks=blocks)
        for number, baseline in enumerate(BASELINES):
            yield Row(LARGE, blocks, baseline, 10.0 * blocks + number, 10**7)
        for step in STEPS:
            yield Row(LARGE, blocks, step, seconds(step, shape), PEAK + blocks, written(step, shape))


def small(kl: float = 0.01999, int8_kl: float = 0.021, peak: int = 700_000_000) -> Iterator[Row]:
    for model, kls, most in ((WHOLE, (0.02, 0.021), 10**9), (STREAMED, (kl, int8_kl), peak)):
        figures = {"kl": kls[0], "int8_kl": kls[1], "top1": 0.9, "perplexity_ratio": 1.01}
        yield Row(model, 0, "quantize", 7.0, most)
        yield Row(model, 0, "verify", 9.0, most, figures=figures)


def exported() -> Row:
    return Row("LLaMA3-70B", 80, "export", 27.0, 400_000_000, figures={"least_memory_bytes": 4_300_000_000})


def result(*rows: Row) -> ScaleResult:
    return ScaleResult(rows or (*large(), *small(), exported()), LLAMA3_70B, MACHINE, {"memory": "6GB"})


@pytest.mark.parametrize(("name", "target"), [("LLaMA3-70B", LLAMA3_70B), ("LLaMA3-405B", LLAMA3_405B)])
def test_forecasts_are_those_of_the_rates(name: str, target: Shape) -> None:
    found = {(item.step, item.tokens): item.seconds for item in result().forecasts() if item.model == name}
    billions = target.parameters * 1e-9
    expected = {("calibrate", 512): 6, ("calibrate", 4096): 13, ("verify", 512): 6, ("verify", 4096): 13}
    expected |= {(step, 0): 5 for step in ("diagnose", "convert", "quantize")}
    assert {key: item.value / billions for key, item in found.items()} == pytest.approx(expected)
    assert all(item.error < 0.01 * item.value for item in found.values())


def test_scatter_makes_forecasts_less_sure() -> None:
    rows = [replace(row, seconds=row.seconds * (1.05 if row.blocks == 4 else 1)) for row in large()]
    by_tokens = {item.tokens: item.seconds for item in result(*rows).forecasts() if item.step == "verify"}
    assert 0 < by_tokens[512].error < by_tokens[4096].error


def test_two_sizes_foresee_nothing() -> None:
    few = result(*(row for row in large() if row.blocks < 8))
    assert (list(few.forecasts()), list(few.rooms()), few.failures()) == ([], [], [])
    assert "Forecast" not in few.markdown()
    assert few.markdown().count("| memory does |") == len(STEPS), "time is not judged"


@pytest.mark.parametrize("step", ["calibrate", "quantize"])
def test_room_takes_both_stages_that_write(step: str) -> None:
    assert list(result(*(row for row in large() if row.step != step)).rooms()) == []


def test_room() -> None:
    rooms = list(result().rooms())
    for room, target in zip(rooms, (LLAMA3_70B, LLAMA3_405B), strict=True):
        assert room.source == 2 * target.parameters
        assert room.statistics == pytest.approx(written("calibrate", target))
        assert room.quantized == pytest.approx(written("quantize", target))
        assert room.disk == room.source + room.statistics + room.quantized
    first, second = rooms
    assert first.most_peak == PEAK + 8
    assert second.most_peak == pytest.approx((PEAK + 8) * 3.726, rel=1e-3)
    assert (first.export, second.export) == (exported(), None)


def test_what_holds() -> None:
    assert result().failures() == []


def test_a_budget_is_held_against_the_steps_that_have_it() -> None:
    found = replace(result(), settings={"memory": "5GB"}).failures()
    budgeted = [name for name in STEPS if name not in ("export", "diagnose")]
    assert found == [f"{name}: peak memory is 5.50 GB, at most 5 GB is allowed." for name in budgeted]
    assert replace(result(), settings={"memory": "none"}).failures() == []


def test_the_peaks_on_more_text_need_not_be_flat() -> None:
    rows = [replace(row, peak_bytes=row.peak_bytes - row.blocks * 10**8) for row in large()]
    assert {failure.split(":")[0] for failure in result(*rows).failures()} == {
        name for name in STEPS if not name.endswith(" more")
    }


@pytest.mark.parametrize(
    ("rows", "failure"),
    [
        (
            lambda: small(kl=0.01989),
            "SmolLM2-135M, streamed: verify: kl is 0.00011 off that of the whole model, at most 0.0001 is allowed.",
        ),
        (
            lambda: small(int8_kl=0.022),
            "SmolLM2-135M, streamed: verify: int8_kl is 0.001 off that of the whole model, at most 0.0001 is allowed.",
        ),
        (
            lambda: (row for row in small(peak=701_000_000) if row.step == "quantize"),
            "SmolLM2-135M, streamed: quantize: peak memory is 701 MB, at most 700 MB is allowed.",
        ),
        (
            lambda: (replace(row, seconds=row.blocks**2.0) for row in large() if row.step == "export"),
            "export: time is 85.7% off its line, at most 10% is allowed.",
        ),
        (
            lambda: (replace(row, peak_bytes=6_000_000_001) for row in large() if row.step == "verify"),
            "verify: peak memory is 6.00 GB, at most 6 GB is allowed.",
        ),
        (
            lambda: iter([Row(LARGE, 4, "convert", 10.0, PEAK), Row(LARGE, 4, "cp", 5.9, PEAK)]),
            "convert: 4 blocks: at 59% of the rate of cp, 60% is the least allowed.",
        ),
    ],
)
def test_what_does_not_hold(rows: Callable[[], Iterator[Row]], failure: str) -> None:
    found = result(*rows())
    assert failure in found.failures()
    assert f"**Does not hold.** {failure}" in found.markdown()


def test_the_json_is_plain() -> None:
    document = json.loads(json.dumps(result().to_json()))
    assert list(document) == [
        *("format", "version", "machine", "settings", "rows", "growth", "forecasts", "rooms", "failures")
    ]
    assert document["rows"][0] == {
        "model": LARGE,
        "blocks": 2,
        "step": "cp",
        "seconds": 20.0,
        "peak_bytes": 10**7,
        "written_bytes": 0,
        "figures": {},
    }
    assert [growth["step"] for growth in document["growth"]] == list(STEPS)
    assert all(growth["seconds_per_block"] > 0 and growth["holds"] for growth in document["growth"])
    assert {item["model"] for item in document["forecasts"]} == {"LLaMA3-70B", "LLaMA3-405B"}


def test_the_tables(golden: Callable[[str, str], None]) -> None:
    golden("bench_scale.md", result().markdown())
