"""The values that say how a linear is computed: what may be written down, and the message for what may not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes.spec import (
    DynamicActivation,
    LinearSpec,
    PerChannel,
    PerGroup,
    PerMagnitude,
    PerTensor,
    PerToken,
    RangeMethod,
    SiteKind,
    SmoothSpec,
    StaticActivation,
    WeightSpec,
)


def test_a_linear_is_float_unless_told_otherwise() -> None:
    assert not LinearSpec().quantized
    assert LinearSpec(WeightSpec()).quantized


@pytest.mark.parametrize(
    "spec",
    [
        LinearSpec(),
        LinearSpec(WeightSpec()),
        LinearSpec(WeightSpec(), DynamicActivation()),
        LinearSpec(WeightSpec(), StaticActivation(RangeMethod.MINMAX)),
        LinearSpec(WeightSpec(PerGroup(64)), DynamicActivation()),
        LinearSpec(WeightSpec(PerGroup(72))),
        LinearSpec(WeightSpec(PerMagnitude(3, 16, ((7,), (1, 4)))), DynamicActivation()),
        LinearSpec(WeightSpec(PerGroup(128)), StaticActivation(RangeMethod.PERCENTILE, 99.9)),
        LinearSpec(smoothing=SmoothSpec((0.5,))),
    ],
)
def test_legal_combinations_are_hashable_values(spec: LinearSpec) -> None:
    assert len({spec, LinearSpec(spec.weights, spec.activations, spec.smoothing)}) == 1


def test_channels_are_in_groups_once_walls_were_found() -> None:
    walls = PerMagnitude(2, 16, ((7,),))
    found = [LinearSpec(WeightSpec(spec)).groups for spec in (PerChannel(), PerMagnitude(), walls, PerGroup(8))]
    assert found == [None, None, walls, PerGroup(8)]
    assert LinearSpec().groups is None


def test_granularity_is_readable_from_activations() -> None:
    assert DynamicActivation().granularity == PerToken()
    assert StaticActivation(RangeMethod.MINMAX).granularity == PerTensor()


def test_specs_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        LinearSpec().weights = WeightSpec()  # pyright: ignore[reportAttributeAccessIssue]


def test_smoothing_covers_every_kind_of_site_unless_told_otherwise() -> None:
    assert SmoothSpec((0.5,)).kinds == set(SiteKind)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PerChannel(-1), "per_channel: Expected an axis of 0 or more, got -1."),
        (lambda: PerGroup(0), "per_group: Expected a group_size of 1 or more, got 0."),
        (lambda: PerMagnitude(1), "per_magnitude: Expected 2 or more groups, got 1."),
        (lambda: PerMagnitude(wall_bits=4), "per_magnitude: Expected 8 or 16 as wall_bits, got 4."),
        (lambda: PerMagnitude(2, 16, ((1,), (2,))), "per_magnitude: Expected at most 1 groups of walls, got 2."),
        (
            lambda: WeightSpec(PerChannel(1)),
            "weights: Expected scales per channel of axis 0, the output channel, got axis 1.",
        ),
        (
            lambda: StaticActivation(RangeMethod.PERCENTILE),
            "activations: Expected a percentile above 50 and up to 100, got None.",
        ),
        (
            lambda: StaticActivation(RangeMethod.PERCENTILE, 50),
            "activations: Expected a percentile above 50 and up to 100, got 50.",
        ),
        (
            lambda: StaticActivation(RangeMethod.PERCENTILE, 100.1),
            "activations: Expected a percentile above 50 and up to 100, got 100.1.",
        ),
        (
            lambda: StaticActivation(RangeMethod.MSE, 99.0),
            "activations: Expected no percentile with the range method 'mse', got 99.0.",
        ),
        (lambda: SmoothSpec(()), "smoothing: Expected one or more alphas from 0 to 1, got []."),
        (lambda: SmoothSpec((0.5, 1.5)), "smoothing: Expected one or more alphas from 0 to 1, got [0.5, 1.5]."),
        (
            lambda: SmoothSpec((0.5, float("nan"))),
            "smoothing: Expected one or more alphas from 0 to 1, got [0.5, nan].",
        ),
        (lambda: SmoothSpec((0.5, 0.5)), "smoothing: Expected different alphas, got [0.5, 0.5]."),
        (lambda: SmoothSpec((0.5,), frozenset()), "smoothing: Expected one or more kinds of site, got none."),
        (
            lambda: LinearSpec(None, DynamicActivation()),
            "linear: Expected quantized weights with quantized activations, got float weights. "
            "Set weights, or set activations to null.",
        ),
    ],
)
def test_illegal_settings_cannot_be_constructed(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(BismoothError, match=f"^{re.escape(message)}$"):
        build()
