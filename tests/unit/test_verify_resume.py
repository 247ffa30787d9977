"""Hops that an interrupted run has judged are not judged again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bismooth.export import cores
from bismooth.export.artifact import Artifact
from bismooth.export.errors import BismoothError, UnfinishedRunError
from bismooth.export.state import open_state
from bismooth.passes.gates import Gates, Hop
from bismooth.tools import stages
from bismooth.tools.comparison import Values, WindowFile
from bismooth.tools.programs import Program, Programs
from bismooth.tools.verify import HopResult, VerifyResult, verify_artifact
from tests.models import VOCAB, exported
from tests.tiny import make_tiny

IDS = np.random.default_rng(2).integers(3, VOCAB, (3, 12))
HOPS = (Hop.DECODE, Hop.HALF)


def verify(target: Path) -> VerifyResult:
    model = exported("llama")
    with open_state(target, "verify", {"test": 1}) as state:
        result = verify_artifact(Artifact(model.folder, model.manifest), IDS, Gates(), HOPS, state=state)
    return replace(result, hops=tuple(replace(hop, seconds=0) for hop in result.hops))


def test_a_run_goes_on_behind_the_last_hop_that_is_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = verify(tmp_path / "whole")
    ran: list[str] = []
    outputs = Programs.outputs

    def noted(self: Programs, program: Program, step: str) -> Iterator[Values]:
        ran.append(step)
        yield from outputs(self, program, step)

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Programs, "outputs", noted)
    with monkeypatch.context() as patch:
        patch.setattr("bismooth.tools.verify._Verifier._half", interrupted)
        with pytest.raises(KeyboardInterrupt):
            verify(tmp_path / "report")
    assert ran == ["run the float32 graph", "run whole windows"]
    ran.clear()
    assert verify(tmp_path / "report") == expected
    assert ran == []
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_another_number_of_threads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It rounds otherwise."""
    tiny = make_tiny(tmp_path / "tiny")
    artifact = stages.export(tiny.source, tmp_path / "float").artifact

    def run() -> None:
        stages.verify(artifact, [str(tiny.text)], windows=1, length=16, hops=HOPS)

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bismooth.tools.verify._Verifier._half", interrupted)
    monkeypatch.setattr(cores, "default_threads", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(cores, "default_threads", lambda: 3)
    with pytest.raises(BismoothError, match=r"would come out differently: threads is 2, and would be 3\. Expected"):
        run()


def test_other_text_is_named_by_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = make_tiny(tmp_path / "tiny")
    artifact = stages.export(tiny.source, tmp_path / "float").artifact

    def run(windows: int = 1, length: int = 16, skip_windows: int = 0) -> None:
        text = [str(tiny.text)]
        stages.verify(artifact, text, windows=windows, length=length, skip_windows=skip_windows, hops=HOPS)

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bismooth.tools.verify._Verifier._half", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    for options, differs in (
        ({"windows": 2}, "windows is 1, and would be 2"),
        ({"skip_windows": 1}, "skip_windows is 0, and would be 1"),
        ({"length": 17, "windows": 2}, "windows is 1, and would be 2; length is 16, and would be 17"),
    ):
        with pytest.raises(BismoothError, match=rf"come out differently: {differs}\. Expected"):
            run(**options)


def test_a_result_is_the_same_from_the_record() -> None:
    result = HopResult(Hop.INT8, "a→b", {"kl": float("inf"), "by": {"x": [1]}}, ("kl",), ("kl: no.",), None, 2, 0.5)
    assert HopResult.from_unit(json.loads(json.dumps(result.to_unit()))) == result
    skipped = HopResult(Hop.AUDIT, "a→b", {}, skipped="why")
    assert HopResult.from_unit(json.loads(json.dumps(skipped.to_unit()))) == skipped


def test_a_file_with_a_name_can_be_reopened(tmp_path: Path) -> None:
    windows = [np.full((2, 3), number, np.float32) for number in range(2)]
    with WindowFile([tmp_path], 2, "outputs") as file:
        assert file.finish() is None
        for window in windows:
            file.append(window)
        shape = file.finish()
    assert shape == (2, 3)
    with WindowFile([tmp_path], 2, "outputs") as file:
        file.reopen((2, 3))
        for number in (1, 0):
            np.testing.assert_array_equal(file.read(number), windows[number])
    os.truncate(tmp_path / "outputs", 47)
    message = "outputs: is not what an unfinished run has left there. Expected a file of 48 bytes"
    with WindowFile([tmp_path], 2, "outputs") as file, pytest.raises(UnfinishedRunError, match=message):
        file.reopen((2, 3))


def test_a_file_in_another_folder_is_not_kept(tmp_path: Path) -> None:
    with WindowFile([tmp_path / "none", tmp_path], 1, "outputs") as file:
        file.append(np.zeros((2, 3), np.float32))
        assert file.finish() is None
    assert list(tmp_path.iterdir()) == []
