"""The command line, with stages that only record how they were called."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import bismooth.tools
from bismooth.engines.sampling import Sampling
from bismooth.export.errors import BismoothError, GateError
from bismooth.passes.recipe import Recipe
from bismooth.tools import cli, console

COMMANDS = [
    "export",
    "calibrate",
    "quantize",
    "build",
    "verify",
    "compare",
    "inspect",
    "compile",
    "diagnose",
    "standin",
    "generate",
    "bench",
    "package",
    "cache",
]
INTERRUPTED = (
    "Interrupted. Nothing is half-written. Run the command again; 'compile', 'calibrate', 'quantize' and 'verify' go "
    "on from here"
)
USAGE = {
    "export": "export model -o art",
    "calibrate": "calibrate art --data a.txt",
    "quantize": "quantize art -o art2",
    "build": "build art --engine onnxruntime",
    "verify": "verify art --data a.txt",
    "compare": "compare art art2 --data a.txt",
    "inspect": "inspect art",
    "diagnose": "diagnose model",
    "standin": "standin model -o bad",
    "generate": "generate engine --prompt text",
    "bench": "bench engine --gpu L4",
    "package": "package art -o bundle",
    "cache": "cache --clear art",
    "compile": "compile model --engine onnxruntime --data a.txt -o art",
}


@dataclass(frozen=True)
class Done:
    document: Mapping[str, Any]
    interrupted: bool = False

    def to_json(self) -> Mapping[str, Any]:
        return self.document


@dataclass
class Stages:
    """Stands in for the modules of ``bismooth.tools`` that the commands call."""

    outcome: Mapping[str, Any] | BaseException = field(default_factory=lambda: {"size_bytes": 2_000_000})
    name: str = ""
    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict[str, Any])

    def __getattr__(self, name: str) -> Any:
        def stage(*positional: Any, **named: Any) -> Done:
            self.name, self.positional, self.named = name, positional, named
            if isinstance(self.outcome, BaseException):
                raise self.outcome
            return Done(self.outcome)

        return stage


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    fake = Stages()
    names = (
        "stages",
        "pipeline",
        "compare",
        "diagnose",
        "standin",
        "generate",
        "chat",
        "bench_engines",
        "package",
        "cache",
    )
    for module in names:
        monkeypatch.setitem(sys.modules, f"bismooth.tools.{module}", fake)
        monkeypatch.setattr(bismooth.tools, module, fake, raising=False)
    return fake


def run(line: str) -> int:
    return cli.main(line.split())


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


def test_results_are_tables(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect art") == 0
    assert capsys.readouterr().out.split() == ["size", "bytes", "2.0", "MB"]


def test_no_calibration_data_is_said_in_words(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("quantize art -o art2 --data none") == 0
    assert stages.named["data_free"] is True
    assert run("quantize art -o art2") == 0
    assert stages.named["data_free"] is False
    assert run("compile model --engine null --data none -o art") == 0
    assert stages.positional[3] == ()
    assert run("compile model --engine null --data none --verify-data a.txt --verify-windows 3 -o art") == 0
    assert run("compile model --engine null --data a.txt none -o art") == 2
    assert "--data: Expected 'none' alone, got a.txt none." in capsys.readouterr().err
    assert run("quantize art -o art2 --data a.txt") == 2
    assert "Expected 'none', got 'a.txt'. Text goes to 'bismooth calibrate'." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("exprot model", "No such command 'exprot'. Did you mean 'export'? See 'bismooth --help'."),
        ("export model", "Missing option '--output' / '-o'. See 'bismooth export --help'."),
        ("build art", "Missing option '--engine'. Choose from: tensorrt-rtx, tensorrt, onnxruntime, null. See"),
        ("export -o art", "Missing argument 'SOURCE'. See 'bismooth export --help'."),
        ("verify --data a.txt b.txt", "Missing argument 'ART'. See 'bismooth verify --help'."),
        ("inspect art --jason", "No such option: --jason"),
        ("calibrate art --data a --windows 0", "Invalid value for '--windows'"),
        (
            "build art --engine tensort",
            "Invalid value for '--engine': 'tensort' is not one of 'tensorrt-rtx', 'tensorrt',",
        ),
        (
            "build art --engine null --capability 8x",
            "--capability: Expected a compute capability such as 86, 8.6 or sm86, got '8x'.",
        ),
        (
            "build art --engine null --batch 4:2:8",
            "--batch: Expected MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX, or one size, got '4:2:8'.",
        ),
        ("build art --engine null --dim rows", "--dim: Expected MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX"),
        ("build art --engine null --dim =1", "--dim: Expected NAME=MIN:OPT:MAX, got '=1'."),
        ("standin model -o bad --blocks 0,,1", "--blocks: Expected numbers with commas between them, such as 0,1,3"),
        (
            "standin model -o bad --kind turn",
            "Invalid value for '--kind': 'turn' is not one of 'scale', 'rotate'",
        ),
        ("build art --engine null --dim rows=1 rows=2", "--dim: rows has sizes twice. Expected them once."),
        ("calibrate art --data none", "--data none: Expected text. To quantize without: 'bismooth quantize ART"),
        (
            "generate engine",
            "--prompt: Expected one or more texts, of which one may be '-' for stdin, or --interactive",
        ),
        ("generate engine --prompt - a -", "--prompt: Expected one or more texts, of which one may be '-' for stdin"),
        (
            "generate engine --prompt a --top-p 0.9",
            "--top-p: has no effect: without --temperature the likeliest tokens are taken. Leave it out.",
        ),
        ("generate engine --prompt a --seed 1", "--seed: has no effect: without --temperature"),
        ("generate engine --prompt a --temperature 1 --top-p 0", "sampling: top_p is 0.0. Expected more than 0"),
        (
            "generate engine --prompt a --no-chat --system b",
            "--system: has no effect: with --no-chat there are no messages. Leave it out.",
        ),
        (
            "generate engine --interactive --prompt a",
            "--prompt: has no effect: --interactive answers line after line. Leave it out.",
        ),
        ("generate engine --interactive --no-chat", "--no-chat: has no effect: --interactive answers"),
        ("verify art --data none", "--data none: Expected text. Programs are compared by what they compute on it."),
        (
            "compare art art2 --data none",
            "--data none: Expected text. Artifacts are compared by what they compute on it.",
        ),
        ("compare --data a.txt", "Missing argument 'ART'. See 'bismooth compare --help'."),
        ("compare art --data a.txt --windows 0", "Invalid value for '--windows'"),
        (
            "compile model --engine null -o art --data none --rows 5",
            "--rows: has no effect: --data none calibrates on no text. Leave it out.",
        ),
        (
            "compile model --engine null -o art --data none --verify-data a.txt --seed 5",
            "--seed: has no effect: --data",
        ),
        (
            "compile model --engine null -o art --data none --verify-windows 5",
            "--verify-windows: has no effect: --data none without --verify-data verifies nothing. Leave it out.",
        ),
        ("build art --engine null --sequence 0", "--sequence: Expected MIN:OPT:MAX"),
        ("build art --engine null --sequence 1:2", "--sequence: Expected MIN:OPT:MAX"),
        ("build art --engine null --sequence 1:x:3", "--sequence: Expected MIN:OPT:MAX"),
        ("verify art --data a --gate top_1=1", "gates: There is no gate 'top_1'. Did you mean 'top1'?"),
        ("verify art --data a --gate kl=nan", "--gate: Expected NAME=LIMIT with a number or 'none', got 'kl=nan'."),
        ("verify art --data a --gate kl=-1", "--gate: Expected NAME=LIMIT"),
        ("verify art --data a --gate kl", "--gate: Expected NAME=LIMIT with a number or 'none', got 'kl'."),
        ("recipes w8a9", "recipe: 'w8a9' is no file and no built-in recipe. Did you mean 'w8a8'?"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    line: str, message: str, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert stages.name == ""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (GateError("audit: 3 linears run in float."), 1, "audit: 3 linears run in float."),
        (BismoothError("art: not an artifact."), 2, "art: not an artifact."),
        (
            ModuleNotFoundError("No module named 'onnx_graphsurgeon'", name="onnx_graphsurgeon"),
            2,
            "The module 'onnx_graphsurgeon' is not installed. Run: pip install \"bismooth[compile]\"",
        ),
        (
            ModuleNotFoundError("No module named 'tensorrt_rtx.x'", name="tensorrt_rtx.x"),
            2,
            "The module 'tensorrt_rtx' is not installed. Run: pip install \"bismooth[tensorrt-rtx]\"",
        ),
        (PermissionError(13, "Permission denied", "/art"), 2, "/art: Permission denied."),
        (OSError(28, "No space left on device"), 2, "No space left on device."),
        (
            KeyboardInterrupt(),
            130,
            f"{INTERRUPTED}.",
        ),
        (
            ValueError("two\nlines"),
            70,
            "Internal error, please report it: ValueError: two lines (rerun with BISMOOTH_TRACEBACK=1 for a traceback)",
        ),
        (
            ModuleNotFoundError("No module named 'zzz'", name="zzz"),
            70,
            "Internal error, please report it: ModuleNotFoundError: No module named 'zzz' (rerun with",
        ),
    ],
)
def test_a_failed_stage_is_one_line_and_its_status(
    error: BaseException, status: int, message: str, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.outcome = error
    assert run("inspect art") == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(f"error: {re.escape(message)}.*\n", captured.err)

    assert run("inspect art --json") == status
    captured = capsys.readouterr()
    document = json.loads(captured.out)["error"]
    assert document["status"] == status
    assert document["message"].startswith(message)
    assert captured.err == ""


def test_json_has_no_effect_on_a_chat(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate engine --interactive --json") == 2
    message = json.loads(capsys.readouterr().out)["error"]["message"]
    assert message == "--json: has no effect: --interactive answers line after line. Leave it out."
    assert stages.name == ""


def test_a_traceback_is_shown_on_request(
    stages: Stages, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages.outcome = ValueError("broken")
    monkeypatch.setenv("BISMOOTH_TRACEBACK", "1")
    assert run("inspect art") == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_missed_gates_are_shown_and_give_status_1(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    stages.outcome = {"kl": 0.5, "failures": ["reference: kl is 0.5. Expected at most 0.02."]}
    assert run("verify art --data a.txt") == 1
    assert "missed  reference: kl is 0.5. Expected at most 0.02." in capsys.readouterr().out
    assert run("verify art --data a.txt --json") == 1
    assert json.loads(capsys.readouterr().out) == stages.outcome


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("recipes") == 0
    assert "w8a8-per-channel" in capsys.readouterr().out
    assert run("recipes w8a8-static --json") == 0
    assert json.loads(capsys.readouterr().out) == Recipe.load("w8a8-static").to_dict()
    assert run("recipes w8a8-static") == 0
    copy = tmp_path / "w8a8-static.yaml"
    copy.write_text(capsys.readouterr().out)
    assert Recipe.load(copy).to_dict() == Recipe.load("w8a8-static").to_dict()


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("") == 0
    overview = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in overview
        assert run(f"{command} --help") == 0
        assert "--json" in capsys.readouterr().out
    assert run("--version") == 0
    assert capsys.readouterr().out == f"bismooth {bismooth.__version__}\n"


@pytest.mark.skipif(find_spec("bismooth.tools.stages") is None, reason="no stages to call")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_base_installation_fails_in_one_line(command: str) -> None:
    heavy = ["gguf", "onnx", "onnx_graphsurgeon", "onnx_ir", "onnxruntime", "onnxscript", "safetensors", "torch"]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy}));"
        f"from bismooth.tools.cli import main; sys.exit(main({USAGE[command].split()}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: .+\n", done.stderr)


def test_an_interruption_while_the_command_is_imported(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    command = [sys.executable, "-m", "bismooth", "recipes"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"error: {INTERRUPTED}.\n")
