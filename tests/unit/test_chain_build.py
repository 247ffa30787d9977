"""Chains: every part built and audited by the ordinary builders, together what the engine in one piece would be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bismooth.engines.audit import Audit, Figures
from bismooth.engines.base import BuildRequest, BuildResult, EngineBuilder, Phase, PhaseCallback, audit_path
from bismooth.engines.build_memory import BuildPlan
from bismooth.engines.chain import CHAIN, Chain
from bismooth.engines.chain_build import build_chain, join_audits
from bismooth.engines.chain_windows import chain_windows, lean_parts
from bismooth.engines.null import NullBuilder
from bismooth.engines.onnxruntime import Session
from bismooth.engines.onnxruntime_build import OnnxRuntimeBuilder
from bismooth.engines.onnxruntime_decoder import OnnxRuntimeDecoder
from bismooth.engines.publish import read_audit, read_record
from bismooth.engines.tensorrt import TensorRTBuilder
from bismooth.export.errors import BismoothError, GateError
from bismooth.export.hashing import file_sha256
from tests.cached_model import LAYERS, expected_logits
from tests.cuttable import plan, request, write_cuttable

IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
LINEARS = frozenset(f"layers.{layer}.{name}/MatMul" for layer in range(LAYERS) for name in "qkvo")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_cuttable(tmp_path / "art")


@dataclass(frozen=True)
class Failing:
    """Builds parts until one is refused."""

    refused: str
    name: str = "null"
    requests: list[BuildRequest] = field(default_factory=list[BuildRequest])

    def build(self, request: BuildRequest, on_phase: PhaseCallback | None = None) -> BuildResult:
        self.requests.append(request)
        if request.engine.stem == self.refused:
            raise GateError("it is broken.")
        return NullBuilder().build(request, on_phase)


def test_a_chain_is_recorded_and_audited_as_one_engine(graph: Path, tmp_path: Path) -> None:
    phases: list[Phase] = []
    wanted = request(graph, tmp_path / "engine/model.engine", source={"recipe": "r"})
    result = build_chain(NullBuilder(), wanted, plan(graph), phases.append)
    whole = NullBuilder().build(replace(wanted, engine=tmp_path / "whole/model.engine"))
    assert result.engine == tmp_path / "engine" / CHAIN
    assert {linear.node for linear in result.audit.linears} == {linear.node for linear in whole.audit.linears}
    assert len(result.audit.linears) == len(whole.audit.linears) == 4 * LAYERS + 1
    assert [linear.node for linear in result.audit.linears if linear.head] == ["head/MatMul"]
    assert result.audit.kinds == whole.audit.kinds
    assert result.record.shapes == whole.record.shapes
    assert read_record(result.engine) == result.record
    assert read_audit(result.audit_file) == result.audit
    assert result.record.source == {"recipe": "r"}
    assert result.record.sha256 == file_sha256(result.engine)
    assert [phase.name for phase in phases] == [f"part {number} of 4: Building engine" for number in range(1, 5)]
    for part in Chain.load(result.engine).parts:
        engine = result.engine.with_name(part.file)
        assert part.sha256 == file_sha256(engine) == read_record(engine).sha256
        assert part.linears == tuple(linear.node for linear in read_audit(audit_path(engine)).linears)


def test_each_part_is_asked_for_its_own_linears(graph: Path, tmp_path: Path) -> None:
    builder = Failing("none")
    wanted = request(graph, tmp_path / "engine/model.engine", meant_int8=LINEARS, allow_float=True)
    build_chain(builder, replace(wanted, log=tmp_path / "build.log"), plan(graph))
    meant = [asked.meant_int8 for asked in builder.requests]
    assert [len(nodes) for nodes in meant] == [0, 4, 4, 0]
    assert frozenset().union(*meant) == LINEARS
    assert [asked.logits for asked in builder.requests] == ["last"] * 4
    assert [asked.log for asked in builder.requests] == [tmp_path / f"build.part-0{number}.log" for number in range(4)]


def test_a_linear_that_is_lost_or_built_twice(graph: Path, tmp_path: Path) -> None:
    parts = plan(graph).parts
    wanted = request(graph, tmp_path / "model.engine", meant_int8=LINEARS)
    for chosen, count in ((parts[:2], 0), ((*parts, parts[2]), 2)):
        wrong = BuildPlan(chosen, (0,) * len(chosen))
        with pytest.raises(
            BismoothError, match=rf"'layers\.1\.k/MatMul', which is meant to be INT8, is in {count} parts"
        ):
            build_chain(NullBuilder(), wanted, wrong)


def test_the_part_that_cannot_be_built_is_named(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"^part 3 of 4: it is broken\.$"):
        build_chain(Failing("part-02"), request(graph, tmp_path / "model.engine"), plan(graph))
    assert not (tmp_path / CHAIN).exists()


def test_a_linear_that_falls_back_fails_its_part(graph: Path, tmp_path: Path) -> None:
    wanted = request(graph, tmp_path / "model.engine", meant_int8=LINEARS)
    with pytest.raises(GateError, match=r"part 2 of 4: .*4 of the 4 linears that were meant to be INT8 fell back"):
        build_chain(NullBuilder(), wanted, plan(graph))


def test_figures_of_parts_add_up() -> None:
    one = Audit({"gemm": 2}, 2, 1, 1, 100, (), (Figures({"gemm": 1}, 1, 1, 0, 10),))
    other = Audit({"gemm": 1, "kgen": 3}, 1, 1, 0, 50, (), (Figures({"kgen": 1}, 0, 0, 1, None),))
    joined = join_audits([one, other])
    assert joined.figures() == Figures({"gemm": 3, "kgen": 3}, 3, 2, 1, 150).figures()
    assert [figures.figures() for figures in joined.others] == [Figures({"gemm": 1, "kgen": 1}, 1, 1, 1).figures()]


@pytest.fixture
def decoders(graph: Path, tmp_path: Path) -> Iterator[tuple[OnnxRuntimeDecoder, OnnxRuntimeDecoder]]:
    """Of the engine in one piece, and of a chain."""
    builder: EngineBuilder = OnnxRuntimeBuilder()
    whole = builder.build(request(graph, tmp_path / "whole/model.onnx"))
    chain = build_chain(builder, request(graph, tmp_path / "chain/model.onnx"), plan(graph))
    with OnnxRuntimeDecoder(whole.engine) as one, OnnxRuntimeDecoder(chain.engine) as other:
        yield one, other


def test_a_chain_decodes_as_the_engine_in_one_piece(
    decoders: tuple[OnnxRuntimeDecoder, OnnxRuntimeDecoder],
) -> None:
    whole, chain = decoders
    assert (chain.vocab_size, chain.capacity) == (whole.vocab_size, whole.capacity)
    mask = (np.arange(8) >= np.array([[0], [3]])).astype(np.int64)
    for _ in range(2):
        expected, got = whole.prefill(IDS, mask), chain.prefill(IDS, mask)
        np.testing.assert_array_equal(got, expected)
        reference = expected_logits(IDS, mask)[:, -1]
        np.testing.assert_allclose(got, reference, atol=1e-4 * np.abs(reference).max())
        for step in range(3):
            tokens = IDS[:, step]
            np.testing.assert_array_equal(chain.decode(tokens), whole.decode(tokens))
        np.testing.assert_array_equal(chain.prefill(IDS[:, :3]), whole.prefill(IDS[:, :3]))
        assert chain.length == whole.length == 14
        whole.reset()
        chain.reset()


def test_parts_of_onnxruntime_share_their_weight_files(graph: Path, tmp_path: Path) -> None:
    for copy in (False, True):
        folder = tmp_path / f"engine{copy}"
        wanted = request(graph, folder / "model.onnx", copy_weights=copy)
        result = build_chain(OnnxRuntimeBuilder(), wanted, plan(graph))
        assert (folder / "weights.bin").samefile(graph.parent / "weights.bin") != copy
        files = [*folder.glob("part-*.onnx"), folder / "weights.bin", folder / CHAIN]
        assert result.record.bytes == sum(file.stat().st_size for file in files)
        assert result.peak_rss is None or result.peak_rss > 0


def test_a_chain_without_caches_cannot_decode(graph: Path, tmp_path: Path) -> None:
    result = build_chain(OnnxRuntimeBuilder(), request(graph, tmp_path / "engine/model.onnx"), plan(graph))
    document = json.loads(result.engine.read_text())
    document["parts"] = document["parts"][-1:]
    document["parts"][0]["reads"] = None
    result.engine.write_text(json.dumps(document))
    with pytest.raises(BismoothError, match=r"chain\.json: cannot generate text\. .* got the input 'graph/Add___'"):
        OnnxRuntimeDecoder(result.engine)


def test_parts_compute_the_logits_of_windows(graph: Path) -> None:
    parts = lean_parts(graph, ["graph/Add", "graph/Add__", "graph/Add___"])
    with Session(graph, mode="plain") as whole:
        for window, logits in zip(IDS, chain_windows(parts, IDS, "plain"), strict=True):
            np.testing.assert_array_equal(logits, whole.logits(window[None]))


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu12")
def test_parts_of_tensorrt_keep_their_caches_in_place(tmp_path: Path) -> None:
    graph = write_cuttable(tmp_path / "art", half=True, wide=True)
    wanted = replace(request(graph, tmp_path / "engine/model.engine"), capabilities=(89,))
    result = build_chain(TensorRTBuilder(), wanted, plan(graph))
    prompts, (tokens,) = result.audit, result.audit.others
    assert (prompts.fused_attention, tokens.fused_attention) == (LAYERS, LAYERS)
    caches = result.record.caches
    assert caches is not None
    assert len(caches.aliases) == 2 * LAYERS
    assert caches.capacity == 64
    assert caches.decode["input_ids"] == ((1, 1), (1, 1), (4, 1))
    assert result.record.shapes["logits_at"] == ((1,), (1,), (16,))
    chain = Chain.load(result.engine)
    assert ["logits_at" in part.inputs for part in chain.parts] == [False, False, False, True]
    assert ["write_indices" in part.inputs for part in chain.parts] == [False, True, True, False]
    assert all(part.peak_rss_bytes for part in chain.parts)
