"""What package puts into a bundle, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bismooth.engines.base import audit_path
from bismooth.engines.bundle import Bundle
from bismooth.engines.bundle_manifest import MANIFEST
from bismooth.engines.onnxruntime import Session
from bismooth.export.artifact import Artifact, finish_folder
from bismooth.export.errors import BismoothError
from bismooth.passes.spec import ComputeType
from bismooth.tools import package as module
from bismooth.tools import stages
from bismooth.tools.hops import FORMAT
from bismooth.tools.inspect import inspect_path
from bismooth.tools.meant import engine_source
from bismooth.tools.package import package
from tests.fake_engine import write_engine
from tests.quantized import make, save
from tests.tiny import listing, snapshot

X = np.random.default_rng(2).normal(size=(3, 256)).astype(np.float32)
SIDE = {"tokenizer.json": "{}", "config.json": "{}", "generation_config.json": '{"eos_token_id": 2}'}
BESIDE = {*SIDE, "LICENSE", "README.md", MANIFEST, "engines", "engines/onnxruntime"}


def source_model(folder: Path) -> Path:
    text = "(float[batch, 256] x) => (float[batch, 256] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"
    weights = {name: np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32) for name in "wv"}
    graph = save(make(text, **weights), folder, "vocab.bin")
    for name, content in SIDE.items():
        (folder / name).write_text(content)
    (folder / "LICENSE").write_text("Permission is hereby granted")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return graph


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source``, ``float``, and ``quantized`` with an engine of ONNX Runtime."""
    root = tmp_path_factory.mktemp("package")
    stages.export(source_model(root / "source"), root / "float", dtype=ComputeType.FLOAT32)
    stages.quantize(root / "float", "w8a8", root / "quantized", data_free=True)
    stages.build(root / "quantized", "onnxruntime")
    return root


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    """A copy of the quantized artifact for one test, with its weights as links."""
    return shutil.copytree(made / "quantized", tmp_path / "art", copy_function=os.link)


def replace_file(path: Path, content: bytes) -> None:
    """Without writing to what it is a link of."""
    path.unlink()
    path.write_bytes(content)


def add_tensorrt(artifact: Path, name: str, **changes: Any) -> Path:
    """An engine folder as ``build --engine tensorrt-rtx`` leaves it, with a plan that nothing can run."""
    loaded = Artifact.load(artifact)
    folder = artifact / "engines" / name
    write_engine(folder, source=engine_source(loaded) | changes)
    stage = {"stage": "build", "engine": "tensorrt-rtx"}
    manifest = replace(loaded.manifest, kind="engine", graphs={}, stages=(*loaded.manifest.stages, stage))
    finish_folder(folder, manifest, loaded.manifest.hashes)
    return folder


def forget_source(artifact: Path, *names: str) -> None:
    """Take files out of the artifact, and say that it came from the hub."""
    manifest = json.loads((artifact / "bismooth.json").read_text())
    for name in names:
        (artifact / name).unlink()
        del manifest["files"][name]
    manifest["source"]["path"] = "org/model"
    replace_file(artifact / "bismooth.json", json.dumps(manifest).encode())


def add_verdict(artifact: Path, **changes: Any) -> None:
    hop: Mapping[str, Any] = {"judged": [], "failures": [], "skipped": None, "windows": 2, "seconds": 1.0}
    document: dict[str, Any] = {
        "format": FORMAT,
        "source": engine_source(Artifact.load(artifact)),
        "windows": 2,
        "length": 24,
        "data": ["/home/me/text.txt"],
        "verdict": "passed; not judged: device",
        "failures": [],
        "reference_perplexity": 10.0,
        "perplexity": 10.5,
        "perplexity_ratio": 1.05,
        "kl": 0.0123,
        "top1": 0.95,
        "hops": [
            {**hop, "hop": "reference", "compared": "a→b", "metrics": {"kl": 0.0125}, "judged": ["kl"]},
            {**hop, "hop": "half", "compared": "c→d", "metrics": {"relative_error": 0.5}},
            {**hop, "hop": "audit", "compared": "d→e", "metrics": {"engines": {"onnxruntime": 1.0}}, "judged": ["x"]},
            {**hop, "hop": "device", "compared": "e→f", "metrics": {}, "skipped": "there is no GPU"},
        ],
    }
    (artifact / "verify.json").write_text(json.dumps(document | changes))


def run(graph: Path) -> Any:
    with Session(graph, threads=1) as session:
        return session.run({"x": X})["y"]


def test_a_bundle_of_one_engine(artifact: Path, tmp_path: Path) -> None:
    add_verdict(artifact)
    before = snapshot(artifact)
    result = package(artifact, tmp_path / "bundle")
    assert snapshot(artifact) == before
    engine = {f"engines/onnxruntime/{name}" for name in ("model.onnx", "model.audit.json", "weights.bin")}
    assert listing(tmp_path / "bundle") == BESIDE | engine | {"verify.json"}
    assert result.warnings == ()
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.manifest == {"format": "bismooth-bundle", "version": 1, **result.manifest, "sha256": result.sha256}
    (only,) = bundle.engines
    assert (only.runtime, only.capacity, {*only.files}) == ("onnxruntime", None, engine)
    np.testing.assert_array_equal(run(bundle.path / only.file), run(artifact / "model.onnx"))
    loaded = Artifact.load(artifact)
    assert bundle.manifest["source"] == {
        "name": "model.onnx",
        "format": "onnx",
        "fingerprint": loaded.manifest.source["fingerprint"],
        "content_sha256": loaded.manifest.content_sha256,
    }
    assert bundle.name == "model-w8a8"
    assert bundle.manifest["recipe"]["fingerprint"] == loaded.manifest.stages[1]["fingerprint"]
    assert bundle.manifest["licence"] == {"id": "mit", "stated_by": "README.md", "files": ["LICENSE"]}
    assert bundle.manifest["decodes"] is False
    verdict = bundle.manifest["verdict"]
    assert (verdict["verdict"], verdict["kl"], verdict["data"]) == ("passed; not judged: device", 0.0123, ["text.txt"])
    assert str(tmp_path) not in (tmp_path / "bundle" / MANIFEST).read_text(), "paths of the maker are nobody's business"
    shown = result.to_json()
    assert (shown["engines"], shown["licence"], shown["verdict"]) == (["onnxruntime"], "mit", verdict["verdict"])
    assert shown["bundle_bytes"] == sum(
        path.stat().st_size for path in bundle.path.rglob("*") if path.is_file() and path.name != MANIFEST
    )


def test_the_card(artifact: Path, tmp_path: Path) -> None:
    add_verdict(artifact, failures=["reference: kl is 0.5. Expected at most 0.02."], verdict="failed")
    add_tensorrt(artifact, "tensorrt-rtx-sm86-sm89")
    result = package(artifact, tmp_path / "bundle")
    assert result.warnings == ("the verdict of verify is: failed. The card says so.",)
    card = (tmp_path / "bundle/README.md").read_text("utf-8")
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {"license": "mit", "library_name": "bismooth", "tags": ["onnx", "quantized"]}
    for line in (
        "# model-w8a8",
        "| licence | mit, as stated by README.md |",
        'pip install "bismooth[runtime,tensorrt-rtx]"',
        "| `tensorrt-rtx-sm86-sm89` | tensorrt-rtx 1.7.1 | SM86, SM89 | any | 0 MB | 0 of 0 | 0.0 % | 0 |",
        "Compared on 2 windows of 24 tokens (text.txt). Verdict: **failed**.",
        "Perplexity 10.5; 10 in float32 (× 1.0500). KL divergence 0.0123, same first choice for 95.0 % of the tokens.",
        "| reference | a→b | 0.0125 | – | – | – | passed |",
        "| half | c→d | – | – | – | 0.5 | measured |",
        "- **Failed**: reference: kl is 0.5. Expected at most 0.02.",
        "- The hop `half` (c→d) was measured, and held against no gate.",
        "- The hop `device` (e→f) was not judged: there is no GPU.",
        "- The engines of TensorRT were not run: what a GPU computes with them was compared with nothing.",
        "- The engine `tensorrt-rtx-sm86-sm89` was built after the verification; its own audit lies beside it.",
    ):
        assert f"\n{line}\n" in f"\n{text}", line
    assert "| `onnxruntime` | onnxruntime " in text
    assert " | none needed | any | 0 MB | 1 of 2 | 50.0 % | " in text
    assert "\n\n\n" not in text
    assert "{" not in text


def test_the_card_of_what_is_not_known(artifact: Path, tmp_path: Path) -> None:
    forget_source(artifact, "LICENSE", "README.md", "tokenizer.json")
    result = package(artifact, tmp_path / "bundle")
    assert result.warnings == (
        "the licence of the source is not known: no model card names it, and no text of a licence lies beside it. "
        "State it with --licence ID.",
        "nothing was verified. Run 'bismooth verify' first, so that the card can say how close this is.",
    )
    assert result.to_json()["licence"] == "unknown"
    card = (tmp_path / "bundle/README.md").read_text("utf-8")
    for text in (
        "| licence | **unknown** |",
        "> **No licence is known.**",
        "- Nothing was verified: how close this model is to its source is unknown.",
        "- There is no tokenizer.",
        "model (a model), quantized by bismooth",
    ):
        assert text in card, text
    assert "license:" not in card
    assert "How close" not in card
    stated = package(artifact, tmp_path / "stated", licence="cc-by-4.0")
    assert stated.manifest["licence"] == {"id": "cc-by-4.0", "stated_by": "--licence", "files": []}
    assert '\nlicense: "cc-by-4.0"\n' in (tmp_path / "stated/README.md").read_text("utf-8")


def test_a_text_of_a_licence_without_its_name(artifact: Path, tmp_path: Path) -> None:
    forget_source(artifact, "README.md")
    result = package(artifact, tmp_path / "bundle")
    assert "no model card names it, and its text is packaged." in result.warnings[0]
    assert result.to_json()["licence"] == "LICENSE"
    assert "| licence | see LICENSE |" in (tmp_path / "bundle/README.md").read_text("utf-8")


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("recipe", [None, "w8a8"])
def test_large_files_are_stored_once(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str | None, copies: bool
) -> None:
    monkeypatch.setattr(module, "SMALL_BYTES", 10_000)
    art = tmp_path / "float"
    stages.export(made / "source/model.onnx", art, dtype=ComputeType.FLOAT32, copy_weights=copies)
    if recipe:
        art = stages.quantize(art, recipe, tmp_path / "int8", data_free=True).artifact
    for name in ("one", "two"):
        stages.build(art, "onnxruntime", output=art / "engines" / name)
    package(art, tmp_path / "bundle")
    one, two = (tmp_path / "bundle/engines" / name for name in ("one", "two"))
    weights = "weights.bin" if recipe else "vocab.bin"
    assert (one / weights).samefile(two / weights)
    assert not (one / "model.audit.json").samefile(two / "model.audit.json"), "small files are copied"
    if not recipe:
        assert (one / weights).samefile(made / "source" / weights) != copies
    assert {path.name for path in two.iterdir()} == {"model.onnx", "model.audit.json", weights}
    assert Bundle.load(tmp_path / "bundle").engines


def test_engines_are_chosen(artifact: Path, tmp_path: Path) -> None:
    add_tensorrt(artifact, "rtx")
    assert [*package(artifact, tmp_path / "all").manifest["engines"]] == ["onnxruntime", "rtx"]
    assert [*package(artifact, tmp_path / "one", engines=["rtx", "rtx"]).manifest["engines"]] == ["rtx"]
    bundle = Bundle.load(tmp_path / "one")
    assert bundle.engine("rtx").capabilities == (86, 89)
    assert listing(bundle.path / "engines") == {"rtx", "rtx/model.engine", "rtx/model.audit.json"}
    with pytest.raises(BismoothError, match=r"--engine trt: .*art has no such engine\. It has: onnxruntime, rtx\."):
        package(artifact, tmp_path / "none", engines=["trt"])


def test_an_engine_of_something_else(artifact: Path, tmp_path: Path) -> None:
    add_tensorrt(artifact, "rtx", content_sha256="of other weights")
    message = (
        r"engines/rtx: the engine was not made of this artifact\. Expected content_sha256 [0-9a-f]{64}, got of other"
    )
    with pytest.raises(BismoothError, match=message):
        package(artifact, tmp_path / "bundle", engines=["rtx", "onnxruntime"])
    assert not (tmp_path / "bundle").exists()
    result = package(artifact, tmp_path / "bundle")
    assert [*result.manifest["engines"]] == ["onnxruntime"]
    assert result.warnings[0].startswith(f"left out: {artifact}/engines/rtx: the engine was not made of this artifact.")


def test_engines_that_cannot_be_packaged(artifact: Path, tmp_path: Path) -> None:
    shutil.rmtree(artifact / "engines/onnxruntime")
    with pytest.raises(
        BismoothError,
        match=r"art: the quantized artifact has no engines\. Expected some in engines/\. Run 'bismooth build",
    ):
        package(artifact, tmp_path / "bundle")
    stages.build(artifact, "null")
    with pytest.raises(BismoothError, match=r"engines of null are stand-ins for tests, which nothing runs\."):
        package(artifact, tmp_path / "bundle", engines=["null"])
    with pytest.raises(BismoothError, match=r"none of its engines can be packaged; left out: .*null are stand-ins"):
        package(artifact, tmp_path / "bundle")
    assert listing(tmp_path) == {"art", *(f"art/{name}" for name in listing(artifact))}


def test_a_float_artifact(made: Path, tmp_path: Path) -> None:
    with pytest.raises(BismoothError, match=r"float: the float artifact has no engines\."):
        package(made / "float", tmp_path / "bundle")
    folder = shutil.copytree(made / "float", tmp_path / "float", copy_function=os.link)
    stages.build(folder, "onnxruntime")
    result = package(folder, tmp_path / "bundle")
    assert (result.manifest["recipe"], result.manifest["name"]) == (None, "model")
    assert "model.onnx (a model), not quantized." in (tmp_path / "bundle/README.md").read_text("utf-8")
    np.testing.assert_array_equal(run(tmp_path / "bundle/engines/onnxruntime/model.onnx"), run(folder / "model.onnx"))


@pytest.mark.parametrize("name", ["quantized.safetensors", "vocab.bin"])
def test_weights_of_an_engine_that_were_changed(artifact: Path, tmp_path: Path, name: str) -> None:
    path = artifact / "engines/onnxruntime" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    replace_file(path, bytes(content))
    message = (
        rf"onnxruntime/{name}: was changed since the engine was built: expected SHA-256 .*\. Build the engine again"
    )
    with pytest.raises(BismoothError, match=message):
        package(artifact, tmp_path / "bundle")
    assert {path.name for path in tmp_path.iterdir()} == {"art"}


def test_a_verdict_on_something_else(artifact: Path, tmp_path: Path) -> None:
    add_verdict(artifact, source={"content_sha256": "0"})
    with pytest.raises(BismoothError, match=r"verify\.json: is no verdict on this artifact\. Expected fingerprint "):
        package(artifact, tmp_path / "bundle")


@pytest.mark.parametrize("text", ["", "[]", "{}", f'{{"format": "{FORMAT}"}}', '{"format": "other"}'])
def test_a_verdict_that_is_none(artifact: Path, tmp_path: Path, text: str) -> None:
    (artifact / "verify.json").write_text(text)
    with pytest.raises(BismoothError, match=r"verify\.json: not a verdict: .* Run 'bismooth verify' again\."):
        package(artifact, tmp_path / "bundle")


def test_the_output_of_compile(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "out", copy_function=os.link)
    with pytest.raises(
        BismoothError, match=r"out: compile has not finished here: there is no compile\.json\. Run the same"
    ):
        package(tmp_path / "out", tmp_path / "bundle")
    (tmp_path / "out/compile.json").touch()
    package(tmp_path / "out", tmp_path / "bundle")
    assert Bundle.load(tmp_path / "bundle").name == "model-w8a8"


def test_only_a_bundle_is_replaced(artifact: Path, tmp_path: Path) -> None:
    package(artifact, tmp_path / "bundle")
    with pytest.raises(BismoothError, match=r"bundle: already exists\. Choose another output folder, or pass --force"):
        package(artifact, tmp_path / "bundle")
    (tmp_path / "bundle/config.json").unlink()
    package(artifact, tmp_path / "bundle", force=True)
    assert (tmp_path / "bundle/config.json").exists()
    (tmp_path / "bundle/stray").touch()
    message = r"exists and is not a bundle of 'bismooth package' with nothing else in it, so --force does not"
    for output in (artifact, artifact / "engines", tmp_path / "bundle"):
        with pytest.raises(BismoothError, match=message):
            package(artifact, output, force=True)
    assert (tmp_path / "bundle/stray").exists()


def test_inspect(artifact: Path, tmp_path: Path) -> None:
    bundle = package(artifact, tmp_path / "bundle").bundle
    good = inspect_path(bundle)
    assert good.failures == ()
    assert (good.to_json()["kind"], good.brief()["engines"][0]["engine"]) == ("bundle", "onnxruntime")
    assert (good.brief()["verify"], good.brief()["licence"]) == ("not run", "mit")
    record = inspect_path(bundle / "engines/onnxruntime/model.onnx")
    assert record.failures == ()
    (bundle / "more").touch()
    (bundle / "config.json").write_text("[]")
    bad = inspect_path(bundle).failures
    assert [failure.removeprefix(f"{bundle}/").partition(": ")[0] for failure in bad] == ["more", "config.json"]
    (bundle / MANIFEST).write_text("{}")
    assert inspect_path(bundle).failures[0].startswith(f"{bundle / MANIFEST}: the manifest cannot be read")


def test_the_capacity_of_an_engine(artifact: Path, tmp_path: Path) -> None:
    folder = add_tensorrt(artifact, "rtx")
    shapes = {"input_ids": [[1, 1], [1, 128], [4, 512]]}
    path = audit_path(folder / "model.engine")
    document = json.loads(path.read_text())
    document["engine"]["shapes"] = shapes
    text = json.dumps(document)
    path.write_text(text)
    manifest = json.loads((folder / "bismooth.json").read_text())
    manifest["files"][path.name]["size"] = len(text)
    (folder / "bismooth.json").write_text(json.dumps(manifest))
    package(artifact, tmp_path / "bundle", engines=["rtx"])
    assert Bundle.load(tmp_path / "bundle").engine("rtx").capacity == 512
