"""Engines of a tiny model side by side, each in its process; the report, the page, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import bismooth
from bismooth.export.errors import BismoothError
from bismooth.tools import stages
from bismooth.tools.cli import main
from tests.browser import chromium
from tests.tiny import Tiny, make_tiny

SIZES = ("--batch", "1", "2", "--prompt-length", "5", "--new-tokens", "4", "--repeat", "2")


@dataclass(frozen=True)
class Made:
    """Engines of one tiny model: of float and INT8 for the CPU, and one that only seems to be for SM89."""

    tiny: Tiny
    float: Path
    int8: Path
    null: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("bench")
    tiny = make_tiny(folder, num_hidden_layers=2)
    stages.export(tiny.source, folder / "float")
    stages.quantize(folder / "float", "w8a8-per-channel", folder / "w8a8", data_free=True)
    single, int8 = (stages.build(folder / name, "onnxruntime").folder for name in ("float", "w8a8"))
    return Made(tiny, single, int8, stages.build(folder / "w8a8", "null", capabilities=[89]).folder)


def bench(*words: object) -> int:
    return main(["bench", *map(str, words), "-q"])


def test_engines_side_by_side(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("-o", tmp_path / "bench.json", "--html", tmp_path / "bench.html")
    assert bench(made.float, made.int8, *SIZES, "--threads", 1, *files, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert (report["format"], report["interrupted"], report["notes"]) == ("bismooth-bench", False, [])
    assert (report["repeat"], report["threads"], report["estimates"]) == (2, 1, None)
    first, second = report["engines"]
    assert (first["recipe"], second["recipe"]) == (None, "w8a8-per-channel")
    assert all(engine["peak_rss_bytes"] > 10**7 and engine["load_seconds"][0] > 0 for engine in (first, second))
    assert second["weight_bytes"] < first["weight_bytes"]
    assert [(row["engine"], row["batch"]) for row in report["measured"]] == [
        (str(engine), batch) for batch in (1, 2) for engine in (made.float, made.int8)
    ]
    for row in report["measured"]:
        assert (row["token"]["count"], len(row["rounds"])) == (6, 2)
        assert 0 < row["token"]["p5"] <= row["token"]["p50"] <= row["token"]["p99"] < 10
        assert row["first_token"]["p50"] >= row["prefill"]["p5"] > 0
        rates = [row["batch"] * 3 / item["decode"] for item in row["rounds"]]
        assert row["decode_tokens_per_second"] == pytest.approx(sum(rates) / 2)
        assert (row["speedup"] is None) == (row["engine"] == str(made.float))
    assert bench(made.float, made.int8, *SIZES, *files) == 0, "reports are replaced"
    assert "random token ids, seed 0" in " ".join(capsys.readouterr().out.split())


def test_prompts_of_text_one_engine_at_a_time(made: Made) -> None:
    options: dict[str, Any] = {"prompt_length": [5], "new_tokens": 2, "repeat": 1, "warm_up": 0}
    result = bismooth.bench([made.int8], data=[str(made.tiny.text)], one_at_a_time=True, **options)
    assert result.settings["prompts"] == f"text of {made.tiny.text}"
    assert len(result.engines[0].load_seconds) == 2


def test_a_bundle(made: Made, tmp_path: Path) -> None:
    bundle = bismooth.package(made.int8.parents[1], tmp_path / "bundle", engines=["onnxruntime"]).bundle
    sizes: dict[str, Any] = {"prompt_length": [5], "new_tokens": 3, "repeat": 1}
    result = bismooth.bench([made.int8, bundle], **sizes)
    first, second = result.engines
    assert (first.subject.cost, first.subject.recipe) == (second.subject.cost, second.subject.recipe)
    assert [len(item.rounds) for item in result.measured] == [1, 1]


def test_bounds_take_no_runtime(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (made.null, "--gpu", "l4", "RTX 4090", "--estimate", "--html", tmp_path / "page.html", "--json")
    assert bench(*words) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["measured"], report["machine"]) == ([], {})
    steps = report["estimates"]["steps"]
    assert {step["gpu"] for step in steps} == {"L4", "RTX4090"}
    prompt, token, *_ = steps
    assert (prompt["phase"], prompt["positions"], token["phase"], token["positions"]) == ("prefill", 128, "decode", 160)
    read = token["weight_bytes"] + token["cache_bytes"]
    assert token["least_seconds"] == pytest.approx(read / 300e9)
    assert bench(made.null, "--estimate", "--json") == 0
    found = json.loads(capsys.readouterr().out)["estimates"]["gpus"]
    assert {gpu["name"] for gpu in found} == {"L4", "L40S", "RTX4060", "RTX4090"}, "those that it was built for"


def fails(capsys: pytest.CaptureFixture[str], message: str, *words: object) -> None:
    capsys.readouterr()
    assert bench(*words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_bad_input(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.json").write_text("{}", "utf-8")
    (tmp_path / "mine.html").write_text("mine", "utf-8")
    fails(capsys, "mine.json: exists and is not a report of 'bismooth bench'", made.int8, "-o", tmp_path / "mine.json")
    fails(capsys, "mine.html: exists and is not a page", made.int8, "--html", tmp_path / "mine.html")
    same = tmp_path / "same"
    fails(capsys, f"--html {same}: is the file that -o writes.", made.int8, "--html", same, "-o", same)
    unfit = f"--gpu T4: none of the engines is for its compute capability 75: {made.null}: for SM89."
    fails(capsys, unfit, made.null, "--gpu", "T4", "--estimate")
    cpu = f"--estimate: none of the engines is for a GPU whose figures are known: {made.int8}: runs on the CPU."
    fails(capsys, cpu, made.int8, "--estimate")
    fails(capsys, "--repeat: has no effect: --estimate measures nothing.", made.null, "--estimate", "--repeat", 2)
    fails(capsys, "--new-tokens", made.int8, "--new-tokens", 1)
    fails(capsys, "has room for", made.int8, "--prompt-length", 10**6, "--new-tokens", 2)
    fails(capsys, "engines of null cannot generate text", made.null)
    sizes: list[tuple[dict[str, Any], str]] = [
        ({"batch": []}, "batch: Expected numbers from 1, got none."),
        ({"prompt_length": [8, 0]}, "prompt_length: Expected numbers from 1, got 8, 0."),
        ({"new_tokens": 1}, "new_tokens: Expected numbers from 2, got 1."),
        ({"repeat": 0}, "repeat: Expected numbers from 1, got 0."),
    ]
    for options, message in sizes:
        with pytest.raises(BismoothError, match=f"^bench: {message}$"):
            bismooth.bench([made.int8], **options)
    with pytest.raises(BismoothError, match="bench: Expected one or more engine folders or bundles, got none"):
        bismooth.bench([])


def measuring(*words: object) -> subprocess.Popen[str]:
    """A command that measures without end, and is at it for a second."""
    sizes = ("--prompt-length", 5, "--new-tokens", 2, "--repeat", 10**6)
    command = [sys.executable, "-m", "bismooth", "bench", *map(str, (*words, *sizes))]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    while "measure" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(1)
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_shows_what_there_is(made: Made, tmp_path: Path, number: int) -> None:
    report = tmp_path / "bench.json"
    process = measuring(made.int8, "-o", report)
    os.killpg(process.pid, number)  # as a terminal or a scheduler does, to the processes of engines too
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "")
    assert re.search(r"interrupted +yes", out)
    document = json.loads(report.read_text("utf-8"))
    assert document["interrupted"]
    assert len(document["measured"][0]["rounds"]) >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc lists the processes")
def test_no_engine_outlives_a_command_that_was_killed(made: Made) -> None:
    process = measuring(made.int8)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("utf-8").split()
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 30
    while is_running(child):
        assert time.monotonic() < end
        time.sleep(0.1)


def is_running(process: str) -> bool:
    """Whether there is such a process, and not only what nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def page(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "bench.html"
    null: dict[str, Any] = {"batch": [1, 2], "prompt_length": [4, 8]}
    bismooth.bench([made.null], estimate=True, gpus=["L4", "L40S"], html=path, **null)
    return path


@pytest.fixture(scope="module")
def measured_page(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "bench.html"
    sizes: dict[str, Any] = {"batch": [1, 2], "prompt_length": [4, 8], "new_tokens": 3, "repeat": 2}
    bismooth.bench([made.float, made.int8], html=path, **sizes)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Generator[Any]:
    with chromium(tmp_path_factory.mktemp("profile"), viewport={"width": 1280, "height": 900}) as context:
        yield context


@pytest.mark.browser
def test_pages_in_a_browser(page: Path, measured_page: Path, browser: Any) -> None:
    complaints: list[str] = []

    def note_error(error: Any) -> None:
        complaints.append(str(error))

    def note_message(message: Any) -> None:
        if message.type == "error":
            complaints.append(message.text)

    for path, panels in ((page, ["roofline"]), (measured_page, ["token", "prefill", "throughput", "ratios"])):
        shown = browser.new_page()
        shown.on("pageerror", note_error)
        shown.on("console", note_message)
        shown.goto(path.as_uri())
        for panel in panels:
            shown.wait_for_selector(f"#{panel} .main-svg")
            views = shown.locator(f"#{panel} option").all_inner_texts()
            assert len(views) > 1
            for view in views:
                shown.locator(f"#{panel} select").select_option(view)
                assert shown.locator(f"#{panel} .trace").count() > 0, view
    assert complaints == []
