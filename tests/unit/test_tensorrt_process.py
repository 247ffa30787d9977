"""Builds in a process of their own: what it leaves behind when it succeeds, fails, crashes, or its caller is killed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bismooth.engines.base import BuildRequest, Phase, Profile, Span, audit_path
from bismooth.engines.tensorrt import TENSORRT, TensorRTBuilder
from bismooth.engines.tensorrt_build import PlanRequest
from bismooth.engines.tensorrt_worker import run_worker
from bismooth.export.errors import BismoothError, GateError
from bismooth.export.hashing import file_sha256
from tests.cached_model import cached_model
from tests.fake_tensorrt import LISTING
from tests.quantized import float_linear, save

ROOT = Path(__file__).parents[2]
FAKE = "import sys; from tests.fake_tensorrt import Fake; sys.modules[__name__] = Fake('11.4.0'{})"
NOISE = "import os; os.write(1, b'on stdout'); os.write(2, b'on stderr')\n"
FLOAT = LISTING.replace("Int8", "Half")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs signals and /proc")


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildRequest:
    """A graph with one linear, 'fc'."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "model").mkdir()
    return BuildRequest(
        save(float_linear(), tmp_path / "model"), tmp_path / "out" / "model.engine", source={"sha": "1"}
    )


def build(request: BuildRequest, module: str, **changes: Any) -> None:
    """Build with ``module`` as the source of the Python module ``tensorrt``."""
    (request.engine.parents[1] / "tensorrt.py").write_text(module)
    TensorRTBuilder(TENSORRT).build(replace(request, **changes))


def written(request: BuildRequest) -> list[str]:
    return sorted(path.name for path in request.engine.parent.iterdir())


def test_engine_audit_and_log(request_: BuildRequest, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorrt.py").write_text(NOISE + FAKE.format(""))
    phases: list[Phase] = []
    request = replace(request_, meant_int8=frozenset({"fc/MatMul"}), log=tmp_path / "logs" / "build.log")
    result = TensorRTBuilder(TENSORRT).build(request, phases.append)
    assert request.engine.read_bytes() == b"plan"
    assert (tmp_path / "logs" / "build.log").read_text() == f"{LISTING}\n"
    assert phases[0] == Phase("Building engine", 0, 2)
    assert result.audit.linears[0].int8
    assert result.seconds > 0
    assert (result.peak_rss or 0) > 2**20
    content = json.loads(audit_path(request.engine).read_text())
    assert content["audit"]["int8_share"] == 1
    assert content["engine"] == {
        "runtime": "tensorrt",
        "version": "11.4.0",
        "capabilities": [],
        "shapes": {"x": [[1, 1, 256], [1, 128, 256], [4, 512, 256]]},
        "bytes": 4,
        "sha256": file_sha256(request.engine),
        "source": {"sha": "1"},
    }
    assert written(request) == ["model.audit.json", "model.engine"]
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_failed_gate_keeps_the_engine_there_was(request_: BuildRequest, tmp_path: Path) -> None:
    build(request_, FAKE.format(""))
    before = audit_path(request_.engine).read_bytes()
    module, log = FAKE.format(f", listing={FLOAT!r}, plan=b'other'"), tmp_path / "build.log"
    with pytest.raises(
        GateError, match=r"model\.onnx: 1 of the 1 linears .* got fc/MatMul \(gemm: Half x Half -> Half\)"
    ):
        build(request_, module, meant_int8=frozenset({"fc/MatMul"}), log=log)
    assert log.read_text() == f"{FLOAT}\n"
    assert request_.engine.read_bytes() == b"plan"
    assert audit_path(request_.engine).read_bytes() == before
    assert written(request_) == ["model.audit.json", "model.engine"]
    build(request_, module, meant_int8=frozenset({"fc/MatMul"}), allow_float=True)
    assert request_.engine.read_bytes() == b"other"


@POSIX
@pytest.mark.parametrize(
    ("name", "hint"), [("SIGSEGV", ""), ("SIGKILL", "The system ended it, most likely for lack of")]
)
def test_crash_is_an_error(request_: BuildRequest, name: str, hint: str) -> None:
    module = NOISE + f"import os, signal; os.kill(os.getpid(), signal.{name})"
    words = rf"model\.onnx: tensorrt crashed while building the engine \({name}\)\. {hint}.*words: on stdouton stderr\."
    with pytest.raises(BismoothError, match=words):
        build(request_, module)
    assert written(request_) == []


def test_exit_without_an_answer_is_an_error(request_: BuildRequest) -> None:
    with pytest.raises(BismoothError, match=r"crashed while building the engine \(exit status 7\).*words: none\."):
        build(request_, "import os; os._exit(7)")


def test_bug_shows_its_traceback(request_: BuildRequest) -> None:
    with pytest.raises(RuntimeError, match=r"the builder process failed:\nTraceback (.|\n)*no attribute 'ILogger'"):
        build(request_, "__version__ = '11.0'")


def test_missing_package_and_missing_gpu(request_: BuildRequest) -> None:
    absent = TensorRTBuilder(replace(TENSORRT, module="no_such_tensorrt"))
    with pytest.raises(BismoothError, match=re.escape("pip install 'bismooth[tensorrt]'")):
        absent.build(request_)
    with pytest.raises(BismoothError, match=r"TensorRT 11\.4\.0 cannot start: CUDA initialization failure"):
        build(request_, FAKE.format(", gpu=False"))


def test_request_is_checked_before_the_build(request_: BuildRequest) -> None:
    with pytest.raises(BismoothError, match="'fd' is to run in INT8, but the graph has no such linear"):
        build(request_, "raise SystemExit", meant_int8=frozenset({"fd"}))
    assert not request_.engine.parent.exists()


def test_folder_that_cannot_be_written(request_: BuildRequest, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BismoothError, match=r"m\.engine: cannot be written \(.*\)\. Choose a place that can be"):
        build(request_, FAKE.format(""), engine=tmp_path / "file" / "m.engine")
    with pytest.raises(BismoothError, match=r"build\.log: the builder's log cannot be written"):
        build(request_, FAKE.format(""), log=tmp_path / "file" / "build.log")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(request_: BuildRequest, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text(FAKE.format(""))
    (tmp_path / "plan").symlink_to("/dev/full")
    spans = {"batch": (1, 1, 1), "sequence": (1, 1, 1)}
    plain = PlanRequest("tensorrt", "m.onnx", str(tmp_path / "plan"), str(tmp_path / "log"), (), (spans,))
    with pytest.raises(BismoothError, match=r"m\.onnx: the engine cannot be written: .*No space left on device"):
        run_worker(plain)


@POSIX
@pytest.mark.parametrize("files", [set[str](), {"graph.onnx"}])
def test_killed_caller_leaves_nothing(request_: BuildRequest, tmp_path: Path, files: set[str]) -> None:
    """Neither of a graph as it is, nor of one with caches, which is rewritten."""
    if files:
        request_.onnx.write_bytes(cached_model().SerializeToString())
    (tmp_path / "tensorrt.py").write_text(
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    script = f"""
from pathlib import Path
from bismooth.engines.base import BuildRequest, Profile
from bismooth.engines.tensorrt import TENSORRT, TensorRTBuilder
onnx, engine = Path({str(request_.onnx)!r}), Path({str(request_.engine)!r})
TensorRTBuilder(TENSORRT).build(BuildRequest(onnx, engine, profile=Profile(capacity=512)))
"""
    with subprocess.Popen([sys.executable, "-c", script]) as caller:
        _wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        (temporary,) = written(request_)
        assert temporary.startswith(".model.engine.tmp-")
        assert files <= {file.name for file in (request_.engine.parent / temporary).iterdir()}
        caller.kill()
    builder = int((tmp_path / "pid").read_text())
    _wait(lambda: _ended(builder))
    assert written(request_) == []


def test_interrupt_ends_the_builder(request_: BuildRequest, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text(FAKE.format(""))

    def interrupt(phase: Phase) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TensorRTBuilder(TENSORRT).build(request_, interrupt)
    assert written(request_) == []


def test_spans_and_profiles_that_cannot_be() -> None:
    with pytest.raises(BismoothError, match="expected 1 <= minimum <= optimum <= maximum, got 1, 9, 4"):
        Span(1, 9, 4)
    with pytest.raises(BismoothError, match="got 0, 1, 1"):
        Span(0, 1, 1)
    profile = Profile(others={"height": Span(8, 16, 32)})
    assert profile.shapes("x", ("height", 3)) == ((8, 3), (16, 3), (32, 3))


def _ended(process: int) -> bool:
    """Whether the process is gone, or dead and not yet collected by its new parent."""
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or ") Z " in status.read_text()


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
