"""What a build takes is told before it begins, and refused if there is less."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from bismooth.engines import build_memory
from bismooth.engines.build_memory import NEEDS, Need, plan_build
from bismooth.export.errors import BismoothError
from tests.cached_model import weights
from tests.cuttable import cuttable
from tests.quantized import make

BYTES = sum(table.nbytes for table in weights().values())
TAKEN = 50_000_000
MEGA = 10**6


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_memory, "current_rss", lambda: TAKEN)


def need_of(factor: float, base: int = 0, *, within: bool = False) -> Need:
    return Need(stored=factor, computed=0, per_node=0, base=base, within=within)


def test_weights_and_nodes_count() -> None:
    model = make("(float[2] x) => (float[2] y) { a = Add(x, w) y = Relu(a) }", w=np.zeros(2, np.float32))
    need = Need(stored=1.5, computed=1, per_node=10, base=100)
    assert need.of([model]) == 20 + 20 + 100
    assert need.of([model, model]) == 40 + 40 + 100


@pytest.mark.parametrize("kind", [onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
def test_weights_count_in_the_type_that_is_computed_with(kind: int) -> None:
    model = make("(float[2] x) => (float[2] y) { c = Cast<to = 1>(w) y = Add(x, c) }", w=np.zeros(2, np.uint16))
    model.graph.initializer[0].data_type = kind
    assert Need(stored=1, computed=0, per_node=0, base=0).of([model]) == 4
    assert Need(stored=1, computed=2, per_node=0, base=0).of([model]) == 4 + 2 * 8


@pytest.mark.parametrize(
    ("stored", "computed", "nodes", "peak"),
    [
        (538_060_272, 269_030_192, 1874, 1_640_456_192),  # SmolLM2-135M, float16
        (163_554_313, 163_554_313, 3253, 1_233_907_712),  # w8a8
        (56_623_104, 56_623_104, 1, 371_191_808),  # its embedding
        (35_643_145, 35_643_145, 1106, 495_558_656),  # ten of its blocks
        (856_039_817, 856_039_817, 143, 2_810_662_912),  # w8a8, a block of LLaMA3-70B
        (2_101_346_304, 2_101_346_304, 1, 6_304_587_776),  # its embedding
    ],
)
def test_measured_peaks_are_not_exceeded(stored: int, computed: int, nodes: int, peak: int) -> None:
    """Of TensorRT-RTX 1.7.1 for SM86, in bytes."""
    need = NEEDS["tensorrt-rtx"]
    estimate = need.stored * stored + need.computed * computed + need.per_node * nodes + need.base
    assert peak <= estimate <= 1.2 * peak


def test_what_is_there_is_enough() -> None:
    plan = plan_build(need_of(1, MEGA), cuttable(), "m.onnx", memory=TAKEN + MEGA + 2 * BYTES)
    assert (plan.parts, plan.estimates) == ((), (plan.estimated,))
    assert MEGA + BYTES <= plan.estimated < MEGA + BYTES + 1000


def test_a_builder_within_this_process_takes_what_that_has() -> None:
    need, within = (need_of(0, MEGA, within=within) for within in (False, True))
    assert plan_build(need, cuttable(), "m.onnx").estimates == (MEGA,)
    assert plan_build(within, cuttable(), "m.onnx", split=2).estimates == (TAKEN + MEGA,) * 4


def test_the_smallest_split_that_fits_is_named() -> None:
    need = need_of(1000)
    with pytest.raises(
        BismoothError,
        match=r"m\.onnx: building it takes about \d+MB of memory, and there are 100MB by --memory\. "
        r"Build it in parts with --split-blocks 2, which takes about \d+MB\.",
    ):
        plan_build(need, cuttable(), "m.onnx", memory=100 * MEGA)
    assert len(plan_build(need, cuttable(), "m.onnx", split=2, memory=100 * MEGA).parts) == 4


@pytest.mark.parametrize("split", [None, 1, 2])
def test_nothing_fits(split: int | None) -> None:
    with pytest.raises(BismoothError, match=r"takes about .* Expected \d+MB or more, with --split-blocks 2\."):
        plan_build(need_of(1000), cuttable(), "m.onnx", split=split, memory=TAKEN + MEGA)


def test_no_blocks_to_split_by() -> None:
    model = make("(float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(BismoothError, match=r"Expected 51MB or more: it has no blocks to split it by\."):
        plan_build(need_of(0, MEGA), model, "m.onnx", memory=MEGA)


def test_by_default_most_of_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bismooth.engines.budget.available_memory", lambda: MEGA)
    monkeypatch.setattr("bismooth.engines.budget.current_rss", lambda: TAKEN)
    with pytest.raises(BismoothError, match=r"takes about 52MB of memory, and there are 51MB\. Expected 52MB or more"):
        plan_build(need_of(0, 2 * MEGA), cuttable(), "m.onnx")
    monkeypatch.setattr("bismooth.engines.budget.available_memory", lambda: None)
    assert plan_build(need_of(0, 2 * MEGA), cuttable(), "m.onnx").estimated == 2 * MEGA
