"""Every command, from a tiny model to verified engines, through the command line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.engines.onnxruntime import Session
from bismooth.export.artifact import Artifact
from bismooth.passes.gates import Gates, Hop
from bismooth.passes.recipe import Recipe
from bismooth.tools import stages
from bismooth.tools.cli import main
from bismooth.tools.hops import HopResult
from bismooth.tools.inspect import inspect_path
from bismooth.tools.verify import verify_artifact
from tests.quantized import make
from tests.tiny import SIZES, Tiny, listing, make_tiny, snapshot

FLOAT_GATES = ("kl=none", "top1=none", "perplexity_ratio=none")
"""A random model of 32 channels is not one whose quality says anything."""

needs_rtx = pytest.mark.skipif(
    not any((Path(p) / "tensorrt_rtx").is_dir() for p in __import__("sys").path), reason="needs tensorrt-rtx"
)


@dataclass(frozen=True)
class Run:
    """The artifacts of one run of all stages, and the sizes of what was not to change."""

    tiny: Tiny
    float: Path
    quantized: Path


def run(*words: object) -> int:
    return main([str(word) for word in (*words, "--quiet")])


def inspect(path: Path) -> int:
    return main(["inspect", str(path)])


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A float artifact with statistics, and a quantized one; no command changes the source."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny = make_tiny(folder)
    before = snapshot(tiny.source)
    made = Run(tiny, folder / "float", folder / "quantized")
    for words in (
        ("export", tiny.source, "-o", made.float),
        ("calibrate", made.float, "--data", tiny.text, *SIZES, "--rows", 32),
        ("quantize", made.float, "-o", made.quantized),
    ):
        assert run(*words) == 0
        assert snapshot(tiny.source) == before, words[0]
    return made


@pytest.fixture(autouse=True)
def source_stays(artifacts: Run) -> Iterator[None]:
    """After every test: the source's bytes and times are what they were."""
    before = snapshot(artifacts.tiny.source)
    yield
    assert snapshot(artifacts.tiny.source) == before


def output(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_onnxruntime_engine_is_a_folder_of_its_own(
    artifacts: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "engine"
    assert run("build", artifacts.quantized, "--engine", "onnxruntime", "-o", engine, "--json") == 0
    report = output(capsys)
    assert (report["int8_mac_share"], report["int8_linears"], report["linears"]) == (1.0, 21, 22)
    assert {
        "model.onnx",
        "model.safetensors",
        "quantized.safetensors",
        "tokenizer.json",
        "model.audit.json",
    } <= listing(engine)
    assert (engine / "model.safetensors").samefile(artifacts.tiny.source / "model.safetensors")
    moved = shutil.copytree(engine, tmp_path / "moved")
    ids = np.arange(3, 15)[None]
    with Session(moved / "model.onnx") as alone, Session(artifacts.quantized / "model.onnx") as whole:
        last, expected = alone.logits(ids), whole.logits(ids)[:, -1:]
    np.testing.assert_allclose(last, expected, atol=0.02 * np.abs(expected).max())  # a float may round to another INT8


@pytest.mark.parametrize(
    ("recipe", "activations", "counts"),
    [("w8a8-per-channel", None, (18, 21)), ("w8a16", {"granularity": "per_token"}, (3, 21))],
)
def test_rules_decide_per_linear_what_is_to_be_int8(
    artifacts: Run, tmp_path: Path, recipe: str, activations: Any, counts: tuple[int, int]
) -> None:
    rule = {"match": "*.down_proj", "activations": activations}
    chosen = Recipe.from_dict({"extends": recipe, "layers": [rule]}, name="mixed")
    quantized = stages.quantize(artifacts.float, chosen, tmp_path / "mixed", data_free=True)
    audit = stages.build(quantized.artifact, "onnxruntime").result.audit
    meant = [linear for linear in audit.linears if linear.meant_int8]
    assert (len(meant), len(quantized.result.linears)) == counts
    assert audit.meant_share() == 1


@needs_rtx
@pytest.mark.parametrize("capability", ["75", "89"])
def test_tensorrt_engine(artifacts: Run, tmp_path: Path, capability: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("build", artifacts.quantized, "--engine", "tensorrt-rtx", "--capability", capability)
    assert run(*words, "-o", tmp_path / "engine", "--sequence", "1:16:64", "--json") == 0
    report = output(capsys)
    assert (report["int8_mac_share"], report["capabilities"]) == (1.0, [int(capability)])
    assert main(["inspect", str(tmp_path / "engine"), "--json"]) == 0
    inspected = output(capsys)
    assert inspected["audit"]["fallbacks"] == []
    assert (
        inspected["engine"]["sha256"]
        == json.loads((tmp_path / "engine/model.audit.json").read_text())["engine"]["sha256"]
    )


def test_verify_passes_hop_by_hop(artifacts: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantized = Path(shutil.copytree(artifacts.quantized, tmp_path / "copy"))
    assert run("build", quantized, "--engine", "onnxruntime") == 0
    capsys.readouterr()
    words = ("verify", quantized, "--data", artifacts.tiny.text, *SIZES)
    assert run(*words, "--json", "--gate", *FLOAT_GATES) == 0
    report = output(capsys)
    assert report == json.loads((quantized / "verify.json").read_text())
    verdicts = {hop["hop"]: hop["verdict"] for hop in report["hops"]}
    assert verdicts == {
        **dict.fromkeys(("float", "folded", "int8", "decode", "half", "audit"), "passed"),
        "reference": "measured",
        "device": "skipped",
    }
    assert report["verdict"] == "passed; not judged: reference, device"
    metrics = {hop["hop"]: hop["metrics"] for hop in report["hops"]}
    assert report["kl"] == metrics["int8"]["float_kl"]
    assert metrics["audit"]["engines"] == {"onnxruntime": 1.0}
    assert len(report["layers"]) == 21
    assert report["layers"][0]["sqnr_db"] <= report["layers"][-1]["sqnr_db"]
    assert listing(quantized) - listing(artifacts.quantized) > {"verify.json", "engines"}
    assert inspect(quantized) == 0
    assert "passed; not judged: reference, device" in " ".join(capsys.readouterr().out.split())


def test_inspect_says_what_a_model_was_calibrated_on(
    artifacts: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(artifacts.float), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["statistics"]
    assert found == {"windows": 3, "length": 24, "histograms": False, "grams": False}
    copy = Path(shutil.copytree(artifacts.float, tmp_path / "copy"))
    (copy / "statistics.safetensors").unlink()
    assert main(["inspect", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["statistics"] is None


def test_the_audit_trusts_whole_engines_of_this_artifact_only(artifacts: Run, tmp_path: Path) -> None:
    quantized = Path(shutil.copytree(artifacts.quantized, tmp_path / "copy"))

    def audit() -> HopResult:
        loaded = Artifact.load(quantized)
        (hop,) = verify_artifact(loaded, np.zeros((1, 4), np.int64), Gates(), [Hop.AUDIT]).hops
        return hop

    engine = stages.build(quantized, "null").folder
    shutil.copytree(engine, engine.with_name(".null.tmp-1"))
    assert audit().metrics["engines"] == {"null": 1.0}
    assert inspect_path(quantized).to_json()["engines"] == ["null"]

    intact = (engine / "model.engine").read_bytes()
    (engine / "model.engine").write_bytes(intact.swapcase())
    (failure,) = audit().failures
    assert re.search(r"audit: .*model\.engine: expected SHA-256 \w+, got \w+\. Build the engine again", failure)
    (engine / "model.engine").unlink()
    (failure,) = audit().failures
    assert "the manifest lists this file, but it is missing" in failure

    shutil.rmtree(engine)
    assert audit().skipped == "no engine was built"
    other = Recipe.from_dict({"extends": "w8a16"}, name="other")
    stages.build(
        stages.quantize(artifacts.float, other, tmp_path / "q", data_free=True).artifact, "null", output=engine
    )
    (failure,) = audit().failures
    assert "the engine was not made of this artifact. Expected recipe w8a8, got other" in failure


def test_a_gate_that_cannot_pass(artifacts: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("verify", artifacts.quantized, "--data", artifacts.tiny.text, *SIZES, "-o", tmp_path / "v.json")
    assert run(*words, "--hop", "reference", "--gate", "kl=0", *FLOAT_GATES[1:]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"missed\s+reference: kl is 0\.\d+\. Expected at most 0\.", " ".join(shown.split()))
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["verdict"] == "failed"
    assert not (artifacts.quantized / "verify.json").exists()


def test_an_overflow_names_the_node(artifacts: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("verify", artifacts.quantized, "--data", artifacts.tiny.text, *SIZES, "-o", tmp_path / "v.json")
    assert run(*words, "--hop", "half", "--gate", "half_max_ratio=1e-5", "--json") == 1
    failures = output(capsys)["failures"]
    assert re.match(r"half: model\.float16\.onnx: [\w./]+: value \S+ reached [\d.]+ in float16\.", failures[0])
    assert not any("half_max_ratio" in failure for failure in failures)


def test_compile_runs_every_stage(artifacts: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("compile", artifacts.tiny.source, "--engine", "onnxruntime", "--data", artifacts.tiny.text, "-o", tmp_path)
    options = ("--calibrate-windows", 3, "--verify-windows", 2, "--length", 24, "--rows", 32)
    assert run(*words, *options, "--gate", *FLOAT_GATES, "--json") == 0
    report = output(capsys)
    assert report["engines"][0]["int8_mac_share"] == 1.0
    assert report["verdict"].startswith("passed")
    assert {"float", "quantized", "compile.json"} <= listing(tmp_path)


def test_compile_that_fails_leaves_no_old_report(artifacts: Run, tmp_path: Path) -> None:
    report = tmp_path / "compile.json"
    report.write_text("passed")
    words = ("compile", artifacts.tiny.source, "--engine", "onnxruntime", "-o", tmp_path, "--data", artifacts.tiny.text)
    assert run(*words, "--verify-windows", 90_000, "--force") == 2
    assert not report.exists()
    report.write_text("passed")
    assert run(*words) == 2
    assert run(*words[:-1], "nowhere.txt", "--force") == 2
    assert report.read_text() == "passed"


def test_a_float_artifact_is_verified_without_quantized_hops(
    artifacts: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("verify", artifacts.float, "--data", artifacts.tiny.text, *SIZES, "-o", tmp_path / "v.json")
    assert run(*words, "--json") == 0
    report = output(capsys)
    verdicts = {hop["hop"]: hop["verdict"] for hop in report["hops"]}
    assert verdicts == {"float": "passed", "decode": "passed", "half": "passed"}
    assert "perplexity" in report


def test_what_is_there_is_replaced_only_by_force(artifacts: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(artifacts.quantized)
    words = ("quantize", artifacts.float, "--recipe", "w8a8-per-channel", "-o", artifacts.quantized)
    assert run(*words) == 2
    assert "already exists. Choose another output folder, or pass --force" in capsys.readouterr().err
    assert snapshot(artifacts.quantized) == before
    replaced = Path(shutil.copytree(artifacts.quantized, artifacts.quantized.with_name("again")))
    assert run(*words[:-1], replaced, "--force") == 0
    assert Artifact.load(replaced).manifest.stages[-1]["recipe"]["name"] == "w8a8-per-channel"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "build {quantized} --engine tensorrt-rtx",
            "tensorrt-rtx: builds ahead of time for named compute capabilities",
        ),
        ("build {quantized} --engine tensorrt-rtx --capability 8x", "Expected a compute capability such as 86"),
        ("build {quantized} --engine tensorrt-rtx --capability 75 89", "75"),
        ("build {quantized} --engine openvino", "openvino"),
        ("quantize {quantized} -o {new}", "expected a float artifact, got a quantized one"),
        ("quantize {float} --recipe w8a9 -o {new}", "w8a8"),
        ("quantize {float} --statistics nowhere -o {new}", "nowhere: there are no statistics"),
        ("verify {quantized} --data nowhere.txt --length 24", "nowhere.txt"),
        ("verify {quantized} --data {text} --length 24 --windows 900", "too little text"),
        ("verify {quantized} --data {text}", "--length 512: the model has 96 positions"),
        ("verify {quantized} --data {text} --gate kll=1", "kl"),
        ("export {new} -o {new}2", "{new}"),
        ("inspect {new}", "does not exist. Expected an artifact folder, an engine folder or an ONNX file"),
        ("inspect {text}", "cannot be read as an ONNX model"),
        ("inspect {source}", "not a bismooth artifact"),
    ],
)
def test_bad_input_is_one_message(
    artifacts: Run, tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {
        "float": artifacts.float,
        "quantized": artifacts.quantized,
        "text": artifacts.tiny.text,
        "source": artifacts.tiny.source,
        "new": tmp_path / "new",
    }
    assert main(words.format(**names).split()) == 2
    shown = capsys.readouterr()
    assert message.format(**names) in shown.err
    assert "Traceback" not in shown.err
    assert listing(tmp_path) == set()


def test_quantize_needs_statistics_or_a_word_about_it(
    artifacts: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Path(shutil.copytree(artifacts.float, tmp_path / "bare"))
    (bare / "statistics.safetensors").unlink()
    assert run("quantize", bare, "-o", tmp_path / "out") == 2
    assert "Run it first, or pass --data none" in capsys.readouterr().err
    assert run("quantize", bare, "--data", "none", "-o", tmp_path / "out") == 0


def test_an_encoder_is_judged_by_its_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = make_tiny(tmp_path, "bert")
    assert run("export", tiny.source, "-o", tmp_path / "float") == 0
    assert run("quantize", tmp_path / "float", "--data", "none", "-o", tmp_path / "quantized") == 0
    capsys.readouterr()
    words = ("verify", tmp_path / "quantized", "--data", tiny.text, *SIZES, "--json")
    assert run(*words) == 0
    report = output(capsys)
    reference = next(hop for hop in report["hops"] if hop["hop"] == "reference")
    assert set(reference["metrics"]) == {"cosine_p5", "sqnr_db", "relative_error"}
    assert reference["metrics"]["cosine_p5"] > 0.9
    assert reference["verdict"] == "measured"
    assert "perplexity" not in report


def test_a_network_of_convolutions_has_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cnn.onnx"
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    model = make("(float[batch, 3, 8, 8] x) => (float[batch, 4, 6, 6] y) { y = Conv(x, w) }", w=weight)
    file.write_bytes(model.SerializeToString())
    art = tmp_path / "art"
    assert run("export", file, "-o", art, "--dtype", "float32") == 0
    capsys.readouterr()
    assert run("inspect", art, "--json") == 0
    assert (output(capsys)["kind"], json.loads((art / "bismooth.json").read_text())["architecture"]) == ("float", None)
    assert run("inspect", file, "--json") == 0
    assert output(capsys)["operators"] == {"Conv": 1}
    text = tmp_path / "text.txt"
    text.write_text("some words")
    for command in ("calibrate", "verify"):
        assert run(command, art, "--data", text) == 2
        assert "has no tokenizer.json, so text cannot become tokens" in capsys.readouterr().err
