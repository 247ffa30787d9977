"""The command line passes on what it is told, to stages that only record how they were called."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bismooth.engines.sampling import Sampling
from bismooth.export.errors import BismoothError
from bismooth.tools import cli, console
from tests.fake_stages import COMMANDS, USAGE, Stages, fake_stages, run


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    return fake_stages(monkeypatch)


def test_the_usage_of_the_documentation_works(stages: Stages) -> None:
    assert run("export SOURCE -o ART --dtype bfloat16 --opset 20") == 0
    assert (stages.positional, stages.named["dtype"], stages.named["opset"]) == (
        ("SOURCE", Path("ART")),
        "bfloat16",
        20,
    )
    assert run("calibrate ART --data a.txt b.jsonl:text --windows 4 --length 64") == 0
    assert (stages.positional, stages.named["windows"]) == ((Path("ART"), ("a.txt", "b.jsonl:text")), 4)
    assert run("quantize ART --recipe w8a16 -o ART2") == 0
    assert stages.positional == (Path("ART"), "w8a16", Path("ART2"))
    assert run("build ART2 --engine tensorrt-rtx --capability 86 8.9 sm120 --sequence 1:128:512 --batch 1") == 0
    assert stages.positional == (Path("ART2"), "tensorrt-rtx")
    assert stages.named["capabilities"] == (86, 89, 120)
    assert (stages.named["batch"], stages.named["sequence"]) == ((1, 1, 1), (1, 128, 512))
    assert run("build ART2 --engine null --dim rows=2 a=b=1:2:3") == 0
    assert stages.named["dims"] == {"rows": (2, 2, 2), "a=b": (1, 2, 3)}
    assert run("build ART2 --engine onnxruntime --split-blocks 3 --memory 8GB") == 0
    assert (stages.named["split_blocks"], stages.named["memory"]) == (3, 8 * 10**9)
    assert run("verify ART2 --data a.txt --hop folded int8 --gate kl=1e-4 kl_p99=.5 top1=none") == 0
    assert stages.named["hops"] == ("folded", "int8")
    assert stages.named["thresholds"] == {"kl": 1e-4, "kl_p99": 0.5, "top1": None}
    assert run("verify ART2 --data a.txt --windows 3 --skip-windows 2") == 0
    assert (stages.named["windows"], stages.named["skip_windows"]) == (3, 2)
    words = "--data a.txt b.txt --reference REF --windows 4 --skip-windows 1 -o r.json --html r.html"
    assert run(f"compare ART ART2 ART3 {words}") == 0
    assert stages.positional == ([Path("ART"), Path("ART2"), Path("ART3")], ("a.txt", "b.txt"))
    assert stages.named == {
        "reference": Path("REF"),
        "windows": 4,
        "skip_windows": 1,
        "length": 512,
        "memory": None,
        "output": Path("r.json"),
        "html": Path("r.html"),
    }
    assert run("inspect FILE.onnx") == 0
    assert stages.positional == (Path("FILE.onnx"),)
    assert run("compile SOURCE --recipe w8a8 --engine tensorrt-rtx onnxruntime --data a.txt -o DIR") == 0
    assert stages.positional == ("SOURCE", "w8a8", ("tensorrt-rtx", "onnxruntime"), ("a.txt",), Path("DIR"))


@pytest.mark.parametrize("line", ["calibrate ART --data a.txt", "quantize ART -o B", f"compile {USAGE['compile'][8:]}"])
def test_who_does_the_work_is_passed_on(stages: Stages, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 0
    assert stages.named["executor"] == "local"
    assert run(f"{line} --executor ray") == 0
    assert stages.named["executor"] == "ray"
    assert run(f"{line} --executor slurm") == 2
    assert "'slurm' is not one of 'local', 'ray'" in capsys.readouterr().err


def test_package_passes_its_options_on(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    stages.outcome = {"size_bytes": 1, "warnings": ["the licence is not known."]}
    assert run("package ART --engine onnxruntime rtx --licence mit -o BUNDLE --json") == 0
    assert stages.positional == (Path("ART"), Path("BUNDLE"))
    assert stages.named == {"engines": ("onnxruntime", "rtx"), "licence": "mit", "force": False}
    captured = capsys.readouterr()
    assert captured.err == "warning: the licence is not known.\n"
    assert json.loads(captured.out) == stages.outcome


@pytest.mark.parametrize(
    "line",
    [
        "calibrate ART --data a.txt",
        "quantize ART -o B",
        "build ART --engine null",
        "verify ART --data a.txt",
        "compare ART --data a.txt",
        f"compile {USAGE['compile'][8:]}",
    ],
)
def test_memory_is_passed_on(stages: Stages, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    for size, expected in (("8GB", 8 * 10**9), ("500MB", 5 * 10**8), ("7.5GiB", 15 << 29)):
        assert run(f"{line} --memory {size}") == 0
        assert stages.named["memory"] == expected
    for size in ("much", "0GB", "-1GB", "8XB", "8", "8B"):
        assert run(f"{line} --memory {size}") == 2
        assert f"--memory: Expected a size such as 8GB, 500MB or 7.5GiB, got '{size}'" in capsys.readouterr().err


def test_restart_is_passed_on(stages: Stages) -> None:
    for line in ("quantize art -o art2", "calibrate art --data a.txt", USAGE["compile"]):
        assert run(line) == 0
        assert stages.named["restart"] is False
        assert run(f"{line} --restart") == 0
        assert stages.named["restart"] is True


def test_what_is_kept_of_a_failed_run_is_said(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    stages.outcome = BismoothError("art: the disk is full.")
    stages.outcome.add_note("What was done is kept.")
    assert run("quantize art -o art2") == 2
    assert capsys.readouterr().err == "error: art: the disk is full. What was done is kept.\n"
    assert run("quantize art -o art2 --json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["message"] == "art: the disk is full. What was done is kept."


def test_cache_passes_its_options_on(stages: Stages) -> None:
    assert run("cache") == 0
    assert (stages.positional, stages.named) == (((),), {"clear": False})
    assert run("cache --clear art art2") == 0
    assert (stages.positional, stages.named) == (([Path("art"), Path("art2")],), {"clear": True})


README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def test_diagnose_passes_its_options_on(stages: Stages) -> None:
    assert cli.main(["diagnose", "model", "--statistics", "s.st", "--html", "page.html"]) == 0
    assert (stages.positional, stages.named) == (
        ("model",),
        {"statistics": Path("s.st"), "html": Path("page.html"), "trust_remote_code": False},
    )


def test_generate_passes_its_options_on(stages: Stages) -> None:
    options = {
        "system": "be brief",
        "sampling": Sampling(0.7, 40, 0.9, 0.05, 3),
        "max_new_tokens": 9,
        "stop": ("\n", "END"),
        "threads": 2,
    }
    line = "--max-new-tokens 9 --temperature 0.7 --top-k 40 --top-p 0.9 --min-p 0.05 --seed 3 --threads 2"
    words = [*line.split(), "--system", "be brief", "--stop", "\n", "END"]
    assert cli.main(["generate", "ENGINE", "--prompt", "one", "two", "--chat", *words]) == 0
    assert (stages.name, stages.positional) == ("generate", (Path("ENGINE"), ["one", "two"]))
    assert stages.named == options | {"chat": True, "write": console.write}
    assert cli.main(["generate", "ENGINE", "--interactive", *words]) == 0
    assert (stages.name, stages.positional[0], stages.named) == ("converse", Path("ENGINE"), options)
    assert run("generate ENGINE --prompt one --json") == 0
    assert stages.named["sampling"] == Sampling()
    assert (stages.named["chat"], stages.named["write"]) == (None, None)


def test_bench_passes_its_options_on(stages: Stages) -> None:
    sizes = "--batch 1 4 --prompt-length 128 512 --new-tokens 32 --repeat 9 --warm-up 2 --threads 3"
    assert run(f"bench A B {sizes} --one-at-a-time --data a.txt --gpu L4 T4 -o r.json --html r.html") == 0
    assert (stages.name, stages.positional) == ("bench", ([Path("A"), Path("B")],))
    assert stages.named == {
        "batch": [1, 4],
        "prompt_length": [128, 512],
        "new_tokens": 32,
        "repeat": 9,
        "warm_up": 2,
        "threads": 3,
        "one_at_a_time": True,
        "data": ["a.txt"],
        "gpus": ["L4", "T4"],
        "estimate": False,
        "output": Path("r.json"),
        "html": Path("r.html"),
    }
    assert run("bench A --estimate") == 0
    assert (stages.named["estimate"], stages.named["gpus"], stages.named["batch"]) == (True, [], [1])


@pytest.mark.parametrize("line", re.findall(rf"^bismooth ((?:{'|'.join(COMMANDS)}) .+)$", README, re.MULTILINE))
def test_the_commands_of_the_readme_are_understood(line: str, stages: Stages) -> None:
    assert run(line) == 0
    assert stages.name == line.split()[0]


def test_the_readme_shows_every_stage() -> None:
    assert not [command for command in COMMANDS if f"\nbismooth {command} " not in README]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_stage_can_be_json_and_quiet(command: str, stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{USAGE[command]} --json --quiet") == 0
    captured = capsys.readouterr()
    assert stages.name == command
    assert json.loads(captured.out) == {"size_bytes": 2_000_000}
    assert captured.err == ""
