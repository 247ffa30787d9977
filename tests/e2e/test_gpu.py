"""Engines built and run for real, on a host with a GPU; `make gpu-check` runs these and shows the latencies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bismooth.engines.base import BuildRequest, Profile, Span
from bismooth.engines.tensorrt import TensorRTBuilder
from bismooth.engines.tensorrt_session import EngineSession
from bismooth.export.artifact import Artifact, Manifest
from bismooth.export.errors import BismoothError
from bismooth.passes.gates import Hop
from bismooth.tools import stages
from bismooth.tools.device import Target, find_target
from tests.quantized import make
from tests.tiny import make_tiny

pytestmark = pytest.mark.gpu
VOCAB, WIDTH = 64, 32


@pytest.fixture
def target() -> Target:
    """The GPU and the runtime; skips, with the reason, where no runtime builds for this GPU."""
    graphs = {"float16": "", "reference_float16": ""}
    found = find_target(Artifact(Path(), Manifest("quantized", {}, graphs)))
    if isinstance(found, str):
        pytest.skip(found)
    return found


def test_logits_are_those_of_numpy(tmp_path: Path, target: Target) -> None:
    """Batches and lengths of the whole profile, in any order, also after a refused one."""
    rng = np.random.default_rng(0)
    rows, weight = (rng.normal(size=shape).astype(np.float16) for shape in ((VOCAB, WIDTH), (WIDTH, VOCAB)))
    model = make(
        f"(int64[batch, sequence] input_ids) => (float[batch, sequence, {VOCAB}] logits) "
        "{ x = Gather(rows, input_ids) y = MatMul(x, w) logits = Cast<to = 1>(y) }",
        rows=rows,
        w=weight,
    )
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(model.SerializeToString())
    profile = Profile(Span(1, 1, 3), Span(1, 8, 16))
    request = BuildRequest(onnx, tmp_path / "model.engine", target.capabilities, profile)
    engine = TensorRTBuilder(target.runtime).build(request).engine
    with EngineSession(engine) as session:
        for shape in ((3, 16), (1, 1), (2, 7), (3, 16)):
            ids = rng.integers(0, VOCAB, shape)
            expected = rows[ids].astype(np.float32) @ weight.astype(np.float32)
            np.testing.assert_allclose(session.logits(ids), expected, atol=0.05)
            with pytest.raises(BismoothError, match="outside of the engine's profile"):
                session.logits(np.zeros((4, 4), np.int64))


def test_two_sessions_side_by_side_and_one_after_another(tmp_path: Path, target: Target) -> None:
    model = make(
        "(int64[batch, sequence] input_ids) => (float[batch, sequence, 4] logits) { logits = Gather(w, input_ids) }",
        w=np.arange(16, dtype=np.float32).reshape(4, 4),
    )
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(model.SerializeToString())
    engine = (
        TensorRTBuilder(target.runtime).build(BuildRequest(onnx, tmp_path / "m.engine", target.capabilities)).engine
    )
    ids = np.array([[0, 3, 1]])
    for _ in range(2):
        with EngineSession(engine) as first, EngineSession(engine) as second:
            np.testing.assert_array_equal(first.logits(ids), second.logits(ids))


def test_a_quantized_model_is_verified_on_the_gpu(tmp_path: Path, target: Target) -> None:
    """A tiny model, large enough for INT8 GEMMs and fused attention; then the same with the engines at hand."""
    tiny = make_tiny(
        tmp_path,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=128,
    )
    stages.export(tiny.source, tmp_path / "float")
    stages.quantize(tmp_path / "float", "w8a8-per-channel", tmp_path / "quantized", data_free=True)
    files: list[str] = []
    for _ in range(2):
        result = stages.verify(tmp_path / "quantized", [str(tiny.text)], windows=3, length=64, hops=[Hop.DEVICE])
        (hop,) = result.hops
        assert not hop.failures
        assert not hop.skipped
        assert 0 < hop.metrics["device_kl"] < 0.05
        assert hop.metrics["top1"] > 0.8
        assert min(hop.metrics["latency_ms"], hop.metrics["float_latency_ms"]) > 0
        print(f"\n{hop.metrics['runtime']}, KL {hop.metrics['device_kl']:.2e}; {hop.note()}; {hop.seconds:.1f} s")
        assert hop.metrics["device"] == target.device.name
        files.append(str(hop.metrics["engine_files"]))
    assert files[0] == files[1]
