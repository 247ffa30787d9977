"""The facade over CUDA: what it calls, what it makes of errors, and what it says where there is no GPU."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bismooth.engines.cuda import CudaRuntime, Device, cuda_available, load_cuda
from bismooth.export.errors import BismoothError
from tests.fake_cuda import FakeCuda, Status


def install(monkeypatch: pytest.MonkeyPatch, fake: object) -> None:
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)


def test_a_device_has_name_and_capability() -> None:
    cuda = CudaRuntime(FakeCuda(capability=121, devices=2))
    assert cuda.device(1) == Device(1, "NVIDIA Test", 121)


def test_copies_arrive_when_the_stream_is_synchronized() -> None:
    fake = FakeCuda()
    cuda = CudaRuntime(fake)
    cuda.use(0)
    stream, address = cuda.create_stream(), cuda.malloc(24)
    sent, received = np.arange(3), np.zeros(3, np.int64)
    cuda.upload(address, sent, stream)
    cuda.download(received, address, stream)
    assert not received.any()
    cuda.synchronize(stream)
    np.testing.assert_array_equal(received, sent)
    cuda.free(address)
    cuda.destroy_stream(stream)
    assert fake.calls == [
        ("cudaSetDevice", 0),
        ("cudaStreamCreate",),
        ("cudaMalloc", 24),
        ("cudaMemcpyAsync", "cudaMemcpyHostToDevice", 24, stream),
        ("cudaMemcpyAsync", "cudaMemcpyDeviceToHost", 24, stream),
        ("cudaStreamSynchronize", stream),
        ("cudaFree", address),
        ("cudaStreamDestroy", stream),
    ]


def test_an_array_with_gaps_is_not_copied() -> None:
    with pytest.raises(ValueError, match="expected a contiguous array"):
        CudaRuntime(FakeCuda()).upload(0, np.arange(6)[::2], 0)


CALLS: list[tuple[str, Callable[[CudaRuntime], object]]] = [
    ("cudaGetDeviceProperties", CudaRuntime.device),
    ("cudaSetDevice", lambda cuda: cuda.use(0)),
    ("cudaMalloc", lambda cuda: cuda.malloc(8)),
    ("cudaFree", lambda cuda: cuda.free(cuda.malloc(8))),
    ("cudaStreamCreate", CudaRuntime.create_stream),
    ("cudaStreamDestroy", lambda cuda: cuda.destroy_stream(cuda.create_stream())),
    ("cudaStreamSynchronize", lambda cuda: cuda.synchronize(cuda.create_stream())),
    ("cudaMemcpyAsync", lambda cuda: cuda.upload(cuda.malloc(8), np.arange(1), cuda.create_stream())),
    ("cudaMemcpyAsync", lambda cuda: cuda.download(np.arange(1), cuda.malloc(8), cuda.create_stream())),
]


@pytest.mark.parametrize(("function", "call"), CALLS)
def test_every_status_is_checked(function: str, call: Callable[[CudaRuntime], object]) -> None:
    cuda = CudaRuntime(FakeCuda(failing={function: Status.cudaErrorIllegalAddress}))
    message = f"CUDA: {function} failed: cudaErrorIllegalAddress (text of 700). Expected cudaSuccess. Check the GPU"
    with pytest.raises(BismoothError, match=re.escape(message)):
        call(cuda)


def test_full_memory_has_its_own_advice() -> None:
    cuda = CudaRuntime(FakeCuda(failing={"cudaMalloc": Status.cudaErrorMemoryAllocation}))
    with pytest.raises(BismoothError, match=r"cudaErrorMemoryAllocation .* build for a smaller batch"):
        cuda.malloc(8)


def test_functions_that_raise_because_the_driver_is_missing() -> None:
    class Twelve(FakeCuda):
        def cudaMalloc(self, size: int) -> tuple[object, ...]:
            raise RuntimeError("Failed to dlopen libcuda.so.1")

    with pytest.raises(BismoothError, match=r"cudaMalloc failed: Failed to dlopen libcuda\.so\.1\. Expected a working"):
        CudaRuntime(Twelve()).malloc(8)


def test_a_gpu_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeCuda())
    assert cuda_available() is None
    assert load_cuda().device().capability == 89


OLD = {"cudaGetDeviceCount": Status.cudaErrorInsufficientDriver}


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (FakeCuda(failing=OLD, driver=0), "there is no NVIDIA driver on this machine"),
        (
            FakeCuda(failing=OLD, driver=12080),
            "the NVIDIA driver is for CUDA 12.8, but the installed cuda-python is for 13.4; update the driver, "
            "or run: pip install 'cuda-python<13'",
        ),
        (FakeCuda(failing={"cudaGetDeviceCount": Status.cudaErrorNoDevice}), "there is no NVIDIA GPU on this machine"),
        (FakeCuda(devices=0), "there is no NVIDIA GPU on this machine, or CUDA_VISIBLE_DEVICES hides it"),
        (
            FakeCuda(failing={"cudaGetDeviceCount": Status.cudaErrorUnknown}),
            "CUDA cannot start: cudaErrorUnknown (text of 999)",
        ),
    ],
)
def test_the_reason_why_no_gpu_can_be_used(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda, reason: str) -> None:
    install(monkeypatch, fake)
    assert (cuda_available() or "").startswith(reason)
    with pytest.raises(BismoothError, match=re.escape(f"CUDA: {reason}") + ".*Expected a host with an NVIDIA GPU"):
        load_cuda()


def test_version_12_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twelve(FakeCuda):
        def cudaGetDeviceCount(self) -> tuple[object, ...]:
            raise RuntimeError("Failed to dlopen libcuda.so.1")

    install(monkeypatch, Twelve())
    assert cuda_available() == "there is no NVIDIA driver on this machine"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)  # importing it raises ModuleNotFoundError
    reason = cuda_available() or ""
    assert "cuda-python is not installed. Install it with: pip install cuda-python" in reason
    assert "bismooth[tensorrt]" in reason
    with pytest.raises(BismoothError, match=r"cuda-python is not installed\."):
        load_cuda()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libcudart is missing')", "cuda-python cannot be loaded: libcudart is missing"),
        ("import no_such_part", "cuda-python cannot be loaded: No module named 'no_such_part'"),
    ],
)
def test_a_broken_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, reason: str) -> None:
    bindings = tmp_path / "cuda" / "bindings"
    bindings.mkdir(parents=True)
    for folder in (bindings, bindings.parent):
        (folder / "__init__.py").touch()
    (bindings / "runtime.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    assert cuda_available() == reason
    for name in ("cuda", "cuda.bindings"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(find_spec("cuda") is None, reason="needs cuda-python")
@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="needs a machine without an NVIDIA driver")
def test_the_real_package_without_a_driver() -> None:
    assert cuda_available() == "there is no NVIDIA driver on this machine"
    cuda = CudaRuntime(import_module("cuda.bindings.runtime"))
    with pytest.raises(BismoothError, match=r"cudaMalloc failed: (cudaErrorInsufficientDriver \(CUDA|Fun.*cuInit)"):
        cuda.malloc(8)
    with pytest.raises(BismoothError, match="CUDA: cudaMemcpyAsync failed: "):
        cuda.upload(1 << 40, np.arange(4), 77)
    with pytest.raises(BismoothError, match="CUDA: cudaStreamSynchronize failed: "):
        cuda.synchronize(77)


@pytest.mark.gpu
def test_a_real_gpu_takes_and_gives_back_what_it_is_sent() -> None:
    cuda = load_cuda()
    device = cuda.device()
    assert device.name
    assert device.capability >= 50
    sent, received = np.arange(1 << 16), np.zeros(1 << 16, np.int64)
    stream, address = cuda.create_stream(), cuda.malloc(sent.nbytes)
    cuda.upload(address, sent, stream)
    cuda.download(received, address, stream)
    cuda.synchronize(stream)
    cuda.free(address)
    cuda.destroy_stream(stream)
    np.testing.assert_array_equal(received, sent)
    with pytest.raises(BismoothError, match="cudaErrorMemoryAllocation"):
        cuda.malloc(1 << 60)
