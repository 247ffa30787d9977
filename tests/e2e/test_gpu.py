"""Engines built and run for real, on a host with a GPU; `make gpu-check` runs these and shows the latencies."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bismooth.engines.base import BuildRequest, Profile, Span
from bismooth.engines.tensorrt import TensorRTBuilder
from bismooth.engines.tensorrt_decoder import TensorRTDecoder
from bismooth.engines.tensorrt_session import EngineSession
from bismooth.export.artifact import Artifact, Manifest
from bismooth.export.errors import BismoothError
from bismooth.passes.gates import Hop
from bismooth.tools import stages
from bismooth.tools.device import Target, find_target
from tests.cached_model import VOCAB as CACHED_VOCAB
from tests.cached_model import cached_model, expected_logits
from tests.quantized import make
from tests.tiny import Tiny, make_tiny

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


@pytest.mark.parametrize("window", [None, 5])
def test_decoding_is_that_of_numpy(tmp_path: Path, target: Target, window: int | None) -> None:
    """Padded rows, prompts in pieces, token by token; batches of any size one after another, and kernels from disk."""
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(cached_model(half=True, wide=True, window=window).SerializeToString())
    profile = Profile(Span(1, 1, 3), Span(1, 8, 8), capacity=64)
    request = BuildRequest(onnx, tmp_path / "model.engine", target.capabilities, profile)
    engine = TensorRTBuilder(target.runtime).build(request).engine
    rng = np.random.default_rng(0)
    for _ in range(2):
        with TensorRTDecoder(engine) as decoder:
            for rows, prompt in ((3, 20), (1, 1), (2, 8)):
                ids = rng.integers(0, CACHED_VOCAB, (rows, prompt + 24))
                mask = np.ones_like(ids)
                mask[0, : prompt // 2] = 0
                expected = expected_logits(ids, mask, window)
                decoder.reset()
                logits = decoder.prefill(ids[:, :prompt], mask[:, :prompt])
                np.testing.assert_allclose(logits, expected[:, prompt - 1], atol=0.3)
                for position in range(prompt, ids.shape[1]):
                    logits = decoder.decode(ids[:, position])
                    np.testing.assert_allclose(logits, expected[:, position], atol=0.3)
    with EngineSession(engine) as session:
        ids = rng.integers(0, CACHED_VOCAB, (3, 8))
        np.testing.assert_allclose(session.logits(ids), expected_logits(ids, None, window), atol=0.3)


def test_an_int8_model_decodes_as_its_float16_engine(tmp_path: Path, target: Target) -> None:
    """The logits of both after each token of the same text, and their time per token."""
    tiny = make_wide_tiny(tmp_path)
    stages.export(tiny.source, tmp_path / "float")
    stages.quantize(tmp_path / "float", "w8a8-per-channel", tmp_path / "quantized", data_free=True)
    steps, logits = 64, dict[str, list[NDArray[np.float32]]]()
    for kind in ("float", "quantized"):
        built = stages.build(
            tmp_path / kind, target.runtime.name, capabilities=target.capabilities, sequence=(1, 16, 16), capacity=128
        )
        audit = built.result.audit
        (tokens,) = audit.others
        assert audit.fused_attention == tokens.fused_attention > 0
        with TensorRTDecoder(built.result.engine) as decoder:
            ids = np.random.default_rng(0).integers(0, decoder.vocab_size, (1, 40 + steps))
            logits[kind] = [decoder.prefill(ids[:, :40])]
            start = time.perf_counter()
            logits[kind] += [decoder.decode(ids[:, 40 + step]) for step in range(steps)]
            seconds = time.perf_counter() - start
        print(f"\n{kind}: {1e3 * seconds / steps:.3f} ms per token, {tokens.kernels} kernels")
    half, int8 = (log_softmax(np.concatenate(logits[kind]).astype(np.float64)) for kind in ("float", "quantized"))
    divergence = (np.exp(half) * (half - int8)).sum(-1)
    print(f"KL {divergence.mean():.2e}, largest {divergence.max():.2e}")
    assert 0 < divergence.mean() < 0.05


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def make_wide_tiny(folder: Path) -> Tiny:
    """A tiny model, large enough for INT8 GEMMs and fused attention."""
    return make_tiny(
        folder,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=128,
    )


def test_a_quantized_model_is_verified_on_the_gpu(tmp_path: Path, target: Target) -> None:
    """The engines are built, and at hand the next time."""
    tiny = make_wide_tiny(tmp_path)
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
