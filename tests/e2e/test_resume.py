"""``compile`` goes on where an earlier run ended, keeps only what it would make again, and says what it kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bismooth.calibrators.data import load_tokenizer, load_windows
from bismooth.export.artifact import Artifact
from bismooth.export.errors import BismoothError
from bismooth.export.hashing import array_sha256
from bismooth.passes.recipe import Recipe
from bismooth.tools import entry, pipeline, stages
from bismooth.tools.cli import main
from tests.tiny import Tiny, make_tiny, snapshot

FLOAT, STATISTICS, QUANTIZED = "float", "float/statistics.safetensors", "quantized"
ONNXRUNTIME, NULL = "quantized/engines/onnxruntime", "quantized/engines/null"
COMPARED = (
    "float/model.onnx",
    "float/model.float16.onnx",
    STATISTICS,
    "quantized/model.onnx",
    "quantized/model.float16.onnx",
    "quantized/quantized.safetensors",
    "quantized/engines/onnxruntime/model.onnx",
)
SIZES: dict[str, Any] = {"calibrate_windows": 2, "verify_windows": 2, "length": 16, "rows": 8}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("resume"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def complete(tiny: Tiny) -> Path:
    """The output of an uninterrupted run. Not to be changed."""
    output = tiny.text.parent / "complete"
    pipeline.compile(tiny.source, "w8a8", ["onnxruntime", "null"], [str(tiny.text)], output, **SIZES)
    return output


@pytest.fixture
def output(complete: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage; files that were links of the source are copies now."""
    return Path(shutil.copytree(complete, tmp_path / "out"))


def again(tiny: Tiny, output: Path, **changes: Any) -> tuple[str, ...]:
    """What a run with the same arguments, but for ``changes``, keeps."""
    arguments: dict[str, Any] = {
        "source": tiny.source,
        "recipe": "w8a8",
        "engines": ["onnxruntime", "null"],
        "data": [str(tiny.text)],
        "output": output,
    }
    return pipeline.compile(**(arguments | SIZES | changes)).kept


def test_a_second_run_keeps_everything_and_verifies_again(tiny: Tiny, output: Path) -> None:
    before = snapshot(output)
    assert again(tiny, output) == (FLOAT, STATISTICS, QUANTIZED, ONNXRUNTIME, NULL)
    after = snapshot(output)
    changed = {name for name in {**before, **after} if before.get(name) != after.get(name)}
    assert changed == {"compile.json", "quantized/verify.json"}
    report = json.loads((output / "compile.json").read_text())
    assert report["kept"] == [FLOAT, STATISTICS, QUANTIZED, ONNXRUNTIME, NULL]
    assert [engine["int8_mac_share"] for engine in report["engines"]] == [1.0, 1.0]


def test_the_text_that_was_verified_on_is_what_follows_the_calibration(tiny: Tiny, complete: Path) -> None:
    tokenizer = load_tokenizer(complete / "float")
    windows = load_windows([tiny.text], tokenizer, windows=4, length=16).ids
    report = json.loads((complete / "quantized/verify.json").read_text())
    assert report["data_sha256"] == array_sha256(windows[2:])
    (stage,) = [item for item in Artifact.load(complete / "quantized").manifest.stages if item["stage"] == "quantize"]
    assert stage["statistics"]["data_sha256"] == array_sha256(windows[:2])


@pytest.mark.parametrize(
    ("removed", "kept"),
    [
        ([FLOAT, QUANTIZED], ()),
        ([STATISTICS, QUANTIZED], (FLOAT,)),
        ([QUANTIZED], (FLOAT, STATISTICS)),
        ([ONNXRUNTIME], (FLOAT, STATISTICS, QUANTIZED, NULL)),
        ([FLOAT], (QUANTIZED, ONNXRUNTIME, NULL)),
    ],
)
def test_what_is_missing_is_made_as_without_an_interruption(
    tiny: Tiny, complete: Path, output: Path, removed: list[str], kept: tuple[str, ...]
) -> None:
    for name in removed:
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert again(tiny, output) == kept
    for name in COMPARED:
        if (output / name).exists() or name != STATISTICS:  # nothing needs statistics once the model is quantized
            assert (output / name).read_bytes() == (complete / name).read_bytes(), name


def test_a_stage_that_failed_is_where_the_next_run_starts(
    tiny: Tiny, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise BismoothError("it fails")

    output = tmp_path / "out"
    for stage in ("calibrate", "quantize", "build", "verify"):
        with monkeypatch.context() as patch, pytest.raises(BismoothError, match="it fails"):
            patch.setattr(stages, stage, fails)
            again(tiny, output)
        assert not (output / "compile.json").exists()
    assert again(tiny, output) == (FLOAT, STATISTICS, QUANTIZED, ONNXRUNTIME, NULL)
    for name in COMPARED:
        assert (output / name).read_bytes() == (complete / name).read_bytes(), name


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_after_its_export(tiny: Tiny, complete: Path, tmp_path: Path, number: int) -> None:
    output = tmp_path / "out"
    words = [tiny.source, "--engine", "onnxruntime", "null", "--data", tiny.text, "-o", output]
    words += [word for name, size in SIZES.items() for word in (f"--{name.replace('_', '-')}", size)]
    command = [sys.executable, "-m", "bismooth", "compile", *map(str, words), "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not (output / "float").exists() and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, number)
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert errors == f"error: {entry.MESSAGE}\n"
    assert FLOAT in again(tiny, output)
    for name in COMPARED:
        assert (output / name).read_bytes() == (complete / name).read_bytes(), name
    assert not list(output.rglob(".*")), "leftovers"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "w8a8-per-channel"}, r'out/quantized: .* recipe is "w8a8", and would be "w8a8-per-channel"'),
        ({"alpha": 0.5}, r"recipe\.smoothing\.alphas is \[.*\], and would be \[0\.5\]"),
        (
            {"recipe": Recipe.from_dict({"gates": {"kl": 0.5}}, name="w8a8")},
            r"recipe\.gates\.kl is 0\.\d+, and would be 0\.5",
        ),
        ({"opset": 20}, r"out/float: .* export\.opset is 23, and would be 20"),
        ({"copy_weights": True}, r"export\.copy_weights is false, and would be true"),
        ({"rows": 9}, r"statistics\.safetensors: .* calibrate\.rows is 8, and would be 9"),
        ({"length": 17}, r"calibrate\.length is 16, and would be 17"),
        ({"data": (), "verify_data": ["random"]}, r"out/quantized: .* statistics is .*, and would be not set"),
        ({"batch": (1, 2, 3)}, r"engines/null: .* shapes\.input_ids is \[\[1, 1\], \[1, 96\], \[4, 96\]\], and"),
    ],
)
def test_what_differs_is_named_and_nothing_is_changed(
    tiny: Tiny, output: Path, changes: dict[str, Any], message: str
) -> None:
    before = snapshot(output)
    with pytest.raises(BismoothError, match=r"cannot be kept: .*pass --force to make everything anew") as error:
        again(tiny, output, **changes)
    assert error.match(message)
    assert snapshot(output) == before


def test_another_source_and_a_source_that_was_changed(tiny: Tiny, output: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny.source, tmp_path / "source"))
    with pytest.raises(BismoothError, match=r'out/float: .* source\.path is ".*", and would be ".*/source"'):
        again(tiny, output, source=other)
    fresh = tmp_path / "fresh"
    (other / "modeling.py").write_text("depth = 1")
    stages.export(other, fresh / "float")
    (other / "modeling.py").write_text("depth = 22")
    with pytest.raises(BismoothError, match=r"the source's file modeling\.py is not the one that it was made of"):
        again(tiny, fresh, source=other)
    shutil.rmtree(fresh)
    stages.export(other, fresh / "float")
    (other / "model.safetensors").unlink()
    shutil.copyfile(tiny.source / "model.safetensors", other / "model.safetensors")
    with pytest.raises(BismoothError, match=r"the source's file model\.safetensors is not the one that it was made of"):
        again(tiny, fresh, source=other)


def test_versions_and_damage(tiny: Tiny, output: Path) -> None:
    path = output / "float/bismooth.json"
    path.write_text(path.read_text().replace('"torch": "', '"torch": "0.'))
    with pytest.raises(BismoothError, match=r'version\.torch is "0\.'):
        again(tiny, output)
    path.write_text(path.read_text().replace('"torch": "0.', '"torch": "'))
    (output / "quantized/engines/null/model.engine").write_text("other")
    with pytest.raises(BismoothError, match=r"engines/null: .*model\.engine: expected \d+ bytes, got 5"):
        again(tiny, output)
    (output / STATISTICS).write_text("damaged")
    with pytest.raises(BismoothError, match=r"statistics\.safetensors: is there from an earlier run and"):
        again(tiny, output)
    shutil.rmtree(output / "float")
    (output / "float").mkdir()
    (output / "float/notes.txt").write_text("mine")
    with pytest.raises(BismoothError, match="not a bismooth artifact"):
        again(tiny, output)


def test_an_engine_that_was_allowed_to_fall_back(tiny: Tiny, output: Path) -> None:
    audit = output / "quantized/engines/null/model.audit.json"
    document = json.loads(audit.read_text())
    fallback = next(linear for linear in document["audit"]["linears"] if linear["meant_int8"])
    fallback["int8"] = False
    audit.write_text(json.dumps(document))
    manifest = output / "quantized/engines/null/bismooth.json"
    content = json.loads(manifest.read_text())
    content["files"]["model.audit.json"]["size"] = audit.stat().st_size
    manifest.write_text(json.dumps(content))
    with pytest.raises(BismoothError, match="1 linears run in float, and --allow-float is not given"):
        again(tiny, output)
    assert NULL in again(tiny, output, allow_float=True, thresholds={"int8_mac_share": None})


def test_statistics_without_the_histograms_that_a_recipe_needs(tiny: Tiny, output: Path) -> None:
    recipe = {"activations": {"granularity": "per_tensor", "range": "mse"}}
    with pytest.raises(BismoothError, match="it has no histograms, which the recipe needs"):
        again(tiny, output, recipe=Recipe.from_dict(recipe, name="mse"))


def test_force_makes_everything_anew(tiny: Tiny, output: Path) -> None:
    assert again(tiny, output, recipe="w8a8-per-channel", force=True) == ()
    assert Artifact.load(output / "quantized").manifest.stages[-1]["recipe"]["name"] == "w8a8-per-channel"


def test_what_was_kept_is_said(tiny: Tiny, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compile", tiny.source, "--engine", "null", "--data", "none", "-o", output / "plain"]
    assert main([str(word) for word in words]) == 0
    assert "kept none" in " ".join(capsys.readouterr().out.split())
    assert main([str(word) for word in words]) == 0
    shown = capsys.readouterr()
    assert "float, quantized, quantized/engines/null" in " ".join(shown.out.split())
    assert f"keep {output / 'plain/quantized'}\n" in shown.err
