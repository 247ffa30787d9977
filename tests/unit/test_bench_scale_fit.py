"""Lines through measurements: what they are, what breaks them, and what follows for other models."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from bismooth.tools.bench_scale_fit import Estimate, between, fit, forecast, judge
from bismooth.tools.large_model import LLAMA3_70B, LLAMA3_405B, Shape

BLOCKS: tuple[int, ...] = (2, 4, 8)
FLAT: dict[int, int] = dict.fromkeys(BLOCKS, 5_000_000_000)


def test_a_line_through_what_is_linear() -> None:
    line = fit(BLOCKS, [10 + 3 * blocks for blocks in BLOCKS])
    assert (line.fixed, line.per_block) == pytest.approx((10, 3))
    assert line.r2 == pytest.approx(1)
    assert line.deviation < 1e-9
    estimate = line.at(2, 80)
    assert estimate.value == pytest.approx(260)
    assert estimate.error < 1e-6


def test_the_error_of_a_line_is_that_of_its_scatter() -> None:
    random = np.random.default_rng(0)
    blocks = [2, 3, 4, 5, 6, 8]
    slopes: list[float] = []
    variances: list[float] = []
    for _ in range(2000):
        line = fit(blocks, [100 + 10 * count + random.standard_normal() for count in blocks])
        slopes.append(line.per_block)
        variances.append(line.at(0, 1).variance)
    assert np.std(slopes) == pytest.approx(np.sqrt(np.mean(variances)), rel=0.05)
    expected = 1 / np.sqrt(np.sum((np.array(blocks) - np.mean(blocks)) ** 2))
    assert np.std(slopes) == pytest.approx(expected, rel=0.05)


def test_a_constant_is_a_line() -> None:
    line = fit(BLOCKS, [7, 7, 7])
    assert (line.fixed, line.per_block, line.r2) == (pytest.approx(7), pytest.approx(0), 1)


def test_two_measurements_are_no_line() -> None:
    with pytest.raises(ValueError, match=r"^a line takes three measurements, got 2$"):
        fit([2, 4], [1, 2])


@pytest.mark.parametrize("power", [1.5, 2])
@pytest.mark.parametrize("fixed", [0, 2.5])
def test_faster_growth_does_not_hold(power: float, fixed: float) -> None:
    growth = judge("verify", {blocks: fixed + blocks**power for blocks in BLOCKS}, FLAT)
    assert growth.failures
    assert all(failure.startswith("verify: time ") for failure in growth.failures)
    assert growth.to_json()["holds"] is False


def test_the_limits_of_time() -> None:
    assert judge("export", {2: 12, 4: 12.9, 8: 15.1}, FLAT).failures == ()
    assert judge("export", {2: 12, 4: 11.5, 8: 12.2}, FLAT).failures == (), "no growth at all"
    (off,) = judge("export", {2: 14, 4: 28, 8: 30}, FLAT).failures
    assert re.fullmatch(r"export: time is \d\d\.\d% off its line, at most 10% is allowed\.", off)
    (begins,) = judge("quantize", {2: 10, 4: 30, 8: 70}, FLAT).failures
    assert begins == (
        "quantize: time grows faster than the blocks: its line begins at -14.3% of the largest time, at least -10% is "
        "allowed."
    )


def test_the_limits_of_memory() -> None:
    seconds: dict[int, float] = {2: 1, 4: 2}
    assert judge("verify", seconds, {2: 5_000_000_000, 4: 5_500_000_000}).failures == ()
    (spread,) = judge("verify", seconds, {2: 5_510_000_000, 4: 5_000_000_000}).failures
    assert spread == "verify: peak memory varies by 10.2% (5.00 to 5.51 GB), at most 10% is allowed."
    (peak,) = judge("verify", seconds, {2: 6_000_000_001, 4: 5_900_000_000}).failures
    assert peak == "verify: peak memory is 6.00 GB, at most 6 GB is allowed."
    (budget,) = judge("verify", seconds, {2: 4_000_000_001, 4: 3_900_000_000}, 4e9).failures
    assert budget == "verify: peak memory is 4.00 GB, at most 4 GB is allowed."
    assert judge("verify more", seconds, {2: 3_000_000_000, 4: 4_000_000_000}, 4e9, flat=False).failures == ()


def test_fewer_than_three_sizes_judge_no_line() -> None:
    growth = judge("verify", {2: 1, 4: 100}, {2: 1, 4: 1})
    assert growth.line is None
    assert growth.to_json() == {
        "step": "verify",
        "fixed_seconds": None,
        "seconds_per_block": None,
        "standard_error": None,
        "r2": None,
        "largest_deviation": None,
        "least_peak_bytes": 1,
        "peak_bytes": 1,
        "holds": True,
    }


def cost(shape: Shape) -> float:
    """Of a step that takes 3 for each parameter of blocks, and 2 for each of the others."""
    return 3 * shape.blocks * shape.block_parameters + 2 * shape.outer_parameters


@pytest.mark.parametrize("target", [LLAMA3_70B, LLAMA3_405B])
def test_what_costs_by_parameters_is_foreseen(target: Shape) -> None:
    line = fit(BLOCKS, [cost(replace(LLAMA3_70B, blocks=blocks)) for blocks in BLOCKS])
    assert forecast(line, LLAMA3_70B, target).value == pytest.approx(cost(target))


@pytest.mark.parametrize("target", [LLAMA3_70B, LLAMA3_405B])
def test_what_costs_by_channels_is_foreseen(target: Shape) -> None:
    def bytes_of(shape: Shape) -> float:
        return 1000 * shape.blocks * shape.block_channels + 1000 * shape.hidden

    line = fit(BLOCKS, [bytes_of(replace(LLAMA3_70B, blocks=blocks)) for blocks in BLOCKS])
    assert forecast(line, LLAMA3_70B, target, by_channels=True).value == pytest.approx(bytes_of(target))


def test_a_forecast_is_less_sure_the_further_it_reaches() -> None:
    line = fit(BLOCKS, [10, 21, 40])
    near, far = (forecast(line, LLAMA3_70B, replace(LLAMA3_70B, blocks=blocks)) for blocks in (5, 80))
    assert 0 < near.error < line.at(0, 75).error < far.error


def test_between_and_beyond_two_estimates() -> None:
    few, many = Estimate(10, 4), Estimate(20, 9)
    assert between(few, many, 0) == few
    assert between(few, many, 1) == many
    assert between(few, many, 3) == Estimate(40, 4 * 4 + 9 * 9)
    assert few.error == 2
