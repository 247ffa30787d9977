"""The least that a step costs, against figures computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from bismooth.export.errors import BismoothError
from bismooth.tools.cost import CostModel, StepCost
from tests.benched import COST, DIMS, audit, linear


def test_a_model() -> None:
    weights = 1000 + 500 + 2 * 300 + 200 + 2 * 400
    position = 2 * 2 * 2 * 8 * 2  # key and value, layers, heads, size, bytes
    attention = 2 * 2 * 4 * 8  # scores and mix, layers, heads, size
    assert CostModel(weights, position, 1500, 500, 0, 400, attention) == COST


def test_a_token() -> None:
    step = COST.decode(3, 10)
    assert step.weight_bytes == 3100, "read once for all rows"
    assert step.cache_bytes == 3 * 10 * 128
    assert step.int8_operations == 2 * 3 * 1500
    assert step.float_operations == 2 * 3 * (500 + 400 + 10 * 128)
    assert (step.bytes, step.operations) == (3100 + 3840, 9000 + 13080)


def test_a_prompt() -> None:
    step = COST.prefill(2, 4)
    assert step.bytes == 3100 + 2 * 4 * 128
    assert step.int8_operations == 2 * 2 * 4 * 1500
    pairs = 1 + 2 + 3 + 4
    assert step.float_operations == 2 * 2 * (4 * 500 + 400 + pairs * 128), "one row of logits for each text"


def test_a_prompt_of_one_token_is_a_token() -> None:
    assert COST.prefill(2, 1) == COST.decode(2, 1)


@pytest.mark.parametrize(
    ("types", "weight", "cache"), [("Float Float Float", 40, 4), ("BFloat16 BFloat16 BFloat16", 20, 2)]
)
def test_other_types(types: str, weight: int, cache: int) -> None:
    model = CostModel.of(audit(linear("q", 10, types)), DIMS, "engine")
    assert (model.weight_bytes, model.cache_bytes, model.float_macs) == (weight, 64 * cache, 10)


def test_an_int8_head() -> None:
    assert CostModel.of(audit(linear("head", 10, head=True)), DIMS, "x").decode(1, 0) == StepCost(10, 0, 20, 0)


def test_what_cannot_be_told() -> None:
    with pytest.raises(BismoothError, match=r"^x: the manifest lacks num_key_value_heads, head_dim\. Expected the dim"):
        CostModel.of(audit(), {key: DIMS[key] for key in ("num_hidden_layers", "num_attention_heads")}, "x")
    unknown: Any = linear("q", 10, "Half Int4 Half")
    with pytest.raises(
        BismoothError, match=r"^x: the audit gives Int4 as the weight of q/MatMul\. Expected one of: Int8"
    ):
        CostModel.of(audit(unknown), DIMS, "x")
    with pytest.raises(BismoothError, match=r"^x: the audit gives no type of any linear's output\."):
        CostModel.of(audit(linear("q", 10, "Int8 Int8 Int32")), DIMS, "x")
