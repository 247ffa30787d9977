"""The torch model in a process of its own: what comes back, and what is said when it fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bismooth.engines.child_process import ProcessEndedError
from bismooth.export.errors import BismoothError
from bismooth.tools import torch_model
from bismooth.tools.torch_model import torch_outputs
from bismooth.tools.torch_worker import write_outputs
from tests.models import exported, tokens

IDS = tokens(2, 9)["input_ids"]


def test_outputs_are_those_of_the_model(tmp_path: Path) -> None:
    folder = exported("llama").folder
    steps: list[tuple[str, int, int]] = []

    def progress(step: str, done: int, total: int) -> None:
        steps.append((step, done, total))

    outputs = torch_outputs(folder, IDS, tmp_path, progress=progress)
    assert outputs.shape == write_outputs(folder, IDS, tmp_path / "expected") == (2, 9, 96)
    expected = np.fromfile(tmp_path / "expected", np.float32).reshape(outputs.shape)
    for number in (1, 0):
        np.testing.assert_array_equal(outputs.read(number), expected[number])
    assert (outputs.peak_rss or 0) > 2**20
    names, done, totals = zip(*steps, strict=True)
    assert set(names) == {"run the torch model"}
    assert list(done) == sorted(done)
    assert done[-1] == totals[-1]


def test_what_the_process_cannot_do_is_said(tmp_path: Path) -> None:
    folder = exported("llama").folder
    with pytest.raises(BismoothError, match=r"--memory is too small for the torch model on a window of 9 tokens"):
        torch_outputs(folder, IDS, tmp_path, memory=1000)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "torch-outputs.bin").symlink_to("/dev/full")
    with pytest.raises(BismoothError, match=r"torch-outputs\.bin: the disk is full\. Free some space"):
        torch_outputs(exported("llama").folder, IDS, tmp_path)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (ProcessEndedError("SIGKILL", []), "(SIGKILL). The system ended it, most likely for lack of memory. Its last"),
        (ProcessEndedError("exit status 7", ["a.", "b"]), "(exit status 7). Its last words: a | b. Leave this hop out"),
    ],
)
def test_a_process_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: ProcessEndedError, words: str
) -> None:
    def ask(_module: str, _name: str, _request: dict[str, Any], _tell: Callable[[Any], None]) -> None:
        raise end

    monkeypatch.setattr(torch_model, "ask", ask)
    with pytest.raises(BismoothError, match=re.escape(f"{tmp_path}: the process of the torch model ended {words}")):
        torch_outputs(tmp_path, IDS, tmp_path)
