"""Groups by magnitude: which channels share one."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bismooth.export.errors import BismoothError
from bismooth.passes.groups import fake_quantize, fake_quantize_static, members
from bismooth.passes.linears import Linear
from bismooth.passes.spec import Groups, LinearSpec, PerChannel, PerGroup, PerMagnitude, WeightSpec
from bismooth.passes.wall_groups import Broken, find_broken, fitting, group_walls, part
from bismooth.passes.weights import fake_quantize_rows, fake_quantize_with

K = 40
TWO, THREE = PerMagnitude(2, 8, ((3, 7),)), PerMagnitude(3, 8, ((7,), (3, 5)))


def linear(name: str, x: str = "x") -> Linear:
    return Linear(name, f"{name}/MatMul", x, f"{name}.y", f"{name}.w", "KN", K, 64, None, False, ())


def spec(granularity: Any) -> LinearSpec:
    return LinearSpec(WeightSpec(granularity))


@pytest.mark.parametrize("groups", [PerGroup(16), PerGroup(8), PerGroup(64), TWO, THREE])
def test_groups_hold_each_channel_once_and_are_rounded_apart(groups: Groups) -> None:
    parts = members(groups, K)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(K))
    rows = np.random.default_rng(0).standard_normal((6, K), np.float32)
    rows[:, 7] *= 100
    got = fake_quantize(rows, groups)
    for channels in parts:
        np.testing.assert_array_equal(got[:, channels], fake_quantize_rows(rows[:, channels]))
    room = rows.copy()
    assert fake_quantize(room, groups, out=room) is room
    np.testing.assert_array_equal(room, got)
    scales = np.linspace(0.5, 2, len(parts)).tolist()
    constant = fake_quantize_static(rows, scales, groups)
    for channels, scale in zip(parts, scales, strict=True):
        np.testing.assert_array_equal(
            constant[:, channels], fake_quantize_with(rows[:, channels], np.array([scale], np.float32))
        )


@pytest.mark.parametrize("static", [False, True])
def test_walls_in_two_digits_have_16_bits(static: bool) -> None:
    rows = np.random.default_rng(0).standard_normal((6, K), np.float32)
    groups = PerMagnitude(2, 16, ((3, 7),))
    peaks = np.abs(rows[:, [3, 7]]).max(axis=1)
    got = fake_quantize_static(rows, [1.0, 0.1], groups) if static else fake_quantize(rows, groups)
    steps = np.full((6, 1), 0.1) if static else peaks[:, None] / 127
    error = np.abs(got - rows)[:, [3, 7]] / (steps / 254)
    assert 0.3 < error.max() < 0.51


def test_without_groups_all_channels_share_a_scale() -> None:
    rows = np.random.default_rng(0).standard_normal((6, K), np.float32)
    np.testing.assert_array_equal(fake_quantize(rows, None), fake_quantize_rows(rows))
    np.testing.assert_array_equal(
        fake_quantize_static(rows, [0.5], None), fake_quantize_with(rows, np.array([0.5], np.float32))
    )


@pytest.mark.parametrize(
    ("walls", "most", "expected"),
    [
        ({}, 2, ()),
        ({4: 50, 1: 10}, 1, ((1, 4),)),
        ({4: 50, 1: 10}, 2, ((4,), (1,))),
        ({4: 15, 1: 10}, 2, ((1, 4),)),  # less than a bit apart
        ({0: 1, 1: 3, 2: 300, 3: 290, 4: 40}, 2, ((2, 3, 4), (0, 1))),
        ({0: 1, 1: 3, 2: 300, 3: 290, 4: 40}, 3, ((2, 3), (4,), (0, 1))),
    ],
)
def test_walls_are_parted_where_they_lie_furthest_apart(
    walls: dict[int, float], most: int, expected: tuple[tuple[int, ...], ...]
) -> None:
    assert part(walls, most) == expected


def test_linears_that_read_one_tensor_have_the_walls_of_all_of_them() -> None:
    linears = [linear("q"), linear("k"), linear("v"), linear("o", "other")]
    specs = dict.fromkeys("qko", spec(PerMagnitude())) | {"v": LinearSpec(WeightSpec())}
    walls = PerMagnitude(2, 8, ((3, 7),))  # of weights alone
    broken = [Broken("q", 0.5, {7: 9.0}), Broken("k", 0.4, {3: 9.0}), Broken("v", 0.3, {5: 9.0})]
    assert group_walls(specs, linears, broken) == specs | {"q": spec(walls), "k": spec(walls)}


def read(weights: Mapping[str, NDArray[np.float32]], item: Linear, elements: int) -> Iterator[NDArray[np.float32]]:
    """Some rows at a time."""
    rows = max(1, elements // item.k)
    return (weights[item.name][start : start + rows] for start in range(0, item.n, rows))


def test_linears_that_read_one_tensor_agree_on_its_groups() -> None:
    linears = [linear("q"), linear("k")]
    specs = {"q": spec(PerMagnitude(2)), "k": spec(PerMagnitude(3, 8))}
    message = (
        r"^k: reads the same tensor as q, with other groups\. Expected the same for x, got groups: 3, wall_bits: 8 and"
    )
    with pytest.raises(BismoothError, match=message):
        group_walls(specs, linears, [])


def test_walls_are_not_all_channels() -> None:
    broken = [Broken("q", 0.5, dict.fromkeys(range(K), 1.0))]
    assert group_walls({"q": spec(PerMagnitude())}, [linear("q")], broken) == {"q": spec(PerMagnitude())}


@pytest.mark.parametrize(("size", "expected"), [(K - 1, PerGroup(K - 1)), (K, PerChannel()), (1000, PerChannel())])
def test_a_group_of_all_channels_is_none(size: int, expected: PerGroup | PerChannel) -> None:
    assert fitting({"q": spec(PerGroup(size))}, [linear("q")]) == {"q": spec(expected)}


def test_weights_that_are_not_finite_are_named() -> None:
    weight = np.ones((64, K), np.float32)
    weight[50, 3] = np.inf
    with pytest.raises(BismoothError, match=r"^q\.w: the weight holds NaN or infinity in row 50\."):
        find_broken([linear("q")], partial(read, {"q": weight}))


def test_broken_linears_are_named_the_worst_first() -> None:
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((64, K), np.float32) for name in "abc"}
    weights["a"][:, 9] *= 30
    weights["c"][:, 4] *= 300
    done: list[str] = []
    found = find_broken([linear(name) for name in "abc"], partial(read, weights), done.append)
    assert [(item.name, list(item.walls)) for item in found] == [("c", [4]), ("a", [9])]
    assert found[0].walls[4] == np.abs(weights["c"][:, 4]).max()
    assert found[0].error > found[1].error > 0.02
    assert done == ["a", "b", "c"]
