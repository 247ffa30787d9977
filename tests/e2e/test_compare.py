"""Artifacts of a tiny model against one reference."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bismooth
from bismooth.export.errors import BismoothError
from bismooth.export.safetensors_file import read_header
from bismooth.passes.gates import Hop
from bismooth.tools import stages
from bismooth.tools.cli import main
from bismooth.tools.compared import CompareResult
from bismooth.tools.comparison import Values
from bismooth.tools.programs import Program, Programs
from bismooth.tools.shipped import find_engines
from tests.tiny import SIZES, Tiny, listing, make_tiny

WINDOWS: dict[str, Any] = {"windows": 3, "length": 24}


@dataclass(frozen=True)
class Made:
    """A tiny model, its float artifact, and two quantized ones."""

    tiny: Tiny
    float: Path
    w8a8: Path
    w8a16: Path

    @property
    def data(self) -> list[str]:
        return [str(self.tiny.text)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("compare")
    tiny = make_tiny(folder, num_hidden_layers=2)
    made = Made(tiny, folder / "float", folder / "w8a8", folder / "w8a16")
    stages.export(tiny.source, made.float)
    stages.quantize(made.float, "w8a8-per-channel", made.w8a8, data_free=True)
    stages.quantize(made.float, "w8a16", made.w8a16, data_free=True)
    return made


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``error(*words)``: the one message of a comparison that fails with status 2."""

    def fails(*words: object) -> str:
        capsys.readouterr()
        assert main(["compare", *map(str, words), "-q"]) == 2
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1
        return shown.err

    return fails


def other_model(folder: Path, **overrides: Any) -> Path:
    """The float artifact of another tiny model."""
    source = make_tiny(folder, num_hidden_layers=2, **overrides).source
    return stages.export(source, folder / "float").artifact


def values(result: CompareResult) -> list[dict[str, float]]:
    return [{name: figure.value for name, figure in item.figures.items()} for item in result.artifacts]


def test_the_figures_are_those_of_verify(made: Made, tmp_path: Path) -> None:
    before = listing(made.w8a8)
    result = bismooth.compare([made.w8a8, made.w8a16], made.data, **WINDOWS)
    assert listing(made.w8a8) == before
    for artifact, found in zip((made.w8a8, made.w8a16), values(result), strict=True):
        verified = stages.verify(artifact, made.data, **WINDOWS, hops=[Hop.REFERENCE], output=tmp_path / "v.json")
        metrics = verified.hops[0].metrics
        assert found == {name: metrics[name] for name in found}
        assert result.reference_perplexity == metrics["reference_perplexity"]
        assert found["kl"] > 0
    assert len(values(result)[0]) == 6
    for item in result.artifacts:
        for name, figure in item.figures.items():
            assert figure.interval is not None
            assert figure.interval.low <= figure.value <= figure.interval.high, name
    first, second = result.artifacts
    assert not first.differences
    for name, item in second.differences.items():
        assert item.value == second.figures[name].value - first.figures[name].value
    assert set(second.differences) == {"kl", "log_perplexity", "top1"}
    assert second.differences["kl"].excludes_0
    assert (first.recipe, second.recipe) == ("w8a8-per-channel", "w8a16")
    assert first.weights_bytes == (made.w8a8 / "quantized.safetensors").stat().st_size


def test_one_artifact_under_two_names_differs_by_exactly_nothing(made: Made, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made.w8a8, tmp_path / "copy"))
    _, second = bismooth.compare([made.w8a8, copy], made.data, reference=made.float, **WINDOWS).artifacts
    for item in second.differences.values():
        assert item.to_json() == {"value": 0, "low": 0, "high": 0}
        assert item.excludes_0 is False


def test_a_float_artifact_is_its_own_reference(made: Made) -> None:
    result = bismooth.compare([made.float, made.w8a16], made.data, **WINDOWS)
    itself, other = values(result)
    assert (itself["kl"], itself["top1"], itself["perplexity_ratio"]) == (0, 1, 1)
    assert (result.artifacts[0].recipe, result.artifacts[0].weights_bytes) == (None, None)
    (alone,) = values(bismooth.compare([made.w8a16], made.data, **WINDOWS))
    assert other == pytest.approx(alone, rel=1e-4, abs=1e-9)


def test_the_report(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = Path(shutil.copytree(made.w8a8, tmp_path / "art"))
    engine = stages.build(artifact, "null").folder
    files = ("-o", tmp_path / "report.json", "--html", tmp_path / "report.html")
    words = ("compare", artifact, made.w8a16, "--data", *made.data, *SIZES, *files)
    assert main([*map(str, words), "--json", "-q"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    first, second = report["artifacts"]
    (row,) = first["engines"]
    assert (row["engine"], row["int8_linears"], row["int8_mac_share"]) == (str(engine), 14, 1)
    assert row["build_seconds"] == find_engines(bismooth.Artifact.load(artifact))[0][0].build_seconds
    assert isinstance(row["build_seconds"], float)
    assert second["engines"] == []
    assert second["differences"]["kl"]["excludes_0"] is True
    assert report["notes"] == ["Confidence intervals of 3 windows are rough. Ask for 8 or more --windows."]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert f"<title>Artifacts against the float graph of {artifact}</title>" in page
    assert "Differences from the first" in page
    assert main([*map(str, words), "-q"]) == 0, "reports are replaced"
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("w8a8-per-channel", "log_perplexity", "null", "excludes 0", "yes"))


def test_damaged_engines_are_notes(made: Made, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(made.w8a8, tmp_path / "art"))
    (stages.build(artifact, "null").folder / "model.engine").unlink()
    audit = stages.build(artifact, "onnxruntime").folder / "model.audit.json"
    edit(audit, '"linears"', '"lineals"')
    result = bismooth.compare([artifact], made.data, **WINDOWS)
    assert result.artifacts[0].engines == ()
    *_, missing, unreadable = result.notes
    assert "the manifest lists this file, but it is missing" in missing
    assert unreadable == f"{audit}: not an audit file: 'linears'. Build the engine again."


def test_one_window_gives_no_intervals(made: Made) -> None:
    result = bismooth.compare([made.w8a8, made.w8a16], made.data, windows=1, length=24, skip_windows=2)
    figure, difference = result.artifacts[0].figures["kl"], result.artifacts[1].differences["kl"]
    assert figure.to_json() == {"value": figure.value, "low": None, "high": None}
    assert difference.excludes_0 is None
    assert result.notes == ("One window gives no confidence intervals. Ask for more --windows.",)
    assert "…" not in str(result.brief())


def test_other_windows_give_other_figures(made: Made) -> None:
    first, second = (
        bismooth.compare([made.w8a8], made.data, windows=2, length=24, skip_windows=skip) for skip in (0, 1)
    )
    assert values(first) != values(second)
    assert first.data["data_sha256"] != second.data["data_sha256"]


def test_other_weights_than_the_reference(made: Made, tmp_path: Path) -> None:
    other = other_model(tmp_path / "other", seed=1)
    result = bismooth.compare([other, made.w8a8], made.data, reference=made.float, windows=8, length=24)
    far, near = values(result)
    assert far["kl"] > 10 * near["kl"]
    source = tmp_path / "other/source"
    assert result.notes == (f"{other}: was made from {source}, the reference from {made.tiny.source}.",)
    assert result.reference == made.float


def test_a_source_that_changed(made: Made, tmp_path: Path) -> None:
    source = Path(shutil.copytree(made.tiny.source, tmp_path / "source"))
    old = stages.export(source, tmp_path / "old", copy_weights=True).artifact
    (source / "model.safetensors").touch()
    new = stages.export(source, tmp_path / "new").artifact
    result = bismooth.compare([old, new], made.data, windows=8, length=24)
    assert result.notes == (f"{new}: was made from {source} as it was at another time than for the reference.",)


def test_an_artifact_without_numbers_is_a_note(made: Made, tmp_path: Path, error: Callable[..., str]) -> None:
    broken = break_weights(made, tmp_path / "broken")
    result = bismooth.compare([broken, made.w8a8], made.data, reference=made.float, **WINDOWS)
    assert result.artifacts[0].figures == {}
    assert result.artifacts[1].figures["kl"].value > 0
    assert result.artifacts[1].differences == {}
    assert f"{broken}: metrics: the logits of the candidate hold NaN or infinity" in "\n".join(result.notes)
    message = error(broken, made.w8a8, "--data", *made.data, *SIZES)
    assert f"{broken}/model.onnx: the outputs of the reference hold NaN or infinity. Expected finite" in message


def break_weights(made: Made, folder: Path) -> Path:
    """The float artifact of the same model with NaN in its last norm."""
    source = Path(shutil.copytree(made.tiny.source, folder / "source"))
    file = source / "model.safetensors"
    entry = read_header(file)["model.norm.weight"]
    data = bytearray(file.read_bytes())
    data[entry.offset : entry.offset + 4] = np.float32(np.nan).tobytes()
    file.write_bytes(data)
    return stages.export(source, folder / "float").artifact


def test_an_encoder_is_compared_by_its_features(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, "bert", num_hidden_layers=2)
    stages.export(tiny.source, tmp_path / "float")
    for name in ("w8a8-per-channel", "w8a16"):
        stages.quantize(tmp_path / "float", name, tmp_path / name, data_free=True)
    paths = [tmp_path / name for name in ("float", "w8a8-per-channel", "w8a16")]
    result = bismooth.compare(paths, [str(tiny.text)], windows=8, length=24)
    itself, integer, weights = result.artifacts
    assert result.reference_perplexity is None
    assert itself.figures["sqnr_db"].value == np.inf
    assert 20 < integer.figures["sqnr_db"].value < weights.figures["sqnr_db"].value
    assert set(integer.figures) == set(integer.differences) == {"cosine_p5", "sqnr_db"}
    assert json.dumps(result.brief())


def test_what_cannot_be_compared(made: Made, tmp_path: Path, error: Callable[..., str]) -> None:
    data = ("--data", *made.data, *SIZES)
    same = made.w8a8 / "../w8a8"
    assert f"{same}: is given twice, as {made.w8a8} before. Expected each artifact once." in error(
        made.w8a8, same, *data
    )
    assert "Missing argument 'ART'" in error(*data)
    assert "expected a float or quantized artifact, got an engine one" in error(
        made.w8a8, stages.build(made.w8a8, "null", output=tmp_path / "engine").folder, *data
    )
    other_version = Path(shutil.copytree(made.w8a8, tmp_path / "old"))
    edit(other_version / "bismooth.json", '"int8"', '"int0"')
    assert f"{other_version}: was quantized by another version of bismooth" in error(made.w8a8, other_version, *data)
    assert "--length 512: the model has 96 positions" in error(made.w8a8, *data[:2])
    assert "too little text" in error(made.w8a8, *data[:2], "--windows", 900, "--length", 24)
    (tmp_path / "notes.json").write_text("{}")
    message = error(made.w8a8, *data, "-o", tmp_path / "notes.json")
    assert "exists and is not a report of 'bismooth compare', so it is not replaced." in message
    message = error(made.w8a8, *data, "--html", tmp_path / "notes.json")
    assert "exists and is not a page of bismooth, so it is not replaced." in message
    same = tmp_path / "same"
    message = error(made.w8a8, *data, "-o", same, "--html", same)
    assert "is the file that -o writes. Expected another one." in message
    assert not same.exists()
    assert (tmp_path / "notes.json").read_text() == "{}"
    with pytest.raises(bismooth.BismoothError, match=r"compare: Expected one or more artifacts, got none\."):
        bismooth.compare([], made.data)


def test_other_tokens(made: Made, tmp_path: Path, error: Callable[..., str]) -> None:
    data = ("--data", *made.data, *SIZES)
    vocabulary, splits = (stages.export(made.tiny.source, tmp_path / name).artifact for name in "ab")
    edit(vocabulary / "tokenizer.json", '"w95"', '"x95"')
    assert f"{vocabulary}: its tokenizer has another vocabulary than that of the reference {made.w8a8}." in error(
        made.w8a8, vocabulary, *data
    )
    edit(splits / "tokenizer.json", '"WhitespaceSplit"', '"Whitespace"     ')
    assert values(bismooth.compare([made.w8a8, splits], made.data, **WINDOWS)), "both make the same tokens of this text"
    (tmp_path / "text.txt").write_text("w3.w4 " * 100)
    message = error(made.w8a8, splits, "--data", tmp_path / "text.txt", *SIZES)
    assert f"{splits}: its tokenizer makes other tokens of the text than that of the reference {made.w8a8}." in message
    wide = other_model(tmp_path / "wide", vocab_size=104)
    message = error(made.w8a8, wide, *data)
    assert (
        f"{wide}: its graph gives 104 values per token, that of the reference {made.w8a8} 96. Expected the" in message
    )


def edit(file: Path, old: str, new: str) -> None:
    """Replace text by text of the same length, in a file of its own."""
    text = file.read_text()
    assert old in text
    file.unlink()
    file.write_text(text.replace(old, new.ljust(len(old))))


def test_too_little_memory_is_said_before_anything_runs(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """All artifacts are looked at, and the budget that is named is enough."""
    ran: list[Path] = []
    outputs = Programs.outputs

    def noted(self: Programs, program: Program, step: str) -> Iterator[Values]:
        ran.append(program.path.parent)
        return outputs(self, program, step)

    monkeypatch.setattr(Programs, "outputs", noted)
    artifacts = [made.float, made.w8a8]
    message = rf"^{made.float}: --memory is too small .* Expected (\d+)MB or more, or a shorter --length\."
    with pytest.raises(BismoothError, match=message) as raised:
        bismooth.compare(artifacts, made.data, memory=10**6, **WINDOWS)
    assert ran == []
    found = re.findall(r"Expected (\d+)MB", str(raised.value))
    bismooth.compare(artifacts, made.data, memory=int(found[0]) * 10**6, **WINDOWS)
    assert ran == [made.float, made.float, made.w8a8]
