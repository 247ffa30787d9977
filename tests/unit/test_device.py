"""The INT8 engine against the float engine on a GPU, with stand-ins for CUDA and TensorRT's run time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.engines import tensorrt_open
from bismooth.engines.base import (
    BuildRequest,
    BuildResult,
    Caches,
    EngineBuilder,
    PhaseCallback,
    Profile,
    Span,
    audit_path,
)
from bismooth.engines.cuda import CudaRuntime
from bismooth.engines.kernel_cache import kernels_path
from bismooth.engines.null import NullBuilder
from bismooth.engines.publish import read_record
from bismooth.engines.tensorrt_runtime import TENSORRT, TENSORRT_RTX, Runtime, load_module
from bismooth.export.artifact import Artifact, FileRecord, Manifest, scan_files, write_manifest
from bismooth.export.errors import BismoothError
from bismooth.export.hashing import file_sha256
from bismooth.passes.gates import Gates, Hop
from bismooth.tools import device
from bismooth.tools.comparison import Figures, Ids, Values
from bismooth.tools.device import Target, compare_engines, find_target
from bismooth.tools.hops import HopResult
from bismooth.tools.meant import engine_source
from bismooth.tools.verify import verify_artifact
from tests.fake_cuda import FakeCuda
from tests.fake_engine import TABLE, VOCAB, FakeTensorRT
from tests.quantized import make

IDS = np.random.default_rng(1).integers(0, VOCAB, (3, 6))
GRAPHS = {"float16": "model.float16.onnx", "reference_float16": "reference.float16.onnx"}
STAGE: dict[str, Any] = {
    "stage": "quantize",
    "recipe": {"name": "w8a8"},
    "fingerprint": "recipe",
    "quantized": [{"name": "head", "node": "head/MatMul", "int8": True}],
}
VERSION = "1"  # NullBuilder's


def quiet(step: str, done: int, total: int) -> None: ...


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    for name in GRAPHS.values():
        model = make(
            f"(int64[batch, sequence] input_ids) => (float16[batch, sequence, {VOCAB}] logits) "
            "{ x = Gather(rows, input_ids) logits = MatMul(x, w) }",
            rows=TABLE,
            w=np.eye(VOCAB, dtype=np.float16),
        )
        model.graph.node[1].name = "head/MatMul"
        model.producer_name = name
        (tmp_path / name).write_bytes(model.SerializeToString())
    files = {"weights": FileRecord(1, sha256="of the weights")}
    return Artifact(tmp_path, Manifest("quantized", {"fingerprint": "model"}, GRAPHS, files, stages=(STAGE,)))


@dataclass
class Recorder:
    """A builder that records its requests, and writes engines that :class:`FakeTensorRT` runs."""

    name: str = "tensorrt-rtx"
    requests: list[BuildRequest] = field(default_factory=list[BuildRequest])

    def build(self, request: BuildRequest, on_phase: PhaseCallback | None = None) -> BuildResult:
        self.requests.append(request)
        return NullBuilder(self.name).build(request, on_phase)


@dataclass
class Host:
    """A machine that has a GPU and runtimes, by stand-ins."""

    cuda: FakeCuda
    modules: dict[str, FakeTensorRT]

    def load(self, runtime: Runtime) -> FakeTensorRT:
        if runtime.name not in self.modules:
            raise BismoothError(f"{runtime.name}: is not installed.")
        return self.modules[runtime.name]


SetHost = Callable[..., Host]


@pytest.fixture
def set_host(monkeypatch: pytest.MonkeyPatch) -> SetHost:
    def put(capability: int = 89, runtimes: tuple[str, ...] = ("tensorrt-rtx",), **options: Any) -> Host:
        cuda = FakeCuda(capability)
        arguments: dict[str, Any] = {"version": VERSION, "kinds": {"input_ids": "INT64", "logits": "HALF"}} | options
        host = Host(cuda, {name: FakeTensorRT(cuda, **arguments) for name in runtimes})
        for module in (device, tensorrt_open):
            monkeypatch.setattr(module, "load_cuda", lambda: CudaRuntime(cuda))
            monkeypatch.setattr(module, "load_module", host.load)
        monkeypatch.setattr(device, "cuda_available", lambda: None)
        return host

    return put


def found(artifact: Artifact) -> Target:
    target = find_target(artifact)
    assert isinstance(target, Target)
    return target


def run(artifact: Artifact, builder: EngineBuilder | None = None) -> tuple[Figures, list[tuple[Ids, Values, Values]]]:
    seen: list[tuple[Ids, Values, Values]] = []

    def update(ids: Ids, reference: Values, candidate: Values) -> None:
        seen.append((ids, reference, candidate))

    return compare_engines(found(artifact), artifact, IDS, update, quiet, builder), seen


def test_both_engines_are_built_run_and_timed(artifact: Artifact, set_host: SetHost) -> None:
    host, builder = set_host(), Recorder()
    figures, seen = run(artifact, builder)
    assert len(seen) == 3
    for number, (ids, reference, candidate) in enumerate(seen):
        np.testing.assert_array_equal(ids, IDS[number])
        np.testing.assert_array_equal(reference, TABLE[ids])
        np.testing.assert_array_equal(candidate, reference)
    assert figures["device"] == "NVIDIA Test"
    assert figures["capability"] == 89
    assert figures["runtime"] == "TensorRT-RTX 1"
    assert figures["float_latency_ms"] > 0
    assert figures["latency_ms"] > 0
    assert figures["speedup"] == figures["float_latency_ms"] / figures["latency_ms"]
    folder = "engines/device-tensorrt-rtx-sm89"
    assert figures["engine_files"] == [f"{folder}/{role}/model.engine" for role in ("reference_float16", "float16")]
    assert (host.cuda.memory, host.cuda.streams) == ({}, {})


def test_what_is_built(artifact: Artifact, set_host: SetHost) -> None:
    set_host()
    builder = Recorder()
    run(artifact, builder)
    plain, int8 = builder.requests
    assert [request.onnx.name for request in builder.requests] == ["reference.float16.onnx", "model.float16.onnx"]
    for request in builder.requests:
        assert request.capabilities == (89,)
        assert request.profile == Profile(Span(1, 1, 1), Span(1, 6, 6), capacity=6)
        assert request.allow_float
    assert (plain.meant_int8, int8.meant_int8) == (frozenset(), frozenset({"head/MatMul"}))


def test_weight_only_recipes_compute_nothing_in_int8(artifact: Artifact, set_host: SetHost) -> None:
    set_host()
    stage = STAGE | {"quantized": [{"name": "head", "node": "head/MatMul", "int8": False}]}
    builder = Recorder()
    run(replace(artifact, manifest=replace(artifact.manifest, stages=(stage,))), builder)
    assert [request.meant_int8 for request in builder.requests] == [frozenset()] * 2


def test_one_engine_is_on_the_gpu_at_a_time(artifact: Artifact, set_host: SetHost) -> None:
    host = set_host()
    run(artifact, Recorder())
    steps = [name for name in host.cuda.names if name in ("deserialize", "end of _Engine")]
    assert steps == ["deserialize", "end of _Engine"] * 2


def test_engines_are_found_the_next_time(artifact: Artifact, set_host: SetHost) -> None:
    set_host()
    first, second = Recorder(), Recorder()
    assert run(artifact, first)[0]["engine_files"] == run(artifact, second)[0]["engine_files"]
    assert (len(first.requests), len(second.requests)) == (2, 0)


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        ({"version": "2"}, 1),
        ({"capabilities": [86]}, 1),
        ({"shapes": {"input_ids": [[1, 1], [1, 2], [1, 5]]}}, 1),
        ({"shapes": {"input_ids": [[1, 1], [1, 2], [2, 9]]}}, 0),
        ({"source": {}}, 1),
        ({"sha256": "another"}, 1),
        ({"format": "unknown field"}, 1),
    ],
)
def test_engines_that_do_not_fit_are_built_again(
    artifact: Artifact, set_host: SetHost, change: dict[str, Any], rebuilt: int
) -> None:
    set_host()
    run(artifact, Recorder())
    path = artifact.path / "engines/device-tensorrt-rtx-sm89/float16/model.audit.json"
    content = json.loads(path.read_text())
    content["engine"] |= change
    path.write_text(json.dumps(content))
    builder = Recorder()
    run(artifact, builder)
    assert len(builder.requests) == rebuilt


def test_a_graph_that_changed_is_built_again(artifact: Artifact, set_host: SetHost) -> None:
    set_host()
    run(artifact, Recorder())
    with artifact.graph("float16").open("ab") as file:
        file.write(b"\x4a\x00")  # an empty doc string of another length
    builder = Recorder()
    run(artifact, builder)
    assert [request.onnx.name for request in builder.requests] == ["model.float16.onnx"]


def shipped(artifact: Artifact, **changes: Any) -> Path:
    """An engine as ``bismooth build`` makes it."""
    engine = artifact.path / "engines/tensorrt-rtx-sm86-sm89/model.engine"
    source = engine_source(artifact)
    assert source.keys() == {"fingerprint", "recipe", "recipe_fingerprint", "content_sha256"}
    plain = BuildRequest(artifact.graph("float16"), engine, (86, 89), source=source)
    changes["source"] = source | changes.get("source", {})
    NullBuilder("tensorrt-rtx").build(replace(plain, **changes))
    sign(engine.parent)
    return engine


def sign(folder: Path) -> None:
    """Put the files of an engine's folder on record."""
    stage = {"stage": "build", "engine": "tensorrt-rtx"}
    write_manifest(folder, Manifest("engine", {}, {}, files=scan_files(folder), stages=(stage,)))


def test_the_engine_that_ships_is_the_one_that_is_judged(artifact: Artifact, set_host: SetHost) -> None:
    set_host()
    shipped(artifact)
    builder = Recorder()
    figures, _ = run(artifact, builder)
    assert figures["engine_files"][1] == "engines/tensorrt-rtx-sm86-sm89/model.engine"
    assert [request.onnx.name for request in builder.requests] == ["reference.float16.onnx"]


@pytest.mark.parametrize(
    "changes",
    [
        {"capabilities": (75,)},
        {"capabilities": ()},
        {"source": {"recipe_fingerprint": "another"}},
        {"source": {"content_sha256": "another"}},
        {"profile": Profile(sequence=Span(1, 2, 4))},
    ],
)
def test_engines_that_ship_for_something_else_are_left_alone(
    artifact: Artifact, set_host: SetHost, changes: dict[str, Any]
) -> None:
    set_host()
    sha256 = file_sha256(engine := shipped(artifact, **changes))
    figures, _ = run(artifact, Recorder())
    assert figures["engine_files"][1] == "engines/device-tensorrt-rtx-sm89/float16/model.engine"
    assert file_sha256(engine) == sha256


def test_an_engine_with_caches_that_ships(artifact: Artifact, set_host: SetHost) -> None:
    """What its caches and its mask hold says nothing of the length of windows; compiled kernels may lie beside it."""
    set_host()
    engine = shipped(artifact)
    record = read_record(engine)
    shapes = {"input_ids": record.shapes["input_ids"], "attention_mask": ((1, 64), (1, 64), (4, 64))}
    caches = Caches(64, {}, {})
    for wanted, changed in (("tensorrt-rtx-sm86-sm89", caches), ("device-tensorrt-rtx-sm89/float16", None)):
        content = json.loads(audit_path(engine).read_text())
        content["engine"] = replace(record, shapes=shapes, caches=changed).to_json()
        audit_path(engine).write_text(json.dumps(content))
        sign(engine.parent)
        kernels_path(engine, 89).write_bytes(b"kernels")
        figures, _ = run(artifact, Recorder())
        assert figures["engine_files"][1] == f"engines/{wanted}/model.engine"


@pytest.mark.parametrize("damage", ["changed", "incomplete", "hidden"])
def test_engines_that_ship_damaged_are_left_alone(artifact: Artifact, set_host: SetHost, damage: str) -> None:
    set_host()
    engine = shipped(artifact)
    if damage == "changed":
        engine.write_bytes(engine.read_bytes().swapcase())
    elif damage == "incomplete":
        (engine.parent / "bismooth.json").unlink()
    else:
        engine.parent.rename(engine.parent.with_name(".tensorrt-rtx-sm86-sm89.tmp-1"))
    figures, _ = run(artifact, Recorder())
    assert figures["engine_files"][1] == "engines/device-tensorrt-rtx-sm89/float16/model.engine"


def test_tensorrt_where_tensorrt_rtx_cannot_build(artifact: Artifact, set_host: SetHost) -> None:
    set_host(90, ("tensorrt-rtx", "tensorrt"))
    assert found(artifact).runtime is TENSORRT
    builder = Recorder("tensorrt")
    figures, _ = run(artifact, builder)
    assert [request.capabilities for request in builder.requests] == [(), ()]
    assert figures["engine_files"][0].startswith("engines/device-tensorrt-sm90/")
    again = Recorder("tensorrt")
    run(artifact, again)
    assert not again.requests


def test_the_reason_why_there_is_no_target(
    artifact: Artifact, set_host: SetHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_host(90)
    assert find_target(artifact) == (
        "no engine can be built for NVIDIA Test (compute capability 90): "
        "tensorrt-rtx: TensorRT-RTX 1 builds for 75, 86, 89. tensorrt: is not installed."
    )
    monkeypatch.setattr(device, "cuda_available", lambda: "there is no NVIDIA driver on this machine")
    assert find_target(artifact) == "there is no NVIDIA driver on this machine"
    narrow = replace(artifact.manifest, graphs={"float32": "model.onnx", "float16": "model.float16.onnx"})
    assert find_target(replace(artifact, manifest=narrow)) == (
        "the artifact has no float graph in 16 bits to compare with"
    )


def verify(artifact: Artifact, **limits: float) -> HopResult:
    (hop,) = verify_artifact(artifact, IDS, Gates().replaced(limits), [Hop.DEVICE], quiet).hops
    return hop


@pytest.fixture
def null_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_builder", NullBuilder)


def noisy(amount: float) -> Callable[[bytes], float]:
    """Wrong logits from the second engine, which is made of the Q/DQ graph."""
    seen: list[bytes] = []

    def noise(plan: bytes) -> float:
        seen.extend([plan] if plan not in seen else [])
        return amount if seen.index(plan) else 0.0

    return noise


@pytest.mark.usefixtures("null_builds")
def test_the_hop_reports_divergence_and_latency(artifact: Artifact, set_host: SetHost) -> None:
    set_host(noise=noisy(0.1))
    hop = verify(artifact)
    assert 1e-4 < hop.metrics["device_kl"] == hop.metrics["kl"] < 0.1
    assert hop.verdict == "measured"
    assert hop.windows == 3
    assert re.fullmatch(r"NVIDIA Test: \S+ ms a window, the float engine \S+ ms", hop.note() or "")
    json.dumps(hop.to_json())
    assert verify(artifact, device_kl=0.1).verdict == "passed"
    (failure,) = verify(artifact, device_kl=1e-5).failures
    assert re.match(r"device: device_kl is 0\.\d+\. Expected at most 1e-05\.", failure)


@pytest.mark.usefixtures("null_builds")
def test_logits_that_are_no_numbers_fail_the_hop(artifact: Artifact, set_host: SetHost) -> None:
    set_host(noise=noisy(float("nan")))
    (failure,) = verify(artifact).failures
    assert failure.startswith("device: metrics: the logits of the candidate hold NaN or infinity.")


@pytest.mark.usefixtures("null_builds")
def test_an_engine_that_cannot_be_run_fails_the_hop(artifact: Artifact, set_host: SetHost) -> None:
    set_host(failing="context")
    hop = verify(artifact)
    assert hop.verdict == "failed"
    assert "cannot prepare to run the engine: context is broken." in hop.failures[0]
    assert hop.failures[0].startswith("device: ")


def test_without_a_gpu_the_hop_says_why(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cuda_available", lambda: "there is no NVIDIA driver on this machine")
    hop = verify(artifact, device_kl=0.1)
    assert (hop.verdict, hop.skipped) == ("skipped", "there is no NVIDIA driver on this machine")


def test_engines_for_the_device_are_none_that_the_audit_judges(artifact: Artifact, set_host: SetHost) -> None:
    set_host()
    run(artifact, Recorder())
    (hop,) = verify_artifact(artifact, IDS, Gates(), [Hop.AUDIT], quiet).hops
    assert hop.skipped == "no engine was built"


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu12")
def test_the_real_builder_makes_the_engines(artifact: Artifact, set_host: SetHost) -> None:
    """For the compute capability of a GPU that is pretended; running the engines is, too."""
    version = load_module(TENSORRT_RTX).__version__
    set_host(version=version)
    float_head = replace(artifact, manifest=replace(artifact.manifest, stages=(STAGE | {"quantized": ()},)))
    figures, _ = run(float_head)
    for name in figures["engine_files"]:
        record = read_record(artifact.path / name)
        assert (record.runtime, record.version, record.capabilities) == ("tensorrt-rtx", version, (89,))
        assert record.shapes == {"input_ids": ((1, 1), (1, 6), (1, 6))}
