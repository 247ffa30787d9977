"""Recipes: the built-in ones, inheritance, rules for some layers, and what they resolve to."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes.recipe import Recipe
from bismooth.passes.recipe_file import BUILTIN
from bismooth.passes.spec import (
    ComputeType,
    DynamicActivation,
    LinearSpec,
    PerGroup,
    PerMagnitude,
    RangeMethod,
    SiteKind,
    SmoothSpec,
    StaticActivation,
    WeightSpec,
)

LINEARS = [f"model.layers.{block}.{path}" for block in range(4) for path in ("self_attn.q_proj", "mlp.down_proj")]
HEADS = ["lm_head"]
SELECTED = {"@head": HEADS, "@gated_product": [name for name in LINEARS if name.endswith("down_proj")]}
Q0, DOWN3 = "model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"
GRID = SmoothSpec((0.4, 0.55, 0.7, 0.85), refine_steps=30)


def resolve(**keys: Any) -> dict[str, LinearSpec]:
    return Recipe.from_dict(keys, name="test").resolve([*LINEARS, *HEADS], SELECTED)


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("fp16", LinearSpec()),
        ("w8a8", LinearSpec(WeightSpec(), DynamicActivation(), GRID)),
        ("w8a8-per-channel", LinearSpec(WeightSpec(), DynamicActivation())),
        ("w8a8-static", LinearSpec(WeightSpec(), StaticActivation(RangeMethod.MINMAX), GRID)),
        ("w8a16", LinearSpec(WeightSpec())),
    ],
)
def test_builtin_recipes_quantize_every_linear_but_the_head(name: str, linear: LinearSpec) -> None:
    recipe = Recipe.load(name)
    specs = recipe.resolve([*LINEARS, *HEADS], {"@head": HEADS})
    assert {specs[path] for path in LINEARS} == {linear}
    assert specs["lm_head"] == LinearSpec(smoothing=linear.smoothing)
    assert recipe.compute_dtype is ComputeType.FLOAT16
    assert recipe.description


def test_the_builtin_recipes_are_those_above() -> None:
    assert list(BUILTIN) == [
        "fp16",
        "w8a16",
        "w8a8-head",
        "w8a8-mixed+bismooth",
        "w8a8-mixed",
        "w8a8-per-channel",
        "w8a8-static",
        "w8a8",
    ]


def test_the_head_is_computed_as_all_other_linears() -> None:
    specs = Recipe.load("w8a8-head").resolve([*LINEARS, *HEADS], SELECTED)
    assert set(specs.values()) == {Recipe.load("w8a8").resolve(LINEARS, SELECTED)[Q0]}


@pytest.mark.parametrize(("name", "base"), [("w8a8-mixed", "w8a8-per-channel"), ("w8a8-mixed+bismooth", "w8a8")])
def test_mixed_recipes_group_the_channels_of_linears_with_walls(name: str, base: str) -> None:
    mixed, plain = Recipe.load(name), Recipe.load(base)
    assert (mixed.asks_for_walls, plain.asks_for_walls) == (True, False)
    names = [*LINEARS, *HEADS]
    specs, others = mixed.resolve(names, SELECTED | {"@walls": [Q0]}), plain.resolve(names, SELECTED)
    assert specs == others | {Q0: replace(others[Q0], weights=WeightSpec(PerMagnitude()))}


def test_groups_by_magnitude_ask_for_walls_without_a_selector() -> None:
    weights = {"granularity": "per_magnitude", "groups": 3}
    assert Recipe.from_dict({"weights": weights}, name="test").asks_for_walls
    assert resolve(weights=weights)[Q0].weights == WeightSpec(PerMagnitude(3))


@pytest.mark.parametrize("name", BUILTIN)
def test_plain_data_gives_the_recipe_back(name: str) -> None:
    recipe = Recipe.load(name)
    again = Recipe.from_dict(recipe.to_dict(), name=name)
    assert again == recipe
    assert again.fingerprint == recipe.fingerprint


def test_fingerprints_tell_apart_what_is_built_and_nothing_else() -> None:
    recipes = [Recipe.load(name) for name in BUILTIN]
    assert len({recipe.fingerprint for recipe in recipes}) == len(recipes)
    renamed = replace(recipes[0], name="other", description="other", gates=recipes[1].gates)
    assert renamed.fingerprint == recipes[0].fingerprint


def test_a_file_says_only_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("compute_dtype: bfloat16\nsmoothing: {alphas: [0.5]}\ngates: {int8_kl_vs_reference: 1e-5}\n")
    recipe, base = Recipe.load(file), Recipe.load("w8a8")
    assert recipe.name == "mine"
    assert recipe.compute_dtype is ComputeType.BFLOAT16
    assert recipe.settings == replace(base.settings, smoothing=SmoothSpec((0.5,), refine_steps=0))
    assert recipe.gates == replace(base.gates, int8_kl_vs_reference=1e-5)
    assert recipe.layers == base.layers


def test_a_recipe_extends_another_builtin() -> None:
    specs = resolve(extends="w8a16", layers=[{"match": DOWN3, "weights": None}])
    assert specs[Q0] == LinearSpec(WeightSpec())
    assert specs[DOWN3] == LinearSpec()


def test_every_option_can_be_set_for_some_layers() -> None:
    specs = resolve(
        layers=[
            {"match": "model.layers.[01].*", "weights": {"granularity": "per_group", "group_size": 64}},
            {"match": "*.down_proj", "activations": {"granularity": "per_tensor", "range": "mse"}},
            {"match": "*.q_proj", "smoothing": {"kinds": ["norm"]}},
            {"match": DOWN3, "smoothing": None},
        ]
    )
    only_norms = replace(GRID, kinds=frozenset({SiteKind.NORM}))
    assert specs[Q0] == LinearSpec(WeightSpec(PerGroup(64)), DynamicActivation(), only_norms)
    assert specs[DOWN3] == LinearSpec(WeightSpec(), StaticActivation(RangeMethod.MSE))


def test_later_rules_win() -> None:
    off, on = {"match": "*", "weights": None}, {"match": "*.q_proj", "weights": {"granularity": "per_channel"}}
    assert not resolve(layers=[on, off])[Q0].quantized
    specs = resolve(layers=[off, on])
    assert specs[Q0].activations == DynamicActivation()
    assert not specs[DOWN3].quantized


def test_the_head_is_addressed_by_what_it_does() -> None:
    assert resolve(layers=[{"match": "@head", "weights": {"granularity": "per_channel"}}])["lm_head"].quantized
    assert Recipe.load("w8a8").resolve(["encoder.dense"], {})["encoder.dense"].quantized


def test_gated_products_are_addressed_by_what_they_are() -> None:
    static, per_token = StaticActivation(RangeMethod.MINMAX), DynamicActivation()
    specs = resolve(extends="w8a8-static")
    assert {specs[name].activations for name in LINEARS if name.endswith("down_proj")} == {per_token}
    assert {specs[name].activations for name in LINEARS if name.endswith("q_proj")} == {static}
    assert specs["lm_head"].activations is None
    everywhere = resolve(activations={"granularity": "per_tensor", "range": "minmax"})
    assert {everywhere[name].activations for name in LINEARS} == {static}
    again = {"match": "@gated_product", "activations": {"granularity": "per_tensor", "range": "minmax"}}
    assert resolve(extends="w8a8-static", layers=[again]) == everywhere


def test_alpha_can_be_fixed_everywhere() -> None:
    recipe = Recipe.from_dict({"layers": [{"match": "*.q_proj", "smoothing": {"alphas": [0.2, 0.3]}}]}, name="test")
    specs = recipe.with_alpha(0.6).resolve(LINEARS, {})
    assert {spec.smoothing and spec.smoothing.alphas for spec in specs.values()} == {(0.6,)}
    unsmoothed = Recipe.load("w8a8-per-channel")
    assert unsmoothed.with_alpha(0.6) == unsmoothed


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("model.layers.*.self_attn.qproj", "'model.layers.*.self_attn.q_proj'"),
        ("*.downproj", "'*.down_proj'"),
        ("zzz", "'*.down_proj', '*.lm_head', '*.q_proj'"),
    ],
)
def test_a_pattern_that_fits_nothing_names_near_misses(pattern: str, near: str) -> None:
    message = f"recipe test: layers: {pattern!r} fits none of the 9 linears. Near it: {near}"
    with pytest.raises(BismoothError, match=re.escape(message)):
        resolve(layers=[{"match": pattern, "weights": None}])


def test_a_pattern_fits_nothing_in_a_model_without_linears() -> None:
    recipe = Recipe.from_dict({"layers": [{"match": "*", "weights": None}]}, name="test")
    with pytest.raises(BismoothError, match=r"'\*' fits none of the 0 linears\.$"):
        recipe.resolve([], {})


@pytest.mark.parametrize(("name", "limit", "expected"), [("top1", 93, "a share from 0 to 1"), ("kl", -1, "0 or more")])
def test_a_gate_out_of_range(name: str, limit: float, expected: str) -> None:
    with pytest.raises(BismoothError, match=f"gates: {name}: Expected {expected}"):
        Recipe.load("w8a8").gates.replaced({name: limit})
