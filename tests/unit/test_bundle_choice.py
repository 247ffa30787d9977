"""Which engine of a bundle is taken, and what is said of the others."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bismooth.engines.bundle import Bundle
from bismooth.engines.bundle_choice import choose_engine
from bismooth.export.errors import BismoothError
from tests.bundles import FILES, engine, make_bundle
from tests.fake_cuda import FakeCuda, Status

VERSION = "1.7.1"
RTX = {"rtx-75": (75,), "rtx-86": (80, 86, 89)}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Engines of TensorRT-RTX for two groups of GPUs, one of TensorRT for a GPU that is not said, and one for CPUs."""
    return _bundle(tmp_path, {"onnxruntime": engine("onnxruntime")})


def _bundle(folder: Path, others: dict[str, Any]) -> Bundle:
    names = [*RTX, "trt"]
    files = {**FILES, **{f"engines/{name}/model.engine": name.encode() for name in names}}
    engines = {name: _gpu_engine("tensorrt-rtx", name, RTX[name]) for name in RTX}
    engines["trt"] = _gpu_engine("tensorrt", "trt", ())
    return Bundle.load(make_bundle(folder, files, engines=engines | others))


def _gpu_engine(runtime: str, name: str, capabilities: tuple[int, ...]) -> dict[str, Any]:
    files = [f"engines/{name}/model.engine"]
    return engine(runtime, name, version=VERSION, capabilities=list(capabilities), files=files)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A GPU with capability 89, and TensorRT-RTX in the version that built the engines."""
    fake: Any = FakeCuda(capability=89)
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    install(monkeypatch, VERSION)
    return fake


def install(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    trt: Any = None
    if version is not None:
        trt = ModuleType("tensorrt_rtx")
        trt.__version__ = version
        trt.__spec__ = object()  # what find_spec finds
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)


def test_the_engine_for_the_gpu(bundle: Bundle, gpu: FakeCuda) -> None:
    choice = choose_engine(bundle)
    assert (choice.engine.name, choice.reason) == ("rtx-86", "rtx-86 on NVIDIA Test (SM89)")
    gpu.capability = 75
    assert choose_engine(bundle).engine.name == "rtx-75"


def test_a_gpu_that_no_engine_was_built_for(bundle: Bundle, gpu: FakeCuda) -> None:
    gpu.capability = 90
    choice = choose_engine(bundle)
    assert choice.engine.name == "onnxruntime"
    assert choice.reason == (
        "onnxruntime on the CPU (rtx-75: it was built for SM75, and NVIDIA Test is SM90; "
        "rtx-86: it was built for SM80, SM86, SM89, and NVIDIA Test is SM90; "
        "trt: it was built for a GPU that is not on record, and NVIDIA Test is SM90)"
    )


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("1.8.0", r"rtx-86: it runs with TensorRT-RTX 1\.7\.1 alone, and 1\.8\.0 is installed"),
        (None, r"rtx-86: tensorrt-rtx: the Python package 'tensorrt_rtx' is not installed\."),
    ],
)
def test_a_package_that_does_not_run_the_engine(
    tmp_path: Path, gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, version: str | None, message: str
) -> None:
    install(monkeypatch, version)
    choice = choose_engine(_bundle(tmp_path / "a", {"onnxruntime": engine("onnxruntime")}))
    assert choice.engine.name == "onnxruntime"
    assert re.search(message, choice.reason)
    with pytest.raises(BismoothError, match=rf"no engine of this bundle runs here\. .*{message}"):
        choose_engine(_bundle(tmp_path / "b", {}))


def test_no_gpu(bundle: Bundle, gpu: FakeCuda, tmp_path: Path) -> None:
    gpu.failing["cudaGetDeviceCount"] = Status.cudaErrorNoDevice
    assert choose_engine(bundle).reason.startswith(
        "onnxruntime on the CPU (rtx-75: there is no NVIDIA GPU on this machine, or CUDA_VISIBLE_DEVICES hides it; "
    )
    message = (
        r"no engine of this bundle runs here\. rtx-75: there is no NVIDIA GPU .*\. Expected a GPU that one was built "
        r"for\. Package the artifact with an engine for it, or with onnxruntime, which runs on any machine\."
    )
    with pytest.raises(BismoothError, match=message):
        choose_engine(_bundle(tmp_path / "gpu only", {}))


def test_a_bundle_for_cpus_does_not_look_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    choice = choose_engine(Bundle.load(make_bundle(tmp_path)))
    assert choice.reason == "onnxruntime on the CPU"


def test_the_engine_that_was_asked_for(bundle: Bundle, gpu: FakeCuda) -> None:
    choice = choose_engine(bundle, "rtx-75")
    assert (choice.engine.name, choice.reason) == ("rtx-75", "rtx-75, as asked for")
    with pytest.raises(BismoothError, match=r"no engine 'rtx'\. Expected one of: rtx-75, rtx-86, trt, onnxruntime\."):
        choose_engine(bundle, "rtx")
