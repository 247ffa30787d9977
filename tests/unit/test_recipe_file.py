"""Recipe files that are wrong: the message names the file, the key, what was expected and what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bismooth.export.errors import BismoothError
from bismooth.passes.gates import Gates
from bismooth.passes.recipe import Recipe
from bismooth.passes.recipe_file import BUILTIN, SCHEMA
from bismooth.passes.spec import ComputeType, IntegerType, RangeMethod, SiteKind

WRONG = {
    "weight: null": "the file: Unknown key 'weight'. Did you mean 'weights'?",
    "zzz: 1": "the file: Unknown key 'zzz'. Expected one of description, extends, compute_dtype, weights, activations,"
    " smoothing, max_share, layers, gates.",
    "3: 1": "the file: Unknown key 3. Expected one of",
    "smoothing: {alpha: [0.5]}": "smoothing: Unknown key 'alpha'. Did you mean 'alphas'?",
    "layers: [{match: a, weights: {granularty: per_channel}}]": "layers[0].weights: Unknown key 'granularty'."
    " Did you mean 'granularity'?",
    "gates: {top_1: 0.9}": "gates: Unknown key 'top_1'. Did you mean 'top1'?",
    "": "the file: Expected a mapping, got null.",
    "[1, 2]": "the file: Expected a mapping, got [1, 2].",
    "weights: int8": 'weights: Expected a mapping or null, got "int8".',
    "weights: {dtype: int8}": "weights: Expected the key 'granularity', got only dtype.",
    "weights: {}": "weights: Expected the key 'granularity', got none.",
    "weights: {granularity: per_chanel}": "weights.granularity: Expected per_channel or per_group or per_magnitude, got"
    ' "per_chanel".'
    " Did you mean 'per_channel'?",
    "weights: {granularity: 5}": "weights.granularity: Expected per_channel or per_group or per_magnitude, got 5.",
    "weights: {granularity: per_group}": "weights: Expected 'group_size' with granularity per_group, and only there.",
    "weights: {granularity: per_channel, group_size: 64}": "weights: Expected 'group_size' with granularity per_group,",
    "weights: {granularity: per_group, group_size: 0}": "weights.group_size: Expected 1 or more, got 0.",
    "weights: {granularity: per_channel, groups: 3}": "weights: Expected 'groups' with granularity per_magnitude only.",
    "weights: {granularity: per_group, group_size: 8, wall_bits: 8, groups: 2}": "weights: Expected 'groups' and"
    " 'wall_bits' with granularity per_magnitude only.",
    "weights: {granularity: per_magnitude, wall_bits: 12}": "weights.wall_bits: Expected 8 or 16, got 12.",
    "weights: {granularity: per_magnitude, groups: 1}": "weights.groups: Expected 2 or more, got 1.",
    "weights: {granularity: per_magnitude, group_size: 64}": "weights: Expected 'group_size' with granularity",
    "max_share: 3": "max_share: Expected at most 1, got 3.",
    "max_share: 0.1": "max_share: Expected a rule for @walls in 'layers', got none.",
    "weights: {granularity: per_group, group_size: 1.5}": "weights.group_size: Expected a whole number, got 1.5.",
    "activations: {granularity: per_token, range: mse}": "activations: Expected no 'range' or 'percentile' with"
    " granularity per_token.",
    "activations: {granularity: per_tensor}": "activations: Expected 'range' with granularity per_tensor.",
    "activations: {granularity: per_tensor, range: mse, percentile: 99}": "activations: Expected 'percentile' with"
    " range percentile, and only there.",
    "activations: {granularity: per_tensor, range: percentile, percentile: 50}": "activations.percentile: Expected more"
    " than 50, got 50.",
    "smoothing: {alphas: []}": "smoothing.alphas: Expected at least 1 entry, got [].",
    "smoothing: {alphas: [0.5, 1.5]}": "smoothing.alphas[1]: Expected at most 1, got 1.5.",
    "smoothing: {alphas: [0.5, 0.5]}": "smoothing.alphas: Expected entries that differ, got [0.5, 0.5].",
    "{extends: fp16, smoothing: {kinds: [norm]}}": "smoothing: Expected 'alphas', since nothing before sets them.",
    "gates: {top1: 93}": "gates.top1: Expected at most 1, got 93.",
    "gates: {kl: high}": 'gates.kl: Expected a number or null, got "high".',
    "gates: {kl: true}": "gates.kl: Expected a number or null, got true.",
    "layers: {}": "layers: Expected a list, got {}.",
    "layers: [{match: lm_head}]": "layers[0]: Expected 'match' and something to set (weights, activations or"
    ' smoothing), got {"match": "lm_head"}.',
    "layers: [{match: '', weights: null}]": 'layers[0].match: Expected some text, got "".',
    "layers: [{match: '@haed', weights: null}]": "layers[0].match: Unknown selector '@haed'. Expected a glob on module"
    " paths, or one of @head, @gated_product, @walls.",
    "extends: w8a9": "extends: Expected a built-in recipe, got 'w8a9'. Did you mean 'w8a8'?",
    "extends: null\ncompute_dtype: float16": "Expected every key with 'extends: null', got no activations, gates,"
    " layers, smoothing, weights.",
    "description: " + 80 * "x" + "\ngates: " + 80 * "x": f'gates: Expected a mapping, got "{56 * "x"}....',
    "weights: {": "The recipe cannot be read as YAML: while parsing",
    "gates: {kl: .nan}": "The recipe cannot be read as YAML: .nan is not a finite number",
    "gates: {kl: .inf}": "The recipe cannot be read as YAML: .inf is not a finite number",
    "gates: {kl: 1, kl: 2}": "The recipe cannot be read as YAML: the key 'kl' is given twice",
    "description: 2020-13-45": "The recipe cannot be read as YAML: month must be in 1..12",
    "layers: [&a [1], *a]": "The recipe cannot be read as YAML: aliases are not allowed in",
    5000 * "[": "The recipe cannot be read as YAML: maximum recursion depth exceeded",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:60])
def test_a_wrong_file_is_refused_with_its_key_path(text: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, "utf-8")
    with pytest.raises(BismoothError, match="^" + re.escape(f"{file}: {WRONG[text]}")):
        Recipe.load(file)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BismoothError, match="cannot be read as YAML: 'utf-8' codec can't decode"):
        Recipe.load(file)


def test_a_name_that_is_no_recipe_names_the_nearest() -> None:
    message = "recipe: 'w8a8-statik' is no file and no built-in recipe. Did you mean 'w8a8-static'?"
    with pytest.raises(BismoothError, match=f"^{re.escape(message)}$"):
        Recipe.load("w8a8-statik")


def test_numbers_in_scientific_notation_need_no_dot(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("gates: {kl: 1e-4, perplexity_ratio: +2e0}\n")
    gates = Recipe.load(file).gates
    assert (gates.kl, gates.perplexity_ratio) == (1e-4, 2.0)


def test_the_schema_and_the_value_types_list_the_same_words() -> None:
    properties, definitions = SCHEMA["properties"], SCHEMA["$defs"]
    assert set(properties["compute_dtype"]["enum"]) == set(ComputeType)
    assert definitions["weights"]["properties"]["dtype"]["enum"] == list(IntegerType)
    assert definitions["activations"]["properties"]["range"]["enum"] == list(RangeMethod)
    assert definitions["smoothing"]["properties"]["kinds"]["items"]["enum"] == list(SiteKind)


def test_the_schema_and_the_gates_agree() -> None:
    gates = SCHEMA["properties"]["gates"]["properties"]
    assert list(gates) == list(Gates().to_dict())
    at_least = {name for name, rule in gates.items() if rule["$ref"].endswith("atLeastShare")}
    assert at_least == {name for name in gates if Gates().replaced({name: 0.5}).missed(name, 0.4)}


def test_gates_judge_one_value_at_a_time() -> None:
    gates = Gates(top1=0.93, kl=0.02)
    assert gates.missed("top1", 0.93) is None
    assert gates.missed("top1", 0.92) == "reference: top1 is 0.92. Expected at least 0.93."
    assert gates.missed("kl", 0.021) == "reference: kl is 0.021. Expected at most 0.02."
    assert gates.missed("kl", float("nan")) == "reference: kl is nan. Expected at most 0.02."
    assert gates.missed("kl_p99", 1e9) is None
    assert Gates.hop("int8_mac_share") == "audit"


def test_an_unknown_gate_names_the_nearest() -> None:
    for attempt in (
        lambda: Gates().missed("top_1", 0),
        lambda: Gates().replaced({"top_1": 0}),
        lambda: Gates.hop("top_1"),
    ):
        with pytest.raises(BismoothError, match=r"^gates: There is no gate 'top_1'\. Did you mean 'top1'\?$"):
            attempt()


DOCS = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")


def test_the_documentation_names_every_key_and_gate() -> None:
    definitions = SCHEMA["$defs"].values()
    words = [*SCHEMA["properties"], *SCHEMA["properties"]["gates"]["properties"], *BUILTIN, *SiteKind, *RangeMethod]
    words += [key for definition in definitions for key in definition.get("properties", ())]
    assert not [word for word in words if not re.search(rf"`{re.escape(word)}[`:]", DOCS)]


def test_the_documentation_states_hop_and_bound_of_every_gate() -> None:
    for name in Gates().to_dict():
        side = "below" if Gates().replaced({name: 0.5}).missed(name, 0.4) else "above"
        assert f"| `{name}` | {Gates.hop(name)} | {side} the limit |" in DOCS


@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL))
def test_the_examples_of_the_documentation_are_recipes(example: str, tmp_path: Path) -> None:
    file = tmp_path / "example.yaml"
    file.write_text(example)
    linears = [f"model.layers.{block}.mlp.{name}" for block in range(4) for name in ("up_proj", "down_proj")]
    assert Recipe.load(file).resolve([*linears, "lm_head"], {"@head": ["lm_head"]})
