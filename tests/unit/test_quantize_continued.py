"""A quantization that was broken off goes on, if nothing that decides its result has changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from bismooth.calibrators import run as calibrators_run
from bismooth.export import fingerprint
from bismooth.export import state as state_module
from bismooth.export.artifact import MANIFEST
from bismooth.export.errors import BismoothError
from bismooth.export.state import read_units, state_folder
from bismooth.passes.foldcheck import CheckFold
from bismooth.passes.smoothing import ChooseFactor
from bismooth.passes.wall_groups import LookForWalls
from bismooth.passes.weight_tasks import CopyNarrow, QuantizeLinear
from bismooth.tools import quantizing, stages
from tests.artifacts import names
from tests.graphs import Builder, decoder

RECIPE = "w8a8-mixed+bismooth"
ATTENTION = "model.layers.0.self_attn"


def model(change: float = 0.0) -> Builder:
    """A decoder with walls, so that every step has work to do; ``change`` is what one weight differs by."""
    b = decoder(tied=False)
    for name in "qkv":
        b.initializers[f"{ATTENTION}.{name}_proj.weight"][:, 3] *= 300
    b.initializers[f"{ATTENTION}.o_proj.weight"][0, 0] += np.float32(change)
    return b


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return export(tmp_path / "source", tmp_path / "float", model())


def export(source: Path, artifact: Path, builder: Builder) -> Path:
    source.mkdir(exist_ok=True)
    return stages.export(builder.save(source, external=True), artifact, force=True, copy_weights=True).artifact


def quantize(artifact: Path, output: Path, **options: Any) -> Path:
    chosen: dict[str, Any] = {"recipe": RECIPE, "data_free": True} | options
    return stages.quantize(artifact, output=output, **chosen).artifact


def fail_at(patch: pytest.MonkeyPatch, place: Any, name: str, number: int) -> None:
    """Let the call of this number end the run as Ctrl-C does."""
    run: Callable[..., Any] = getattr(place, name)
    left = number

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    patch.setattr(place, name, call)


def break_off(
    artifact: Path, output: Path, place: Any = QuantizeLinear, name: str = "__call__", number: int = 4
) -> Path:
    """A run that ends there; returns its state."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_at(patch, place, name, number)
        quantize(artifact, output)
    assert not output.exists()
    return state_folder(output)


def contents(folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files[MANIFEST])
    for record in manifest["stages"][-1]["passes"]:
        del record["seconds"]
    return files | {MANIFEST: manifest}


@pytest.mark.parametrize(
    ("place", "name", "number"),
    [
        (ChooseFactor, "__call__", 3),
        (LookForWalls, "__call__", 3),
        (CheckFold, "__call__", 1),
        (QuantizeLinear, "__call__", 1),
        (QuantizeLinear, "__call__", 7),
        (CopyNarrow, "__call__", 2),
        (quantizing, "finish_folder", 1),
    ],
)
def test_it_makes_what_an_unbroken_run_makes(
    artifact: Path, tmp_path: Path, place: Any, name: str, number: int
) -> None:
    expected = contents(quantize(artifact, tmp_path / "expected"))
    state = break_off(artifact, tmp_path / "art", place, name, number)
    assert read_units(state)[0]
    assert contents(quantize(artifact, tmp_path / "art")) == expected
    assert not state.exists()


def refused(artifact: Path, output: Path, difference: str, **options: Any) -> None:
    """The run is refused with these words, loses nothing, and can be discarded."""
    before = read_units(state_folder(output))
    with pytest.raises(BismoothError) as caught:
        quantize(artifact, output, **options)
    assert difference in str(caught.value)
    assert "--restart to discard that run." in str(caught.value)
    assert read_units(state_folder(output)) == before
    quantize(artifact, output, restart=True, **options)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"recipe": "w8a16"}, 'recipe.name is "w8a8-mixed+bismooth", and would be "w8a16"'),
        ({"max_share": 0.5}, "recipe.max_share is not set, and would be 0.5"),
    ],
)
def test_another_recipe(artifact: Path, tmp_path: Path, options: dict[str, Any], difference: str) -> None:
    break_off(artifact, tmp_path / "art")
    refused(
        artifact,
        tmp_path / "art",
        f"an unfinished run is there, which would come out differently: {difference}",
        **options,
    )


def test_another_version_of_the_code(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_off(artifact, tmp_path / "art")
    monkeypatch.setattr(fingerprint, "code_sha256", lambda: "other")
    refused(artifact, tmp_path / "art", '", and would be "other". Expected the same input, options and code.')


def test_another_version_of_a_tool(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_off(artifact, tmp_path / "art")
    monkeypatch.setattr(fingerprint, "tool_versions", lambda: {"python": "2.7"})
    refused(artifact, tmp_path / "art", ', and would be "2.7"')


def test_another_source(artifact: Path, tmp_path: Path) -> None:
    break_off(artifact, tmp_path / "art")
    export(tmp_path / "elsewhere", artifact, model())
    refused(
        artifact,
        tmp_path / "art",
        f'source.path is "{tmp_path}/source/model.onnx", and would be "{tmp_path}/elsewhere/',
    )


def make_alike(artifact: Path, like: Path) -> None:
    """Give the files the times of others, so that nothing but their content tells them apart."""
    for path in artifact.iterdir():
        status = (like / path.name).stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_two_models_have_no_state_in_common(artifact: Path, tmp_path: Path) -> None:
    """Of one architecture, at one path, with files of the same sizes and times."""
    break_off(artifact, tmp_path / "art")
    shutil.copytree(artifact, tmp_path / "first")
    shutil.copytree(tmp_path / "source", tmp_path / "first source")
    manifest = (artifact / MANIFEST).read_bytes()
    export(tmp_path / "source", artifact, model(change=1.0))
    (artifact / MANIFEST).write_bytes(manifest)
    make_alike(artifact, tmp_path / "first")
    refused(artifact, tmp_path / "art", "weights is ")


def test_a_change_that_samples_do_not_show(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole content is read while the run goes on, and compared with what the earlier run has read."""

    def same(_: Path) -> str:
        return "same"

    monkeypatch.setattr(calibrators_run, "hash_model", same)
    state = break_off(artifact, tmp_path / "art", quantizing, "finish_folder", 1)
    weights = artifact / "model.safetensors"
    status, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    refused(artifact, tmp_path / "art", "model.safetensors: was changed since an unfinished run began to read it.")
    assert not state.exists()


def test_a_weight_file_that_was_deleted(artifact: Path, tmp_path: Path) -> None:
    state = break_off(artifact, tmp_path / "art")
    (state / "quantized.safetensors").unlink()
    refused(artifact, tmp_path / "art", "quantized.safetensors: is not what an unfinished run has left there.")


def test_the_weight_file_counts_as_no_link(artifact: Path, tmp_path: Path) -> None:
    """Although it is one of the state until that is gone."""
    quantized = quantize(artifact, tmp_path / "art") / "quantized.safetensors"
    manifest = json.loads((quantized.parent / MANIFEST).read_text("utf-8"))
    assert manifest["files"]["quantized.safetensors"]["linked"] is False
    assert quantized.stat().st_nlink == 1


def test_a_run_that_was_killed_when_all_was_in_place(artifact: Path, tmp_path: Path) -> None:
    """Nothing is written to the finished file, which is still the state's as well."""

    def killed(_: Path) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(state_module, "_remove", killed)
        quantize(artifact, tmp_path / "art")
    expected = contents(tmp_path / "art")
    finished = tmp_path / "art/quantized.safetensors"
    assert finished.samefile(state_folder(tmp_path / "art") / "quantized.safetensors")
    finished.chmod(0o444)
    before = finished.stat()
    assert contents(quantize(artifact, tmp_path / "art", force=True)) == expected
    assert finished.stat().st_mtime_ns == before.st_mtime_ns
    assert names(tmp_path) == {"source", "float", "art"}


def test_a_file_system_without_links(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = contents(quantize(artifact, tmp_path / "expected"))

    def link(*_: Any) -> NoReturn:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    break_off(artifact, tmp_path / "art")
    assert contents(quantize(artifact, tmp_path / "art")) == expected
