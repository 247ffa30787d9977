"""What the command line shows, and with which status it ends: results, bad usage, errors, missed gates."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import bismooth
from bismooth.export.errors import BismoothError, GateError
from bismooth.passes.recipe import Recipe
from tests.fake_stages import COMMANDS, INTERRUPTED, USAGE, Stages, fake_stages, run


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    return fake_stages(monkeypatch)


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
