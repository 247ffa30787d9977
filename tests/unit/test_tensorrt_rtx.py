"""Real engines, built without a GPU by TensorRT-RTX: INT8 where it is due, fallbacks flagged, bad graphs refused."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

from bismooth.engines.base import BuildRequest, BuildResult, Phase, Profile, Span
from bismooth.engines.kernel_log import Tensor, read_kernels
from bismooth.engines.publish import read_record
from bismooth.engines.tensorrt import TensorRTBuilder
from bismooth.export.errors import BismoothError, GateError
from tests.cached_model import LAYERS, SIZE, cached_model
from tests.quantized import K, channel_scaled_activation, float_linear, make, per_token, save, weight_only

pytestmark = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu12")
EACH = pytest.mark.parametrize("capabilities", [(75,), (89,)])


def request(model: onnx.ModelProto, folder: Path, *capabilities: int) -> BuildRequest:
    profile = Profile(sequence=Span(1, 16, 32))
    return BuildRequest(save(model, folder), folder / "model.engine", capabilities or (89,), profile)


def build(model: onnx.ModelProto, folder: Path, *capabilities: int, meant: str = "") -> BuildResult:
    return TensorRTBuilder().build(
        replace(request(model, folder, *capabilities), meant_int8=frozenset(f"{name}/MatMul" for name in meant.split()))
    )


@EACH
def test_per_token_linears_merge_into_one_int8_gemm(tmp_path: Path, capabilities: tuple[int, ...]) -> None:
    result = build(per_token("q_proj", "k_proj", "v_proj"), tmp_path, *capabilities, meant="q_proj k_proj v_proj")
    audit = result.audit
    assert [linear.int8 for linear in audit.linears] == [True] * 3
    assert set(audit.linears[0].merged_with) == {"k_proj", "v_proj"}
    assert (audit.gemms, audit.int8_gemms, audit.kernels) == (1, 1, 5)
    assert result.record.bytes == (tmp_path / "model.engine").stat().st_size > 3 * K * K
    assert result.record.capabilities == capabilities
    assert (audit.activation_bytes or 0) > 0


def test_one_engine_for_many_capabilities_is_deterministic(tmp_path: Path) -> None:
    first, second = (build(per_token("fc"), tmp_path, 80, 86, 89, 120, meant="fc").record for _ in range(2))
    assert first == second


@EACH
def test_fallback_is_flagged_unless_allowed(tmp_path: Path, capabilities: tuple[int, ...]) -> None:
    plain = replace(request(channel_scaled_activation(), tmp_path, *capabilities), meant_int8=frozenset({"fc/MatMul"}))
    with pytest.raises(GateError, match=r"1 of the 1 linears that were meant to be INT8 .* got fc/MatMul \("):
        TensorRTBuilder().build(plain)
    assert not plain.engine.exists()
    result = TensorRTBuilder().build(replace(plain, allow_float=True))
    assert [linear.node for linear in result.audit.fallbacks] == ["fc/MatMul"]
    assert result.audit.int8_share(with_head=True) == 0


@EACH
def test_weight_only_is_no_int8_gemm(tmp_path: Path, capabilities: tuple[int, ...]) -> None:
    (linear,) = build(weight_only(), tmp_path, *capabilities).audit.linears
    assert (linear.int8, linear.input) == (False, "Half")


def test_attention_with_fewer_key_heads_is_one_fused_kernel(tmp_path: Path) -> None:
    model = make(
        """(float16[batch, 4, sequence, 32] q, float16[batch, 2, sequence, 32] k, float16[batch, 2, sequence, 32] v,
            bool[batch, 1, sequence, sequence] mask) => (float16[batch, 4, sequence, 32] y) {
            y = Attention<scale = 0.2>(q, k, v, mask)
        }"""
    )
    audit = build(model, tmp_path).audit
    assert (audit.fused_attention, audit.linears) == (1, ())


def test_phases_are_reported(tmp_path: Path) -> None:
    phases: list[Phase] = []
    TensorRTBuilder().build(request(float_linear(), tmp_path), phases.append)
    assert phases[0].name == "Building engine"
    assert len({phase.name for phase in phases}) > 3


def test_capabilities_of_the_installed_version(tmp_path: Path) -> None:
    with pytest.raises(BismoothError, match=r"unknown compute capability 70\. Expected one of: 75, 80, 86, 89, 120"):
        build(float_linear(), tmp_path, 70)
    with pytest.raises(BismoothError, match="75 cannot share an engine with others, got 75 and 89"):
        build(float_linear(), tmp_path, 75, 89)


def test_bfloat16_on_turing(tmp_path: Path) -> None:
    model = make(
        f"(float16[batch, {K}] x) => (float16[batch, {K}] y) {{ c = Cast<to = 10>(w) y = MatMul(x, c) }}",
        w=np.zeros((K, K), np.uint16),
    )
    model.graph.initializer[0].data_type = onnx.TensorProto.BFLOAT16
    with pytest.raises(BismoothError, match=r"cannot build an engine: .*HW-specific datatypes"):
        build(model, tmp_path, 75)


def test_weights_that_are_cut_off(tmp_path: Path) -> None:
    plain = request(float_linear(), tmp_path)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BismoothError, match="the weight 'fc_weight' is not where the model says"):
        TensorRTBuilder().build(plain)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "y = DynamicQuantizeLinear(x)",
            r"node 'y/DynamicQuantizeLinear' \(DynamicQuantizeLinear\): .*UNSUPPORTED_NODE",
        ),
        ("y = NoSuchOperator(x)", r"node 'y/NoSuchOperator' \(NoSuchOperator\): (Op|.*Plugin not found)"),
        ("a = Add(x, b) b = Relu(a) y = Relu(a)", "cannot read the graph: .*Failed to sort the model topologically"),
        ("y = Add(x, absent)", r"node 'y/Add' \(Add\): .*Node input was not registered"),
    ],
)
def test_graphs_that_cannot_be_read(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(BismoothError, match=rf"model\.onnx: TensorRT-RTX .*{message}"):
        build(make(f"(float[batch, 8] x) => (float[batch, 8] y) {{ {body} }}"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "weights.bin"]


def test_dimension_without_sizes(tmp_path: Path) -> None:
    with pytest.raises(BismoothError, match="no sizes for dimension 0 of input 'x', named 'rows'"):
        build(make("(float[rows, 8] x) => (float[rows, 8] y) { y = Relu(x) }"), tmp_path)


DECODERS = pytest.mark.parametrize("capabilities", [(75,), (80, 86, 89, 120)])


def cached(folder: Path, *capabilities: int, capacity: int | None = 64) -> BuildRequest:
    """:func:`.cached_model` in float16, as 16-bit graphs of artifacts are."""
    profile = Profile(sequence=Span(1, 16, 16), capacity=capacity)
    onnx_file = save(cached_model(half=True, wide=True), folder)
    return BuildRequest(onnx_file, folder / "model.engine", capabilities, profile, log=folder / "build.log")


@DECODERS
def test_caches_are_updated_in_place(tmp_path: Path, capabilities: tuple[int, ...]) -> None:
    """With fused attention for prompts and tokens; for a token, no kernel writes a cache but those that update it."""
    result = TensorRTBuilder().build(cached(tmp_path, *capabilities))
    prompts, (tokens,) = result.audit, result.audit.others
    assert (prompts.fused_attention, tokens.fused_attention) == (LAYERS, LAYERS)
    names = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    presents = {f"present.{name}" for name in names}
    decoding = [kernel for kernel in read_kernels((tmp_path / "build.log").read_text()) if kernel.profile == 1]
    written = [tensor.name.partition(" ")[0] for kernel in decoding for tensor in kernel.outputs if is_cache(tensor)]
    assert sorted(written) == sorted(presents)
    assert not [tensor for kernel in decoding for tensor in kernel.inputs if tensor.name.startswith("past_key_values")]
    caches = result.record.caches
    assert caches is not None
    assert caches.capacity == 64
    assert caches.aliases == {f"past_key_values.{name}": f"present.{name}" for name in names}
    assert caches.decode == dict.fromkeys(["input_ids", "position_ids"], ((1, 1), (1, 1), (4, 1))) | {
        "logits_at": ((1,), (1,), (1,))
    }
    assert result.record.shapes["logits_at"] == ((1,), (1,), (16,))
    assert result.record.shapes["attention_mask"] == ((1, 64), (1, 64), (4, 64))
    assert read_record(result.engine) == result.record


def is_cache(tensor: Tensor) -> bool:
    """Whether it has all positions of all heads, in any layout."""
    return 64 in tensor.shape and SIZE in tensor.shape


def test_sequences_that_the_caches_do_not_hold(tmp_path: Path) -> None:
    with pytest.raises(
        BismoothError, match=r"caches of 8 positions do not hold sequences of 16\. Expected a profile with"
    ):
        TensorRTBuilder().build(cached(tmp_path, 89, capacity=8))
    with pytest.raises(BismoothError, match=r"caches of 0 positions do not hold sequences of 16"):
        TensorRTBuilder().build(cached(tmp_path, 89, capacity=None))
