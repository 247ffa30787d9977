"""From tiny random models of many architectures to quantized graphs that are right."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from bismooth.calibrators.calibration import StatisticsCalibration
from bismooth.calibrators.run import calibrate
from bismooth.calibrators.statistics import Statistics
from bismooth.engines.base import BuildRequest, Profile
from bismooth.engines.null import NullBuilder
from bismooth.engines.onnxruntime import Mode, Session
from bismooth.engines.onnxruntime_build import OnnxRuntimeBuilder
from bismooth.passes.graph import load
from bismooth.passes.linears import find_head, find_linears
from bismooth.passes.lint import lint
from bismooth.passes.quantize import QuantizeResult, quantize_graph
from bismooth.passes.recipe import Recipe
from bismooth.tools.halfsim import HalfSimulation
from tests.models import ARCHITECTURES, VOCAB, exported
from tests.quantizing import Array, relative_error
from tests.streaming import divide, run_pieces, streamed

SITES = {
    "llama": {"norm": 7, "attention_value": 3, "gated_product": 3},
    "qwen2": {"norm": 7, "attention_value": 3, "gated_product": 3},
    "qwen3": {"norm": 7, "attention_value": 3, "gated_product": 3},
    "mistral": {"norm": 7, "attention_value": 3, "gated_product": 3},
    "gemma2": {"norm": 11, "attention_value": 5, "gated_product": 5},
    "gemma3": {"norm": 11, "attention_value": 5, "gated_product": 5},
    "phi3": {"norm": 7, "attention_value": 3, "gated_product": 3},
    "gpt2": {"norm": 7, "attention_value": 3},
    "opt": {"norm": 7, "attention_value": 3, "elementwise": 3},
    "gpt_neox": {"norm": 7, "attention_value": 3},
    "bert": {"attention_value": 3},
}
"""Fold sites by kind, in 3 layers (Gemma: 5). Two norms a layer, and the last one, before the head; none where norms
feed the residual (BERT)."""

EVERYWHERE = [(name, "w8a8") for name in SITES]
ELSEWHERE = [
    *((name, "w8a8-static") for name in ("llama", "gpt2", "opt", "bert")),
    *((name, "w8a16") for name in ("gemma2", "gpt2", "phi3")),
    *((name, "fp16") for name in ("qwen3", "opt")),
]
"""Recipes on models that differ in what matters to them: Gemm and MatMul, biases, fused linears, norms."""

IDS = np.random.default_rng(0).integers(3, VOCAB, (4, 12))
Made = Callable[[str, str], "Artifact"]


@dataclass(frozen=True)
class Artifact:
    """A quantized model."""

    folder: Path
    result: QuantizeResult

    def path(self, role: str) -> Path:
        return self.folder / self.result.graphs[role]

    def logits(self, role: str, mode: Mode = "plain") -> Array:
        with Session(self.path(role), mode=mode, threads=1) as session:
            return session.logits(IDS)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Quantized artifacts, each made once."""
    root = tmp_path_factory.mktemp("architectures")

    @cache
    def calibrated(name: str) -> tuple[Path, Statistics]:
        folder = exported(name).folder
        graph = load(folder / "model.onnx")
        linears = find_linears(graph)
        heads = find_head(linears, graph)
        values = {linear.x: linear.k for linear in linears if linear not in heads}
        target = root / f"{name}.safetensors"
        return folder, calibrate(folder, values, IDS, target, histograms=False)

    @cache
    def quantized(name: str, recipe: str) -> Artifact:
        source, statistics = calibrated(name)
        folder = root / name / recipe
        shutil.copytree(source, folder)
        calibration = StatisticsCalibration(statistics)
        return Artifact(folder, quantize_graph(source / "model.onnx", folder, Recipe.load(recipe), calibration))

    return quantized


def test_all_architectures_are_in_the_table() -> None:
    assert SITES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", SITES)
def test_sites_by_kind(made: Made, name: str) -> None:
    kinds = Counter(str(choice.kind) for choice in made(name, "w8a8").result.choices)
    assert kinds == SITES[name]


@pytest.mark.parametrize("name", SITES)
def test_every_fold_leaves_the_function_unchanged(made: Made, name: str) -> None:
    artifact = made(name, "w8a8")
    smoothed = {choice.site for choice in artifact.result.choices if choice.channels}
    assert smoothed
    assert artifact.result.fold_errors.keys() == smoothed
    assert max(artifact.result.fold_errors.values()) <= 1e-5
    assert artifact.result.fold_errors_compute.keys() == smoothed
    assert max(error.folded or np.inf for error in artifact.result.fold_errors_compute.values()) < 2e-3
    assert relative_error(artifact.logits("reference"), artifact.logits("folded")) <= 1e-5


@pytest.mark.parametrize(("name", "recipe"), [*EVERYWHERE, *ELSEWHERE])
def test_graphs_are_clean_for_their_runtimes(made: Made, name: str, recipe: str) -> None:
    artifact = made(name, recipe)
    assert lint(artifact.path("float32"), target="onnxruntime") == []
    for capability in (75, 89):
        assert lint(artifact.path("float16"), target="tensorrt-rtx", capabilities=[capability]) == []


@pytest.mark.parametrize(("name", "recipe"), [*EVERYWHERE, *ELSEWHERE])
def test_logits_are_close_to_float_and_kernels_equal_the_reference(made: Made, name: str, recipe: str) -> None:
    artifact = made(name, recipe)
    expected, got = artifact.logits("reference"), artifact.logits("float32", "reference")
    assert float(np.linalg.norm(got - expected) / np.linalg.norm(expected)) < (1e-6 if recipe == "fp16" else 0.1)
    if recipe != "fp16":
        assert relative_error(got, artifact.logits("float32", "int8")) <= 1e-5


@pytest.mark.parametrize("name", SITES)
def test_integer_kernels_in_pieces_compute_the_same_to_the_last_bit(made: Made, tmp_path: Path, name: str) -> None:
    run = streamed(made(name, "w8a8").path("float32"), IDS, "int8")
    pieces = divide(run.stop, *range(run.stop))
    assert len(pieces) > 3
    assert (run_pieces(run, pieces, tmp_path) == run_pieces(run, divide(run.stop), tmp_path)).all()


@pytest.mark.parametrize(
    ("name", "recipe"), [("llama", "w8a8"), ("gemma2", "w8a8"), ("gpt2", "w8a16"), ("opt", "fp16")]
)
def test_float16_graphs_stay_finite(made: Made, name: str, recipe: str) -> None:
    artifact = made(name, recipe)
    with HalfSimulation(artifact.path("float16")) as simulation:
        run = simulation.run(IDS)
        assert simulation.findings(run.ratios) == []
    expected = artifact.logits("float32", "reference")
    assert float(np.linalg.norm(run.logits - expected) / np.linalg.norm(expected)) < 0.05


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_linears_that_read_one_tensor_share_its_quantizer(made: Made, name: str) -> None:
    artifact = made(name, "w8a8")
    graph = load(artifact.path("float32"))
    quantizers = sum(node.op == "QuantizeLinear" for node in graph.nodes)
    source = load(artifact.path("reference"))
    head = set(artifact.result.float_linears)
    assert quantizers == len({linear.x for linear in find_linears(source) if linear.name not in head}) == 4 * 3


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "llama"])
def test_engines_know_every_linear_that_is_meant_to_be_int8(made: Made, tmp_path: Path, name: str) -> None:
    artifact = made(name, "w8a8")
    meant = frozenset(linear.node for linear in artifact.result.linears if linear.int8)
    for builder, role in ((OnnxRuntimeBuilder(), "float32"), (NullBuilder(), "float16")):
        engine = tmp_path / builder.name / "model.engine"
        request = BuildRequest(artifact.path(role), engine, profile=Profile(capacity=64), meant_int8=meant)
        audit = builder.build(request).audit
        assert {linear.node for linear in audit.linears if linear.meant_int8} == meant
        assert audit.meant_share() == 1
