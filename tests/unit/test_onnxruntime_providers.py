"""Packages and providers of ONNX Runtime, and how each can be missing."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bismooth.engines import onnxruntime as engine
from bismooth.engines.onnxruntime import Session
from bismooth.export.errors import BismoothError
from tests.language_model import language_model


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def distribution(name: str) -> object:
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(metadata, "distribution", distribution)


def test_two_onnxruntimes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(BismoothError, match=r"both installed .* Run 'pip uninstall onnxruntime onnxruntime-gpu'"):
        Session(language_model(tmp_path))


def test_no_onnxruntime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_installed(monkeypatch)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BismoothError, match=r"onnxruntime: cannot be imported .*bismooth\[runtime\]"):
        Session(language_model(tmp_path))


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        ("cuda", r"no CUDAExecutionProvider\. It has: CPUExecutionProvider\. Install bismooth\[gpu\] instead of"),
        ("tensorrt-rtx", r"no NvTensorRTRTXExecutionProvider\. .* Install onnxruntime-trt-rtx instead of"),
    ],
)
def test_provider_that_the_build_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: engine.Provider, message: str
) -> None:
    monkeypatch.setattr(engine.import_onnxruntime(), "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BismoothError, match=message):
        Session(language_model(tmp_path), provider=provider)


def ignore(key: str, value: str) -> None:
    """Take a session setting."""


class FakeRuntime(SimpleNamespace):
    """An onnxruntime with a CUDA provider whose sessions report what they are told to."""

    def __init__(self, providers: list[str], cpu_ops: list[str]) -> None:
        nodes = [SimpleNamespace(name=f"node/{op}", op_type=op) for op in cpu_ops]
        part = SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)
        session = SimpleNamespace(
            get_providers=lambda: providers,
            get_provider_graph_assignment_info=lambda: [part],
            get_inputs=list[Any],
            get_outputs=list[Any],
        )

        def answer(model: str, options: object, **settings: object) -> object:
            return session

        super().__init__(
            get_available_providers=lambda: ["CUDAExecutionProvider"],
            ExecutionOrder=SimpleNamespace(PRIORITY_BASED=1),
            RunOptions=SimpleNamespace,
            SessionOptions=lambda: SimpleNamespace(add_session_config_entry=ignore),
            InferenceSession=answer,
        )


def test_provider_that_fails_to_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(model: str, options: object, **settings: object) -> object:
        raise RuntimeError("Please install TensorRT libraries.")

    runtime = FakeRuntime(GPU, [])
    runtime.InferenceSession = fail
    monkeypatch.setattr(engine, "import_onnxruntime", lambda: runtime)
    with pytest.raises(BismoothError, match=r"install TensorRT libraries\. Check that the provider's libraries"):
        Session(tmp_path / "model.onnx", provider="cuda")


GPU = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("providers", "cpu_ops", "message"),
    [
        (["CPUExecutionProvider"], [], r"could not be started and ONNX Runtime fell back to CPUExecutionProvider"),
        (GPU, ["Shape", "Attention", "MatMul"], r"puts 2 nodes on the CPU, first node/Attention \(Attention\)"),
    ],
)
def test_no_silent_fallback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, providers: list[str], cpu_ops: list[str], message: str
) -> None:
    monkeypatch.setattr(engine, "import_onnxruntime", lambda: FakeRuntime(providers, cpu_ops))
    with pytest.raises(BismoothError, match=message):
        Session(tmp_path / "model.onnx", provider="cuda")


def test_shape_arithmetic_may_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "import_onnxruntime", lambda: FakeRuntime(GPU, ["Shape", "Gather"]))
    with Session(tmp_path / "model.onnx", provider="cuda") as session:
        assert session.inputs == ()
