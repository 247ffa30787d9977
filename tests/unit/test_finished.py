"""What ``compile`` keeps of TensorRT's engines, by stand-ins for TensorRT's modules, and of damaged artifacts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.engines.publish import read_record
from bismooth.export import hashing
from bismooth.export.artifact import Artifact
from bismooth.export.errors import BismoothError
from bismooth.tools import finished, pipeline, shipped, stages
from bismooth.tools.finished import float_differs, quantized_differs
from tests.artifacts import make as make_artifact
from tests.fake_tensorrt import Fake
from tests.quantized import make, save

ROOT = Path(__file__).parents[2]
RTX = "quantized/engines/tensorrt-rtx-sm86-sm89"
Install = Callable[[str, str], None]
Run = Callable[..., pipeline.CompileResult]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a stand-in for a module of TensorRT in place, here and in the builder's process."""
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{modules}{os.pathsep}{ROOT}")

    def put(module: str, version: str) -> None:
        lines = ("import sys", "from tests.fake_tensorrt import Fake", f"sys.modules[__name__] = Fake({version!r})")
        (modules / f"{module}.py").write_text("\n".join(lines))
        fake: Any = Fake(version)
        fake.__spec__ = ModuleSpec(module, None)
        monkeypatch.setitem(sys.modules, module, fake)

    return put


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Compiles one linear into ``out``; only the rounding to 16 bits, so that the engine's kernels do not matter."""
    (tmp_path / "source").mkdir()
    weight = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    graph = "(float[batch, sequence, 256] x) => (float[batch, sequence, 256] fc) { fc = MatMul(x, w) }"
    source = save(make(graph, w=weight), tmp_path / "source")

    def compile_again(engine: str, **options: Any) -> pipeline.CompileResult:
        return pipeline.compile(source, "fp16", [engine], [], tmp_path / "out", **options)

    return compile_again


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_text("utf-8"))
    change(document)
    path.write_text(json.dumps(document), "utf-8")


def test_an_engine_of_the_same_capabilities_and_library_is_kept(run: Run, install: Install) -> None:
    install("tensorrt_rtx", "1.7.1")
    (built,) = run("tensorrt-rtx", capabilities=(86, 89, 86)).engines
    assert (built.folder.name, built.result.record.capabilities) == ("tensorrt-rtx-sm86-sm89", (86, 89))
    result = run("tensorrt-rtx", capabilities=(86, 89))
    assert result.kept == ("float", "quantized", RTX)
    assert result.engines[0].result.record == built.result.record
    assert result.engines[0].result.audit == built.result.audit


def test_an_engine_for_other_capabilities_is_another_one(tmp_path: Path, run: Run, install: Install) -> None:
    install("tensorrt_rtx", "1.7.1")
    run("tensorrt-rtx", capabilities=(86, 89))
    result = run("tensorrt-rtx", capabilities=(75, 86))
    assert result.kept == ("float", "quantized")
    assert [engine.folder.name for engine in result.engines] == ["tensorrt-rtx-sm75", "tensorrt-rtx-sm86"]
    assert (tmp_path / "out" / RTX).is_dir()
    engines = tmp_path / "out/quantized/engines"
    (engines / "tensorrt-rtx-sm86").rename(engines / "tensorrt-rtx-sm89")
    with pytest.raises(BismoothError, match=r"sm89: .*: capabilities is \[86\], and would be \[89\]"):
        run("tensorrt-rtx", capabilities=(89,))


def test_an_engine_of_another_version_of_the_library(run: Run, install: Install) -> None:
    """What the engine's own record says counts: packages of several names bring the library."""
    install("tensorrt_rtx", "1.7.1")
    run("tensorrt-rtx", capabilities=(86, 89))
    install("tensorrt_rtx", "1.8.0")
    with pytest.raises(
        BismoothError, match=r'sm86-sm89: .* version\.tensorrt-rtx is "1\.7\.1", and would be "1\.8\.0"'
    ):
        run("tensorrt-rtx", capabilities=(86, 89))


def test_an_engine_for_the_gpu_of_its_machine_is_never_kept(tmp_path: Path, run: Run, install: Install) -> None:
    install("tensorrt", "11.4.0")
    (built,) = run("tensorrt").engines
    with pytest.raises(
        BismoothError, match=r"tensorrt builds for the GPU that it finds, and no record .*, delete "
    ) as e:
        run("tensorrt")
    assert e.match(f"delete {built.folder}")
    for file in built.folder.iterdir():
        file.unlink()
    built.folder.rmdir()
    assert run("tensorrt").kept == ("float", "quantized")


def test_an_engine_in_the_folder_of_another_kind(tmp_path: Path, run: Run, install: Install) -> None:
    install("tensorrt_rtx", "1.7.1")
    run("null")
    engines = tmp_path / "out/quantized/engines"
    (engines / "null").rename(engines / "tensorrt-rtx-sm86")
    with pytest.raises(BismoothError, match=r'runtime is "null", and would be "tensorrt-rtx"'):
        run("tensorrt-rtx", capabilities=(86,))


def test_every_file_with_a_hash_is_read_once(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("null")
    read: list[str] = []

    def hash_and_count(path: Path) -> str:
        read.append(path.relative_to(tmp_path / "out/quantized").as_posix())
        return hashing.file_sha256(path)

    for module in (finished, shipped):
        monkeypatch.setattr(module, "file_sha256", hash_and_count)
    run("null")
    hashes = Artifact.load(tmp_path / "out/quantized").manifest.hashes
    assert "quantized.safetensors" in hashes
    assert sorted(read) == sorted([*hashes, "engines/null/model.engine"])


@pytest.mark.parametrize("folder", ["quantized", "quantized/engines/onnxruntime"])
def test_damage_that_leaves_the_size_as_it_was(tmp_path: Path, run: Run, folder: str) -> None:
    run("onnxruntime", copy_weights=True)
    path = tmp_path / "out" / folder
    name = next(iter(sorted(Artifact.load(path).manifest.hashes)))
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    message = rf"out/{folder}: .* {name} was changed: expected SHA-256 \w+, got \w+\. .* delete .*{folder}\. .*--force"
    with pytest.raises(BismoothError, match=message):
        run("onnxruntime", copy_weights=True)


def test_manifests_that_lack_the_entry_of_their_stage(tmp_path: Path, run: Run) -> None:
    run("null")
    engine = tmp_path / "out/quantized/engines/null"
    edit(engine / "bismooth.json", lambda m: m["stages"].pop())
    with pytest.raises(BismoothError, match=r"engines/null: its manifest does not say which engine this is\. Expected"):
        run("null")
    quantized = tmp_path / "out/quantized/bismooth.json"
    before = quantized.read_text()
    edit(quantized, lambda m: m["stages"][1].update(recipe="fp16"))
    with pytest.raises(BismoothError, match=r"manifest lacks recipe\.name\. Run 'bismooth quantize' again"):
        run("null")
    quantized.write_text(before)
    edit(quantized, lambda m: m["stages"].pop())
    with pytest.raises(BismoothError, match=r"by another version of bismooth: its manifest lacks quantize\. Run"):
        run("null")
    manifest = Artifact.load(tmp_path / "out/float").manifest
    with pytest.raises(BismoothError, match="lacks quantize"):
        quantized_differs(quantized.parent, manifest, stages.load_recipe("fp16"), None)


@pytest.mark.parametrize(
    ("key", "value"), [("version", 1), ("bytes", "4"), ("source", "model"), ("runtime", None), ("sha256", 0)]
)
def test_a_record_of_an_engine_with_values_of_other_types(tmp_path: Path, run: Run, key: str, value: Any) -> None:
    engine = run("null").engines[0].folder / "model.engine"
    edit(engine.with_name("model.audit.json"), lambda document: document["engine"].update({key: value}))
    with pytest.raises(BismoothError, match=rf"not a record of an engine: {key} is {value!r}\. Build"):
        read_record(engine)


def test_code_from_another_repository_is_never_taken_as_unchanged(tmp_path: Path) -> None:
    folder = make_artifact(tmp_path / "float")
    manifest = Artifact.load(folder).manifest
    source = {**manifest.source, "foreign_code": ["org/repo--modeling.Novel"]}
    found = float_differs(folder, source, {"stage": "export", "trust_remote_code": True})
    assert found == (
        "it is made with the code of org/repo--modeling.Novel, which lies outside the source and may have changed"
    )
    assert "org/repo" not in (float_differs(folder, manifest.source, {"trust_remote_code": True}) or "")
    assert "is made with" not in (float_differs(folder, source, {"trust_remote_code": False}) or "")
