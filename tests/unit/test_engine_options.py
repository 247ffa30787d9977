"""Options that an engine heeds, and those that it could only ignore; sizes for every dynamic dimension."""

from __future__ import annotations

from pathlib import Path

import pytest

from bismooth.engines.base import Profile, Span
from bismooth.export.errors import BismoothError
from bismooth.tools.engines import CAPACITY, check_options, find_profile, gather_sizes
from tests.cached_model import cached_model
from tests.quantized import make

SIZES = (1, 2, 3)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(make("(float[rows, 8, cols] x) => (float[rows, 8, cols] y) { y = Relu(x) }").SerializeToString())
    return path


@pytest.mark.parametrize(
    ("engine", "capabilities", "sizes", "message"),
    [
        (
            "onnxruntime",
            (86,),
            {},
            r"--capability 86: has no effect on engine onnxruntime: nothing in it depends on a GPU",
        ),
        (
            "tensorrt",
            (86, 89),
            {},
            r"--capability 86 89: has no effect on engine tensorrt: it builds for the GPU of this",
        ),
        (
            "onnxruntime",
            (),
            {"batch": SIZES},
            r"--batch: has no effect on engine onnxruntime, which takes inputs of any",
        ),
        ("onnxruntime", (), {"rows": SIZES}, r"--dim rows: has no effect on engine onnxruntime"),
        ("tensorrt-rtx", (), {}, r"Expected --capability 86 89 …, got none"),
    ],
)
def test_options_without_effect(
    engine: str, capabilities: tuple[int, ...], sizes: dict[str, tuple[int, int, int]], message: str
) -> None:
    with pytest.raises(BismoothError, match=message):
        check_options(engine, capabilities, sizes)


def test_a_capacity_without_effect(graph: Path) -> None:
    with pytest.raises(BismoothError, match=r"--batch, --capacity: has no effect on engine onnxruntime, which takes"):
        check_options("onnxruntime", (), {"batch": SIZES}, 64)
    with pytest.raises(
        BismoothError, match=r"--capacity 64: has no effect on .*model\.onnx, which has no caches\. Leave"
    ):
        find_profile(graph, {"rows": SIZES, "cols": SIZES}, capacity=64)


@pytest.mark.parametrize("engine", ["tensorrt", "null"])
def test_positions_of_logits_are_chosen_for_a_cpu_alone(engine: str) -> None:
    check_options("onnxruntime", (), {}, logits="all")
    with pytest.raises(BismoothError, match=rf"--logits last: has no effect on engine {engine}, whose decoder chooses"):
        check_options(engine, (), {}, logits="last")


def test_a_capability_is_checked_before_anything_is_read() -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(BismoothError, match="unknown compute capability 87"):
        check_options("tensorrt-rtx", (87,), {})


def test_sizes_come_from_one_option() -> None:
    assert gather_sizes((1, 1, 1), None, {"rows": SIZES}) == {"batch": (1, 1, 1), "rows": SIZES}
    with pytest.raises(BismoothError, match=r"--dim sequence: got sizes in --sequence too"):
        gather_sizes(None, SIZES, {"sequence": SIZES})


def test_every_dynamic_dimension_has_sizes(graph: Path) -> None:
    profile = find_profile(graph, {"rows": SIZES, "cols": (4, 4, 4)})
    assert profile == Profile(others={"rows": Span(*SIZES), "cols": Span(4, 4, 4)})
    with pytest.raises(
        BismoothError, match=r"'cols' of input 'x' has no sizes\. Expected --dim cols=MIN:OPT:MAX\. .*rows, cols"
    ):
        find_profile(graph, {"rows": SIZES})
    with pytest.raises(
        BismoothError, match=r"--dim width: .* no dynamic dimension 'width'\. Expected one of: rows, cols"
    ):
        find_profile(graph, {"rows": SIZES, "cols": SIZES, "width": SIZES})
    with pytest.raises(BismoothError, match=r"--batch: .* no dynamic dimension 'batch'"):
        find_profile(graph, {"rows": SIZES, "cols": SIZES, "batch": SIZES})


def test_sequences_are_no_longer_than_the_model_takes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(make("(float[sequence, 8] x) => (float[sequence, 8] y) { y = Relu(x) }").SerializeToString())
    longest = Profile().sequence.maximum
    assert find_profile(path, {}, longest) == Profile()
    assert find_profile(path, {}, 64).sequence == Span(1, 64, 64)
    assert find_profile(path, {"sequence": (1, 2, 64)}, 64).sequence == Span(1, 2, 64)
    with pytest.raises(BismoothError, match=r"--sequence 1:2:65: the model has 64 positions .* maximum of 64 or less"):
        find_profile(path, {"sequence": (1, 2, 65)}, 64)


def test_dimensions_that_are_fixed_or_have_no_name(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(make("(float[2, 8] x) => (float[2, 8] y) { y = Relu(x) }").SerializeToString())
    assert find_profile(path, {}) == Profile()
    with pytest.raises(BismoothError, match="Expected one of: none, all sizes are fixed"):
        find_profile(path, {"rows": SIZES})
    path.write_bytes(make("(float[?, 8] x) => (float[?, 8] y) { y = Relu(x) }").SerializeToString())
    with pytest.raises(BismoothError, match="dimension 0 of input 'x' is dynamic and has no name"):
        find_profile(path, {})


def test_capacity_of_caches(tmp_path: Path) -> None:
    """Bounds the sequence, is bounded by the model, and at least what --sequence asks for."""
    path = tmp_path / "model.onnx"
    path.write_bytes(cached_model().SerializeToString())
    assert find_profile(path, {}) == Profile(sequence=Span(1, 512, 512), capacity=CAPACITY)
    assert find_profile(path, {}, 1024).capacity == 1024
    assert find_profile(path, {}, 1 << 17).capacity == CAPACITY
    assert find_profile(path, {}, capacity=64) == Profile(sequence=Span(1, 64, 64), capacity=64)
    assert find_profile(path, {"sequence": (1, 8, 4096)}).capacity == 4096
    with pytest.raises(BismoothError, match=r"--capacity 65: the model has 64 positions .* maximum of 64 or less"):
        find_profile(path, {}, 64, 65)
    with pytest.raises(
        BismoothError, match=r"--capacity 64: --sequence asks for 65 positions at once\. Expected 65 or"
    ):
        find_profile(path, {"sequence": (1, 8, 65)}, capacity=64)
    with pytest.raises(
        BismoothError, match=r"--dim past: .* no dynamic dimension 'past'\. Expected one of: batch, seq"
    ):
        find_profile(path, {"past": SIZES})


def test_shapes_of_an_engine_with_caches() -> None:
    profile = Profile(Span(1, 1, 2), Span(1, 4, 8), capacity=16)
    assert profile.shapes("past", ("batch", 3, "past", 64)) == ((1, 3, 16, 64), (1, 3, 16, 64), (2, 3, 16, 64))
    assert profile.shapes("mask", ("batch", "total")) == ((1, 16), (1, 16), (2, 16))
