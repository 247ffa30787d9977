"""What is shown: tables, JSON, progress."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from contextvars import copy_context
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bismooth.tools import console


@dataclass(frozen=True)
class Document:
    keys: Mapping[str, Any]

    def to_json(self) -> Mapping[str, Any]:
        return self.keys


def shown(**keys: Any) -> str:
    text = StringIO()
    Console(width=80, file=text).print(console.render(Document(keys)))
    return text.getvalue()


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("engine_bytes", 189_234_567, "engine bytes  189.2 MB"),
        ("wall_seconds", 12.34, "wall seconds  12.3 s"),
        ("int8_mac_share", 0.98765, "int8 mac share  98.77%"),
        ("linears", 12_345, "linears  12,345"),
        ("kl", 0.0001234567, "kl  0.00012346"),
        ("kl", math.nan, "kl  nan"),
        ("gpu", None, "gpu  –"),
        ("passed", True, "passed  yes"),
        ("passed", False, "passed  no"),
        ("capabilities", [86, 89], "capabilities  86, 89"),
        ("warnings", [], "warnings  none"),
        ("options", {}, "options  none"),
        ("path", Path("a/[b]"), "path  a/[b]"),
    ],
)
def test_values_are_written_for_people(key: str, value: object, text: str) -> None:
    assert " ".join(shown(**{key: value}).split()) == " ".join(text.split())


def test_a_long_path_is_shown_whole() -> None:
    path = "/" + "models/" * 30
    assert "".join(shown(source=f"made from {path}").split()) == f"sourcemadefrom{path}"


def test_groups_and_lists_become_titled_tables() -> None:
    text = shown(
        model="tiny",
        hops={"folded": {"error": 1e-6}},
        linears=[{"name": "q_proj", "share": 0.5}, {"name": "k_proj", "note": "float"}],
        failures=["folded: missed"],
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[:3] == ["model tiny", "hops folded", "error 1e-06"]
    assert "q_proj 50.00% –" in lines
    assert "k_proj – float" in lines
    assert lines[-1] == "missed folded: missed"


def test_tables_hold_shorter_numbers() -> None:
    lines = [" ".join(line.split()) for line in shown(hops=[{"kl": 0.0123456, "wall_seconds": 1.23}]).splitlines()]
    assert "0.0123 1.2 s" in lines


@dataclass(frozen=True)
class Long(Document):
    def brief(self) -> Mapping[str, Any]:
        return {"rows": len(self.keys), "failures": ["missed"]}


def test_a_terminal_shows_what_is_brief(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(Long({"a": 1, "b": 2}), as_json=False)
    assert " ".join(capsys.readouterr().out.split()) == "rows 2"
    console.show(Long({"a": 1, "b": 2}), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": 1, "b": 2}


def test_json_holds_what_json_cannot_say_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    console.show(Document({"kl": math.nan, "worst": [-math.inf, 1.5], "at": {"path": Path("a")}}), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"kl": "nan", "worst": ["-inf", 1.5], "at": {"path": "a"}}


def test_errors_are_not_wrapped_nor_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    message = "[red]" + 200 * "x"
    console.show_error(message)
    assert capsys.readouterr().err == f"error: {message}\n"


def test_progress_is_silent_unless_a_command_asks_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress() as report:
        report("trace", 1, 2)
    assert capsys.readouterr() == ("", "")


def progress_of_two_steps() -> None:
    console.show_progress(True)
    with console.progress() as report:
        report("trace", 1, 2)
        report("trace", 2, 2)
        report("link [weights]", 1, 1)


def test_progress_in_a_file_is_a_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    copy_context().run(progress_of_two_steps)
    assert capsys.readouterr() == ("", "trace\nlink [weights]\n")


def test_a_long_step_has_a_line_a_minute_in_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("bismooth.tools.console.time.monotonic", lambda: now[0])

    def long() -> None:
        console.show_progress(True)
        with console.progress() as report:
            for done in range(5):
                report("trace", done, 4)
                now[0] += 25

    copy_context().run(long)
    assert capsys.readouterr() == ("", "trace\ntrace: 3 of 4\n")


def test_progress_on_a_terminal_is_a_bar_per_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    copy_context().run(progress_of_two_steps)
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in ("trace", "2/2", "link [weights]", "1/1"):
        assert text in captured.err


def transient_progress() -> None:
    console.show_progress(True)
    with console.progress(transient=True) as report:
        report("read", 1, 1)


def test_transient_progress_leaves_no_line_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    copy_context().run(transient_progress)
    assert capsys.readouterr() == ("", "")


def test_transient_progress_is_erased_from_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    copy_context().run(transient_progress)
    shown = capsys.readouterr().err
    assert "read" in shown
    assert shown.rstrip("\r").endswith("\x1b[2K")


def test_notes_are_shown_where_progress_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("unseen")

    def seen() -> None:
        console.show_progress(True)
        console.note("[red]" + 200 * "x")

    copy_context().run(seen)
    assert capsys.readouterr() == ("", "[red]" + 200 * "x" + "\n")


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "--json"]])
def test_nobody_reads_the_result(arguments: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bismooth", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")


def test_nobody_reads_the_progress() -> None:
    code = """
from bismooth.tools import console
console.show_progress(True)
with console.progress() as progress:
    for step in "abc":
        progress(step, 1, 1)
print("done")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, b"done\n")


@pytest.mark.parametrize(
    ("units", "progress", "text"),
    [
        (0, None, ""),
        (3, None, "continues an earlier run: 3 units are there\n"),
        (210, ("write weights", 20, 42), "continues an earlier run: 210 units are there (write weights: 20 of 42)\n"),
    ],
)
def test_a_run_that_is_continued_says_so(
    units: int, progress: tuple[str, int, int] | None, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def show() -> None:
        console.show_progress(True)
        console.note_resumed(units, progress)

    copy_context().run(show)
    assert capsys.readouterr().err == text
