"""How the builder drives TensorRT-RTX, TensorRT 10 and TensorRT 11: flags, calls and errors, on a stand-in module."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bismooth.engines.base import Phase
from bismooth.engines.memory import peak_rss
from bismooth.engines.tensorrt_build import PlanReport, PlanRequest, build_plan
from bismooth.engines.tensorrt_runtime import TENSORRT, TENSORRT_RTX, Runtime, check_capabilities, load_module
from bismooth.export.errors import BismoothError
from tests.fake_tensorrt import LISTING, NO_GPU, Capability, Fake, Input, ParserError

RTX = Fake("1.7.1.116")
TEN, ELEVEN = Fake("10.16.1.11"), Fake("11.4.0.106")


def request(folder: Path, **changes: Any) -> PlanRequest:
    spans = {"batch": (1, 1, 4), "sequence": (1, 128, 512)}
    plain = PlanRequest("tensorrt", "model.onnx", str(folder / "plan"), str(folder / "log"), (), (spans,))
    return replace(plain, **changes)


def build(fake: Fake, folder: Path, runtime: Runtime = TENSORRT, **changes: Any) -> tuple[PlanReport, list[Phase]]:
    fake.calls.clear()
    phases: list[Phase] = []
    return build_plan(fake, runtime, request(folder, **changes), phases.append), phases


def fails(match: str, fake: Fake, folder: Path, runtime: Runtime = TENSORRT, **changes: Any) -> None:
    with pytest.raises(BismoothError, match=re.escape(match)):
        build(fake, folder, runtime, **changes)


@pytest.mark.parametrize(("fake", "flags"), [(TEN, 0b10), (ELEVEN, 0)])
def test_tensorrt_is_strongly_typed_and_gets_no_capability(tmp_path: Path, fake: Fake, flags: int) -> None:
    report, _ = build(fake, tmp_path)
    assert fake.called("create_network") == [(flags,)]
    assert ("profiling_verbosity", "detailed") in fake.called("set")
    assert not fake.called("set_compute_capability")
    assert "num_compute_capabilities" not in dict(fake.called("set"))
    assert report.version == fake.version
    assert report.capabilities == ()


def test_rtx_gets_its_capabilities_in_order_and_once(tmp_path: Path) -> None:
    report, _ = build(RTX, tmp_path, TENSORRT_RTX, capabilities=(89, 86, 89))
    assert RTX.called("create_network") == [(0,)]
    assert ("num_compute_capabilities", 2) in RTX.called("set")
    assert RTX.called("set_compute_capability") == [(Capability.SM89, 0), (Capability.SM86, 1)]
    assert report.capabilities == (89, 86)


def test_profile_plan_log_and_phases(tmp_path: Path) -> None:
    report, phases = build(ELEVEN, tmp_path)
    shapes = ((1, 1, 256), (1, 128, 256), (4, 512, 256))
    assert ELEVEN.called("parse_from_file") == [("model.onnx",)]
    assert ELEVEN.called("set_shape") == [("x", *shapes)]
    assert report.shapes == ({"x": shapes},)
    assert (tmp_path / "plan").read_bytes() == b"plan"
    assert (tmp_path / "log").read_text() == f"{LISTING}\n"
    assert phases[0] == Phase("Building engine", 0, 2)
    assert phases[-2:] == [Phase("Compiling", 0, 3), Phase("Building engine", 1, 2)]
    assert not ELEVEN.called("deserialize")


def test_two_profiles_of_another_form_of_the_graph(tmp_path: Path) -> None:
    """The weights of the form that is built lie beside the original."""
    (tmp_path / "graph").write_bytes(b"lowered")
    spans = [{"batch": (1, 1, 4), "sequence": sizes} for sizes in ((1, 128, 512), (1, 1, 1))]
    report, _ = build(ELEVEN, tmp_path, graph=str(tmp_path / "graph"), profiles=tuple(spans))
    prompts, tokens = ((1, 1, 256), (1, 128, 256), (4, 512, 256)), ((1, 1, 256), (1, 1, 256), (4, 1, 256))
    assert ELEVEN.called("parse") == [(b"lowered", "model.onnx")]
    assert not ELEVEN.called("parse_from_file")
    assert ELEVEN.called("set_shape") == [("x", *prompts), ("x", *tokens)]
    assert len(ELEVEN.called("add_optimization_profile")) == 2
    assert report.shapes == ({"x": prompts}, {"x": tokens})


def test_kernels_come_from_the_inspector_where_the_log_has_none(tmp_path: Path) -> None:
    fake = Fake("10.16.1.11", listing="", inspected=LISTING.removeprefix("Layers:\n"))
    build(fake, tmp_path)
    assert fake.called("deserialize") == [(b"plan",)]
    assert fake.called("inspect") == [("oneline",)]
    assert (tmp_path / "log").read_text() == LISTING
    fails("neither logs the engine's kernels nor loads the engine", replace(fake, inspected=None), tmp_path)


def test_no_gpu(tmp_path: Path) -> None:
    fake = Fake("11.4.0.106", gpu=False)
    fails(
        f"TensorRT 11.4.0.106 cannot start: {NO_GPU} "
        "It builds only where the target GPU is. Build on that host, or use tensorrt-rtx, which needs no GPU.",
        fake,
        tmp_path,
    )
    fails("Check its installation.", replace(fake, version="1.7"), tmp_path, TENSORRT_RTX, capabilities=(86,))


def test_old_tensorrt(tmp_path: Path) -> None:
    fails("tensorrt: version 8.6.1 is too old. Expected 10 or later", Fake("8.6.1"), tmp_path)


def test_parser_errors_name_node_operator_and_cause(tmp_path: Path) -> None:
    gpu = "\n[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (no driver)"
    errors = (
        "ModelImporter.cpp:142: --- Begin node ---\nNode name: dql/Op",
        "WeightsContext.cpp:222: weights out of range for file: w.bin",
    )
    node = ParserError(f"Invalid Node - dql{gpu}", "dql/Op", "DynamicQuantizeLinear")
    weights = ParserError("Failed to import initializer: w", kind="ErrorCode.INVALID_GRAPH")
    fake = Fake("1.7.1", parser_errors=(node, weights))
    fails(
        "model.onnx: TensorRT-RTX 1.7.1 cannot read the graph: node 'dql/Op' (DynamicQuantizeLinear): "
        "Invalid Node - dql (UNSUPPORTED_NODE); Failed to import initializer: w (INVALID_GRAPH); "
        "weights out of range for file: w.bin",
        replace(fake, errors=errors),
        tmp_path,
        TENSORRT_RTX,
        capabilities=(86,),
    )


def test_graph_without_outputs(tmp_path: Path) -> None:
    fails("model.onnx: the graph has no outputs", Fake("11.0", outputs=0), tmp_path)


def test_failed_build_gives_each_reason_once(tmp_path: Path) -> None:
    fake = Fake("11.0", plan=None, errors=("builder.cpp:7: no kernel", "builder.cpp:9: no kernel", "no memory"))
    fails("model.onnx: TensorRT 11.0 cannot build an engine: no kernel; no memory", fake, tmp_path)
    assert not (tmp_path / "plan").exists()


def test_dimension_that_the_profile_does_not_cover(tmp_path: Path) -> None:
    fake = Fake("11.0", inputs=(Input("image", "batch", 3, "height"),))
    fails("no sizes for dimension 2 of input 'image', named 'height'. Expected one of: batch, sequence", fake, tmp_path)
    fails("dimension 0 of input 'image', named None", Fake("11.0", inputs=(Input("image", None),)), tmp_path)
    spans = {"batch": (1, 1, 4), "sequence": (1, 1, 1), "height": (32, 64, 128)}
    report, _ = build(fake, tmp_path, profiles=(spans,))
    assert report.shapes == ({"image": ((1, 3, 32), (1, 3, 64), (4, 3, 128))},)


def test_refused_profile(tmp_path: Path) -> None:
    fails("model.onnx: the builder refuses the optimization profile", Fake("11.0", profile_index=-1), tmp_path)


def test_capabilities_that_cannot_be() -> None:
    known = (75, 80, 86)
    with pytest.raises(BismoothError, match=r"unknown compute capability 87. Expected one of: 75, 80, 86"):
        check_capabilities(TENSORRT_RTX, [80, 87], known)
    with pytest.raises(BismoothError, match=r"no compute capability was given.* Expected some of: 75, 80, 86"):
        check_capabilities(TENSORRT_RTX, [], known)
    with pytest.raises(BismoothError, match="75 cannot share an engine with others, got 75 and 80, 86"):
        check_capabilities(TENSORRT_RTX, [80, 75, 86], known)
    with pytest.raises(BismoothError, match=r"tensorrt: expected no compute capabilities, got 80.* tensorrt-rtx"):
        check_capabilities(TENSORRT, [80], known)
    assert check_capabilities(TENSORRT_RTX, [75, 75], known) == (75,)


def test_missing_and_broken_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(TENSORRT, module="no_such_tensorrt")
    with pytest.raises(BismoothError, match=r"not installed. Install it with: pip install 'bismooth\[tensorrt\]'"):
        load_module(absent)
    (tmp_path / "broken_tensorrt.py").write_text("raise ImportError('libnvinfer.so.10 is missing')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(BismoothError, match=r"cannot be loaded: libnvinfer.so.10 is missing"):
        load_module(replace(TENSORRT, module="broken_tensorrt"))


@pytest.mark.skipif(sys.platform == "win32", reason="not told there")
def test_peak_memory_is_in_bytes() -> None:
    assert 2**20 < (peak_rss() or 0) < 2**40
