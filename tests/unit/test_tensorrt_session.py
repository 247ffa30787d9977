"""Engines on a GPU: what is checked before, what is called, what comes out, and that everything is freed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bismooth.engines import tensorrt_open
from bismooth.engines.base import BuildRequest, Profile, Span
from bismooth.engines.cuda import CudaRuntime
from bismooth.engines.publish import read_record
from bismooth.engines.tensorrt import TENSORRT, TENSORRT_RTX, TensorRTBuilder
from bismooth.engines.tensorrt_runtime import load_module
from bismooth.engines.tensorrt_session import EngineSession
from bismooth.export.errors import BismoothError
from tests.fake_cuda import FakeCuda, Status
from tests.fake_engine import PROFILE, TABLE, VOCAB, FakeTensorRT, write_engine
from tests.quantized import float_linear, save

IDS = np.array([[0, 1, 2], [4, 3, 2]])
Install = Callable[..., FakeCuda]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put stand-ins in place of CUDA and TensorRT; their options are those of :class:`FakeTensorRT`."""

    def put(cuda: FakeCuda | None = None, **options: Any) -> FakeCuda:
        fake = cuda or FakeCuda()
        trt = FakeTensorRT(fake, **options)
        monkeypatch.setattr(tensorrt_open, "load_cuda", lambda: CudaRuntime(fake))
        monkeypatch.setattr(tensorrt_open, "load_module", {TENSORRT: trt, TENSORRT_RTX: trt}.__getitem__)
        return fake

    return put


def fails(message: str, engine: Path) -> None:
    with pytest.raises(BismoothError, match=re.escape(f"{engine}: {message}")):
        EngineSession(engine)


def assert_freed(cuda: FakeCuda) -> None:
    assert (cuda.memory, cuda.streams) == ({}, {})


def test_logits_of_batches_of_any_shape_in_the_profile(tmp_path: Path, install: Install) -> None:
    cuda = install()
    with EngineSession(write_engine(tmp_path)) as session:
        for ids in (IDS, IDS[:1, :2], np.zeros((2, 6), np.int64)):
            logits = session.logits(ids)
            assert logits.dtype == np.float32
            np.testing.assert_array_equal(logits, TABLE[ids].astype(np.float32))
    assert_freed(cuda)


def test_windows_come_in_order_and_in_batches(tmp_path: Path, install: Install) -> None:
    install()
    ids = np.arange(10).reshape(5, 2) % VOCAB
    with EngineSession(write_engine(tmp_path)) as session:
        batches = list(session.windows(ids, batch_size=2))
        assert [len(batch) for batch in batches] == [2, 2, 1]
        np.testing.assert_array_equal(np.concatenate(batches), TABLE[ids].astype(np.float32))
        assert [len(batch) for batch in session.windows(ids)] == [1] * 5


@pytest.mark.parametrize("kind", ["FLOAT", "HALF", "BF16"])
def test_logits_of_every_type_become_float32(tmp_path: Path, install: Install, kind: str) -> None:
    install(kinds={"input_ids": "INT64", "logits": kind})
    with EngineSession(write_engine(tmp_path)) as session:
        np.testing.assert_allclose(session.logits(IDS), TABLE[IDS], rtol=2**-7 if kind == "BF16" else 0)


def test_calls_in_order(tmp_path: Path, install: Install) -> None:
    """Buffers are made once, for the largest shapes; all is freed in the opposite order of its making."""
    cuda = install()
    with EngineSession(write_engine(tmp_path)) as session:
        opened = list(cuda.calls)
        cuda.calls.clear()
        session.logits(IDS)
        ran = list(cuda.calls)
        addresses = list(cuda.memory)
        cuda.calls.clear()
    largest, stream = PROFILE[2], 1000
    tokens = largest[0] * largest[1]
    assert opened == [
        ("cudaGetDeviceProperties", 0),
        ("cudaSetDevice", 0),
        ("cudaStreamCreate",),
        ("deserialize", 4),
        ("create context", {"dynamic_shapes_kernel_specialization_strategy": "eager"}),
        ("set shape", "input_ids", largest),
        ("set shape", "attention_mask", largest),
        ("cudaMalloc", 8 * tokens),
        ("cudaMalloc", 4 * tokens),
        ("cudaMalloc", 2 * tokens * VOCAB),
    ]
    assert ran == [
        ("set shape", "input_ids", (2, 3)),
        ("cudaMemcpyAsync", "cudaMemcpyHostToDevice", 48, stream),
        ("set shape", "attention_mask", (2, 3)),
        ("cudaMemcpyAsync", "cudaMemcpyHostToDevice", 24, stream),
        ("execute", stream),
        ("cudaMemcpyAsync", "cudaMemcpyDeviceToHost", 2 * 6 * VOCAB, stream),
        ("cudaStreamSynchronize", stream),
    ]
    assert cuda.calls == [
        ("cudaStreamSynchronize", stream),
        *(("cudaFree", address) for address in reversed(addresses)),
        ("end of _Context",),
        ("end of _Engine",),
        ("end of _Runtime",),
        ("cudaStreamDestroy", stream),
    ]


def test_tensorrt_has_no_runtime_configuration(tmp_path: Path, install: Install) -> None:
    cuda = install(version="11.4.0")
    with EngineSession(write_engine(tmp_path, runtime="tensorrt", version="11.4.0", capabilities=())) as session:
        np.testing.assert_array_equal(session.logits(IDS), TABLE[IDS])
    assert cuda.called("create context") == [(None,)]


def test_another_device(tmp_path: Path, install: Install) -> None:
    cuda = install(FakeCuda(devices=2))
    with EngineSession(write_engine(tmp_path), device=1) as session:
        assert session.device.index == cuda.device == 1


def test_latencies_are_those_of_runs_alone(tmp_path: Path, install: Install) -> None:
    cuda = install()
    with EngineSession(write_engine(tmp_path)) as session:
        cuda.calls.clear()
        seconds = session.latencies(IDS, runs=4, warmup=2)
        assert len(seconds) == 4
        assert min(seconds) > 0
        runs = ["execute", "cudaStreamSynchronize"] * 6
        assert cuda.names == ["set shape", "cudaMemcpyAsync"] * 2 + ["cudaStreamSynchronize", *runs]


@pytest.mark.parametrize("ids", [IDS[:, :1], np.zeros((1, 7), np.int64), np.zeros((3, 3), np.int64)])
def test_shapes_outside_of_the_profile(tmp_path: Path, install: Install, ids: NDArray[np.int64]) -> None:
    engine = write_engine(tmp_path)
    cuda = install()
    message = (
        f"{engine}: the input 'input_ids' of shape {list(ids.shape)} is outside of the engine's profile. "
        "Expected [1, 2] to [2, 6]. Build it for these sizes with --batch and --sequence."
    )
    with EngineSession(engine) as session:
        with pytest.raises(BismoothError, match=re.escape(message)):
            session.logits(ids)
        with pytest.raises(BismoothError, match="is outside of the engine's profile"):
            session.latencies(ids)
        assert not cuda.called("execute")
        np.testing.assert_array_equal(session.logits(IDS), TABLE[IDS])


@pytest.mark.parametrize("ids", [IDS[0], IDS.astype(np.float32)])
def test_what_is_no_batch_of_token_ids(tmp_path: Path, install: Install, ids: NDArray[Any]) -> None:
    install()
    with EngineSession(write_engine(tmp_path)) as session:
        message = f"expected token ids [batch, sequence] of integers, got {ids.dtype} {list(ids.shape)}."
        with pytest.raises(BismoothError, match=re.escape(message)):
            session.logits(ids)


def test_a_closed_session(tmp_path: Path, install: Install) -> None:
    cuda = install()
    with EngineSession(write_engine(tmp_path)) as session:
        session.close()
        assert_freed(cuda)
        with pytest.raises(BismoothError, match=r"the session was closed\. Run it inside its 'with' block"):
            session.logits(IDS)


def test_engines_that_are_not_what_was_recorded(tmp_path: Path, install: Install) -> None:
    cuda = install()
    engine = write_engine(tmp_path)
    engine.write_bytes(b"plaN")
    fails("the engine is not the one that was recorded. Expected 4 bytes with SHA-256 ", engine)
    engine.unlink()
    fails("the engine cannot be read: No such file or directory. Build the engine again.", engine)
    (tmp_path / "model.audit.json").write_text("{}")
    with pytest.raises(BismoothError, match=r"model\.audit\.json: not a record of an engine: 'engine'\. Build the"):
        EngineSession(engine)
    (tmp_path / "model.audit.json").unlink()
    fails("there is no model.audit.json beside it. Expected an engine of 'bismooth build'.", engine)
    assert not cuda.called("deserialize")


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    shapes = {"input_ids": PROFILE}
    record = read_record(write_engine(tmp_path, shapes=shapes, source={"recipe": "w8a8"}))
    assert record.shapes == shapes
    assert json.loads((tmp_path / "model.audit.json").read_text())["engine"] == record.to_json()


def test_engines_of_another_version_capability_or_runtime(tmp_path: Path, install: Install) -> None:
    cuda = install(FakeCuda(capability=75))
    fails(
        "it was built with TensorRT-RTX 1.6.0, and runs with no other version. Installed is 1.7.1.",
        write_engine(tmp_path, version="1.6.0"),
    )
    fails(
        "it was built for compute capability 86, 89. This GPU, NVIDIA Test, has 75. "
        "Build the engine with --capability 75.",
        write_engine(tmp_path),
    )
    fails(
        "expected an engine of tensorrt-rtx or tensorrt, got one of onnxruntime. Build one with",
        write_engine(tmp_path, runtime="onnxruntime"),
    )
    assert not cuda.called("deserialize")
    assert not cuda.called("cudaStreamCreate")


@pytest.mark.parametrize(
    ("step", "task"),
    [
        ("deserialize", "load the engine"),
        ("context", "prepare to run the engine"),
        ("shape", "take the input 'input_ids' with shape [2, 6]"),
        ("bind", "take an address for 'input_ids'"),
    ],
)
def test_all_is_freed_when_tensorrt_cannot_open_the_engine(
    tmp_path: Path, install: Install, step: str, task: str
) -> None:
    cuda = install(failing=step)
    fails(f"TensorRT-RTX 1.7.1 cannot {task}: {step} is broken. Build the engine again", write_engine(tmp_path))
    assert_freed(cuda)
    assert ("end of _Engine",) in cuda.calls or step == "deserialize"
    assert cuda.calls[-2:] == [("end of _Runtime",), ("cudaStreamDestroy", 1000)]


@pytest.mark.parametrize("function", ["cudaSetDevice", "cudaStreamCreate", "cudaMalloc"])
def test_all_is_freed_when_cuda_fails_on_opening(tmp_path: Path, install: Install, function: str) -> None:
    cuda = install(FakeCuda(failing={function: Status.cudaErrorMemoryAllocation}))
    with pytest.raises(BismoothError, match=f"CUDA: {function} failed: cudaErrorMemoryAllocation"):
        EngineSession(write_engine(tmp_path))
    assert_freed(cuda)


def test_a_run_that_tensorrt_refuses(tmp_path: Path, install: Install) -> None:
    cuda = install(failing="execute")
    with (
        pytest.raises(BismoothError, match=r"TensorRT-RTX 1\.7\.1 cannot run the engine: execute is broken\."),
        EngineSession(write_engine(tmp_path)) as session,
    ):
        session.logits(IDS)
    assert_freed(cuda)


def test_a_failed_kernel_is_reported_and_not_what_follows_from_it(tmp_path: Path, install: Install) -> None:
    """After an illegal access every call fails, also those that free."""
    cuda = install()
    broken = ("cudaStreamSynchronize", "cudaFree", "cudaStreamDestroy")
    with (
        pytest.raises(BismoothError, match="cudaStreamSynchronize failed: cudaErrorIllegalAddress") as caught,
        EngineSession(write_engine(tmp_path)) as session,
    ):
        cuda.failing.update(dict.fromkeys(broken, Status.cudaErrorIllegalAddress))
        session.logits(IDS)
    assert "cudaFree" not in str(caught.value)
    assert_freed(cuda)


def test_an_error_on_closing_is_reported_and_the_rest_freed(tmp_path: Path, install: Install) -> None:
    cuda = install()
    with pytest.raises(BismoothError, match="cudaFree failed"), EngineSession(write_engine(tmp_path)):
        cuda.failing["cudaFree"] = Status.cudaErrorIllegalAddress
    assert_freed(cuda)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": {"input_ids": "INT64", "logits": "FP8"}}, "'logits' has type FP8. Expected one of BOOL, INT32"),
        ({"kinds": {"input_ids": "INT64", "ids": "INT64"}}, "the first output is no logits. Expected float numbers"),
        ({"static": False}, "the shape of 'logits' is [2, 6, -1], which depends on values"),
    ],
)
def test_engines_that_are_no_language_model(
    tmp_path: Path, install: Install, options: dict[str, Any], message: str
) -> None:
    cuda = install(**options)
    fails(message, write_engine(tmp_path))
    assert_freed(cuda)


def test_an_input_that_token_ids_do_not_determine(tmp_path: Path, install: Install) -> None:
    install(kinds={"input_ids": "INT64", "past_key_0": "HALF", "logits": "HALF"})
    with (
        EngineSession(write_engine(tmp_path)) as session,
        pytest.raises(BismoothError, match="cannot be run on text, since it has the input 'past_key_0'"),
    ):
        session.logits(IDS)


def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_cuda() -> CudaRuntime:
        raise BismoothError("CUDA: there is no NVIDIA driver on this machine.")

    monkeypatch.setattr(tensorrt_open, "load_module", {TENSORRT_RTX: FakeTensorRT(FakeCuda())}.__getitem__)
    monkeypatch.setattr(tensorrt_open, "load_cuda", no_cuda)
    with pytest.raises(BismoothError, match="there is no NVIDIA driver on this machine"):
        EngineSession(write_engine(tmp_path))


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu12")
@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="needs a machine without an NVIDIA driver")
def test_the_real_runtime_says_why_it_cannot_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real engine and the real package, with CUDA alone pretended: TensorRT-RTX finds no driver."""
    fake = FakeCuda()
    monkeypatch.setattr(tensorrt_open, "load_cuda", lambda: CudaRuntime(fake))
    profile = Profile(sequence=Span(1, 16, 32))
    request = BuildRequest(save(float_linear(), tmp_path), tmp_path / "model.engine", (89,), profile)
    engine = TensorRTBuilder().build(request).engine
    assert load_module(TENSORRT_RTX).__version__ == read_record(engine).version
    with pytest.raises(BismoothError, match=r"TensorRT-RTX .* cannot load the engine: .*CUDA driver version is insuff"):
        EngineSession(engine)
    assert_freed(fake)
