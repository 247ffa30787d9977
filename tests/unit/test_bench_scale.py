"""The bench by size: which steps run, what is kept of one that broke off, what is held against the limits."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bismooth.export.errors import BismoothError
from bismooth.tools import bench_scale
from bismooth.tools.bench_scale import ScaleBench, main
from bismooth.tools.bench_scale_report import ScaleResult
from bismooth.tools.bench_scale_rows import LARGE, STEPS, STREAMED, WHOLE, Row, Rows
from bismooth.tools.bench_steps import Runner, Step
from bismooth.tools.large_model import LLAMA3_70B, Shape

SHAPE = Shape(blocks=1, hidden=16, intermediate=32, heads=2, kv_heads=1, head=8, vocabulary=64)
ALL = (*STEPS, "small", "targets")
WRITTEN = 5000


class Stages(Runner):
    """Writes files as the stages do, and runs other processes; ``broken`` is the step that fails."""

    def __init__(self, broken: str = "", refusal: str = "--memory is too small. Expected 8267MB or more.") -> None:
        super().__init__()
        self.broken, self.refusal = broken, refusal
        self.commands: list[list[str]] = []

    @property
    def names(self) -> list[str]:
        return [step.name for step in self.steps]

    def bismooth(self, *arguments: str | Path, label: str = "") -> Step:
        words = [str(word) for word in arguments]
        if label == self.broken:
            raise BismoothError(f"{label}: ended with status 70")
        self.commands.append(words)
        output: dict[str, Any] = {}
        match words[0]:
            case "export":
                target = self._target(words)
                target.mkdir()
                (target / "tokenizer.json").write_text("{}")
                model = Path(words[1]) / "model.safetensors"
                if model.is_file():
                    (target / "model.safetensors").hardlink_to(model)
            case "calibrate" if "1MB" in words and self.refusal:
                raise BismoothError(f"{label}: ended with status 2: {self.refusal}")
            case "calibrate":
                target = self._target(words) if "-o" in words else Path(words[1]) / "statistics.safetensors"
                target.write_bytes(b"s" * 100)
            case "quantize":
                calibrated = Path(words[1], "statistics.safetensors").is_file()
                assert calibrated or "--statistics" in words or "w8a8-per-channel" in words
                self._target(words).mkdir(exist_ok=True)
                (self._target(words) / "quantized.safetensors").write_bytes(b"q" * WRITTEN)
            case "verify":
                assert Path(words[1], "quantized.safetensors").is_file()
                kl = 0.02 + (0.00009 if "700MB" in words else 0)
                reference = {"kl": kl, "top1": 0.9, "perplexity_ratio": 1.01}
                output = {
                    "hops": [
                        {"hop": "reference", "metrics": reference},
                        {"hop": "int8", "metrics": {"float_kl": kl}},
                    ]
                }
            case _:
                assert words[0] == "diagnose"
        step = Step(label, output, 1.0 + len(self.steps), 600_000_000)
        self.steps.append(step)
        return step

    @staticmethod
    def _target(words: Sequence[str]) -> Path:
        return Path(words[words.index("-o") + 1])


def bench(
    folder: Path, runner: Stages, blocks: Sequence[int] = (1,), steps: Sequence[str] = ALL, memory: str | None = "6GB"
) -> ScaleResult:
    rows = Rows(folder / "unfinished.json", {"memory": memory})
    made = ScaleBench(folder, rows, ["c.txt"], ["e.txt"], memory, SHAPE, runner)
    return made.run("smollm2", blocks, steps)


def test_all_steps_of_two_sizes(tmp_path: Path) -> None:
    runner = Stages()
    result = bench(tmp_path, runner, [1, 2])
    kept = [*STEPS, "cp", "cat", "cat both"]
    short = ("export", "diagnose", "convert", "quantize", "cp")
    large = [name for name in kept for _ in range(3 if name in short else 1)]
    small = [f"{model}: {step}" for model in (WHOLE, STREAMED) for step in ("calibrate", "quantize", "verify")]
    sizes = [f"{blocks} blocks: {step}" for blocks in (1, 2) for step in large]
    targets = ["LLaMA3-70B: export", "LLaMA3-405B: export"]
    assert runner.names == ["SmolLM2-135M: export", *sizes, *small, *targets]
    assert [(row.model, row.blocks, row.step) for row in result.rows if row.model == LARGE] == [
        (LARGE, blocks, step) for blocks in (1, 2) for step in kept
    ]
    written = {
        step: row.written_bytes for step in ("export", "calibrate", "quantize") for row in result.of(step).values()
    }
    assert written == {"export": 2, "calibrate": 100, "quantize": WRITTEN}, "links are not counted"
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished.json"], "models and artifacts are deleted"


def test_the_stages_commands(tmp_path: Path) -> None:
    runner = Stages()
    bench(tmp_path, runner)
    commands = [" ".join(re.sub(r".*/", "", word) for word in words) for words in runner.commands]
    few, many = (f"--windows {count} --length 128 --memory 6GB" for count in (4, 16))
    assert commands == [
        "export smollm2 -o float",
        *["export model -o float"] * 3,
        f"calibrate float --data c.txt {few}",
        f"calibrate float --data c.txt {many} -o more.safetensors",
        *["diagnose float"] * 3,
        *["quantize float -o quantized --recipe w8a8-per-channel --memory 6GB"] * 3,
        *["quantize float -o quantized --recipe w8a8 --memory 6GB"] * 3,
        f"verify quantized --data e.txt {few}",
        f"verify quantized --data e.txt {many}",
        *(
            command
            for memory in ("", " --memory 700MB")
            for command in (
                f"calibrate float --data c.txt -o statistics.safetensors{memory}",
                f"quantize float -o w8a8 --force --statistics statistics.safetensors{memory}",
                f"verify w8a8 --data e.txt --windows 4{memory}",
            )
        ),
        *("export model -o float", "calibrate float --data c.txt --windows 4 --length 128 --memory 1MB") * 2,
    ]


def test_without_a_budget_no_command_has_one(tmp_path: Path) -> None:
    runner = Stages()
    bench(tmp_path, runner, steps=["quantize", "verify"], memory=None)
    assert not any("--memory" in words for words in runner.commands)


def test_steps_run_with_those_whose_files_they_read(tmp_path: Path) -> None:
    runner = Stages()
    result = bench(tmp_path, runner, steps=["verify"])
    steps = ["export", "calibrate", "quantize", "verify", "cp", "cat both"]
    ran = [*["export"] * 3, "calibrate", *["quantize"] * 3, "verify", *["cp"] * 3, "cat both"]
    assert runner.names == ["SmolLM2-135M: export", *(f"1 blocks: {step}" for step in ran)]
    assert [row.step for row in result.rows] == steps


def test_of_three_rounds_the_median_time_and_the_largest_peak_count(tmp_path: Path) -> None:
    class Uneven(Stages):
        def bismooth(self, *arguments: str | Path, label: str = "") -> Step:
            step = super().bismooth(*arguments, label=label)
            seconds, peak = {5: (9.0, 2), 6: (2.0, 7), 7: (5.0, 3)}.get(len(self.steps), (1.0, 1))
            return replace(step, seconds=seconds, peak_bytes=peak)

    runner = Uneven()
    (convert,) = bench(tmp_path, runner, steps=["convert"]).of("convert").values()
    assert runner.names[4:8] == ["1 blocks: convert"] * 3 + ["1 blocks: cp"]
    assert (convert.seconds, convert.peak_bytes, convert.written_bytes) == (5.0, 7, WRITTEN)


def test_models_of_forecasts_say_what_memory_they_take(tmp_path: Path) -> None:
    result = bench(tmp_path, Stages(), steps=["targets"])
    rows = {(row.model, row.blocks, row.step): row.figures for row in result.rows}
    least = {"least_memory_bytes": 8_267_000_000}
    assert rows == {("LLaMA3-70B", 80, "export"): least, ("LLaMA3-405B", 126, "export"): least}
    assert bench(tmp_path, again := Stages(), steps=["targets"]) == result
    assert again.names == ["SmolLM2-135M: export"]


def test_a_model_that_needs_next_to_nothing(tmp_path: Path) -> None:
    result = bench(tmp_path, Stages(refusal=""), steps=["targets"])
    assert {row.figures["least_memory_bytes"] for row in result.rows} == {10**6}


def test_another_refusal_is_one_of_the_bench(tmp_path: Path) -> None:
    message = r"^LLaMA3-70B: least memory: ended with status 2: out of luck\.$"
    with pytest.raises(BismoothError, match=message):
        bench(tmp_path, Stages(refusal="out of luck."), steps=["targets"])
    assert list(tmp_path.iterdir()) == []


def test_a_bench_that_broke_off_goes_on(tmp_path: Path) -> None:
    first = Stages(broken="2 blocks: diagnose")
    with pytest.raises(BismoothError, match=r"^2 blocks: diagnose: ended"):
        bench(tmp_path, first, [1, 2])
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished.json"]
    second = Stages()
    kept = Rows(tmp_path / "unfinished.json", {"memory": "6GB"})
    result = bench(tmp_path, second, [1, 2])
    assert all(row in result.rows for row in kept), "what is finished is not measured anew"
    thrice = [step for step in ("diagnose", "convert", "quantize") for _ in range(3)]
    again = ("export", "calibrate", *thrice, "verify", "verify more", *["cp"] * 3, "cat", "cat both")
    large = [name for name in second.names if "blocks" in name]
    assert large == [f"2 blocks: {step}" for step in again], "what is finished runs where its files are needed alone"
    assert {(row.blocks, row.step) for row in result.rows if row.model == LARGE} == {
        (blocks, step) for blocks in (1, 2) for step in (*STEPS, "cp", "cat", "cat both")
    }
    assert bench(tmp_path, third := Stages(), [1, 2]) == result
    assert third.names == ["SmolLM2-135M: export"]


def test_the_baselines_move_the_bytes(tmp_path: Path) -> None:
    files: dict[str, int] = {}

    class Watched(Stages):
        def process(self, name: str, command: Sequence[str]) -> Step:
            step = super().process(name, command)
            model, copy = (Path(word) for word in command[4:6])
            files[name] = copy.stat().st_size
            assert copy.read_bytes() == model.read_bytes()[:WRITTEN]
            assert not (copy.parent / "quantized").exists(), "its space is needed"
            return step

    bench(tmp_path, Watched())
    assert files == {f"1 blocks: {step}": WRITTEN for step in ("cp", "cat", "cat both")}


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(_path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=29_700_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    made = ScaleBench(tmp_path, Rows(tmp_path / "rows", {}), [], [], None, LLAMA3_70B, runner := Stages())
    message = (
        f"{tmp_path}: 8 blocks take 29.9 GB of disk, 29.7 are free. "
        "Free some, or choose another --output or fewer --blocks."
    )
    with pytest.raises(BismoothError, match=f"^{re.escape(message)}$"):
        made.run("smollm2", [8], ["export"])
    assert runner.names == ["SmolLM2-135M: export"]


def test_rows_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    Rows(path, {"memory": "6GB"}).add(Row(LARGE, 2, "export", 1.0, 2))
    had = f"{path}: an unfinished bench had the memory 6GB, this one has 8GB."
    message = f"{had} Finish that one, or discard it with --restart."
    with pytest.raises(BismoothError, match=f"^{re.escape(message)}$"):
        Rows(path, {"memory": "8GB"})
    assert [*Rows(path, {"memory": "8GB"}, restart=True)] == []
    kept = Rows(path, {"memory": "6GB"})
    assert [*kept] == [Row(LARGE, 2, "export", 1.0, 2)]
    kept.finish()
    assert not path.exists()


def test_files_are_out_of_the_page_cache_before_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cold: list[list[str]] = []
    drop = bench_scale._drop_cache  # pyright: ignore[reportPrivateUsage]

    def watched(folder: Path) -> None:
        cold.append(sorted(path.name for path in folder.rglob("*.safetensors")))
        drop(folder)

    monkeypatch.setattr(bench_scale, "_drop_cache", watched)
    bench(tmp_path, Stages(), steps=["quantize"])
    model = ["model.safetensors"]
    assert cold[:5] == [*[model] * 3, model * 2, [*model * 2, "statistics.safetensors"]]


class Finished:
    """In the place of the measurements."""

    def __init__(self, rows: Mapping[str, Any]) -> None:
        self.rows = rows

    def __call__(self, output: Path, rows: Rows, *_arguments: object) -> Finished:
        rows.add(Row(LARGE, 2, "export", 1.0, 10**9))
        self.kept, self.settings = output / "unfinished.json", rows.settings
        assert self.kept.is_file()
        return self

    def run(self, _model: str, _blocks: Sequence[int], _steps: Sequence[str]) -> ScaleResult:
        rows = (Row(LARGE, 2, "export", 1.0, **self.rows),)
        return ScaleResult(rows, LLAMA3_70B, {"processor": "p", "cores": 2, "memory_bytes": 24e9}, self.settings)


@pytest.mark.parametrize(("peak", "status"), [(6_000_000_000, 0), (6_100_000_000, 1)])
def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], peak: int, status: int
) -> None:
    finished = Finished({"peak_bytes": peak})
    monkeypatch.setattr(bench_scale, "ScaleBench", finished)
    output = tmp_path / "out"
    words = ("--output", str(output), "--calibration", "c", "--evaluation", "e")
    assert main(words) == status
    printed = capsys.readouterr().out
    assert printed == (output / "scale.md").read_text("utf-8")
    assert ("**Does not hold.** export: peak memory is 6.10 GB" in printed) == bool(status)
    document = json.loads((output / "scale.json").read_text("utf-8"))
    assert (document["format"], document["version"], len(document["failures"])) == ("bismooth-scale", 1, status)
    assert document["settings"] == {"memory": "4GB", "calibration": ["c"], "evaluation": ["e"]}
    assert not finished.kept.exists(), "the next bench measures all anew"


def test_bad_input_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path), "--calibration", "c"]) == 2
    assert "expected both --calibration and --evaluation" in capsys.readouterr().err
    assert main(["--output", str(tmp_path / "new"), "--memory", "8"]) == 2
    assert "--memory: Expected a size such as 8GB, 500MB or 7.5GiB, got '8'." in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        main(["--steps", "fly"])
    assert "invalid choice: 'fly'" in capsys.readouterr().err
