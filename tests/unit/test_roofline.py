"""Bounds of published GPUs, against figures computed by hand."""

from __future__ import annotations

import re
from urllib.parse import urlparse

import pytest

from bismooth.export.errors import BismoothError
from bismooth.tools.cost import StepCost
from bismooth.tools.roofline import Bound, Gpu, bounds, find_gpus, known_gpus
from tests.benched import COST

GPU = Gpu("G", 89, 1.0, 100.0, 10.0, 20.0, "https://example.com")


def bound(cost: StepCost) -> Bound:
    return Bound(GPU, "decode", 1, 1, 1, cost)


def test_a_step_that_reads() -> None:
    found = bound(StepCost(150_000_000, 50_000_000, 10**9, 10**9))
    assert GPU.seconds(found.cost) == pytest.approx((2e-3, 5e-5 + 1e-4))
    assert (found.seconds, found.limit) == (pytest.approx(2e-3), "memory")


def test_a_step_that_computes() -> None:
    found = bound(StepCost(1000, 0, 4 * 10**10, 3 * 10**10))
    assert (found.seconds, found.limit) == (pytest.approx(2e-3 + 3e-3), "compute")


def test_the_bounds_of_a_case() -> None:
    prompt, token = bounds(GPU, COST, 2, 8, 5)
    assert (prompt.phase, prompt.positions, prompt.tokens, prompt.cost) == ("prefill", 8, 16, COST.prefill(2, 8))
    assert (token.phase, token.positions, token.tokens, token.cost) == ("decode", 10, 2, COST.decode(2, 10))
    document = token.to_json()
    assert document["least_seconds"] == token.seconds
    assert document["most_tokens_per_second"] == 2 / token.seconds
    assert (document["gpu"], document["cache_bytes"]) == ("G", 2 * 10 * 128)


def test_a_model_of_8_billion_on_a_gpu_that_is_known() -> None:
    """8 · 10^9 bytes at 300 GB/s are 26.7 ms: 37.5 tokens per second are the most, whatever computes them."""
    (l4,) = find_gpus(["L4"])
    found = Bound(l4, "decode", 1, 1, 1, StepCost(8 * 10**9, 0, 16 * 10**9, 0))
    assert (1 / found.seconds, found.limit) == (pytest.approx(37.5), "memory")


def test_the_published_figures() -> None:
    assert len(known_gpus()) >= 12
    assert len({gpu.name for gpu in known_gpus()}) == len(known_gpus())
    for gpu in known_gpus():
        assert urlparse(gpu.source).hostname in (
            "www.nvidia.com",
            "images.nvidia.com",
            "developer.nvidia.com",
        ), gpu.name
        assert gpu.capability in (75, 80, 86, 87, 89, 90, 120), gpu.name
        assert 1.9 < gpu.int8_tops / gpu.float16_tops < 2.1, f"{gpu.name}: tensor cores double their rate with INT8"
        assert 50 < gpu.float16_tops * 1000 / gpu.gb_per_second < 500, f"{gpu.name}: of dense products, not sparse ones"


@pytest.mark.parametrize("name", ["RTX4090", "rtx 4090", "RTX-4090", "rtx_4090"])
def test_names_as_users_write_them(name: str) -> None:
    assert [gpu.name for gpu in find_gpus([name, "L4", name])] == ["RTX4090", "L4"]


def test_a_gpu_that_is_not_known() -> None:
    message = "--gpu B200: there are no figures of this GPU. Expected some of: T4, A100-40GB, "
    with pytest.raises(BismoothError, match=re.escape(message)):
        find_gpus(["L4", "B200"])
