"""What the folder of an engine says before the engine is opened."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from bismooth.export.errors import BismoothError
from bismooth.tools.bench_subject import Case, Subject, check_room, load_subjects
from bismooth.tools.roofline import find_gpus
from tests import artifacts
from tests.benched import COST, rtx, subject, write_engine


def fails(message: str, *paths: Path) -> None:
    with pytest.raises(BismoothError, match=re.escape(message)):
        load_subjects(paths)


def test_engines_as_they_were_built(tmp_path: Path) -> None:
    cpu, gpu = write_engine(tmp_path / "cpu", subject()), write_engine(tmp_path / "gpu", rtx("gpu", 86, 89))
    first, second = load_subjects([cpu, gpu])
    assert (first.path, first.engine, first.runtime, first.recipe) == (cpu, "onnxruntime", "onnxruntime 1.2", "w8a8")
    assert (first.cost, first.runs_on_gpu, second.runs_on_gpu) == (COST, False, True)


def test_a_cost_that_cannot_be_told_is_a_reason(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "engine", subject(), dims={"hidden_size": 8})
    (found,) = load_subjects([path])
    assert found.cost is None
    assert found.problem.startswith(f"{path}: the manifest lacks num_hidden_layers")


def test_bad_engines(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "engine", subject())
    fails("bench: Expected one or more engine folders, got none.")
    again = tmp_path / "x" / ".." / "engine"
    (tmp_path / "x").mkdir()
    fails(f"{again}: is given twice, as {path} before. Expected each engine once.", path, again)
    art = artifacts.make(tmp_path / "art")
    fails(f"{art}: expected an engine folder, got a float artifact.", art)
    (path / "model.audit.json").unlink()
    fails("model.audit.json: the manifest lists this file, but it is missing.", path)


def test_for_which_gpus_an_engine_is() -> None:
    (l4,) = find_gpus(["L4"])
    assert [made.is_for(l4) for made in (rtx("a", 86, 89), rtx("a", 86), subject())] == [True, False, False]
    built_here = replace(rtx(), engine="tensorrt", record=replace(rtx().record, capabilities=()))
    assert built_here.is_for(l4)


def refused(made: Subject, case: Case, message: str) -> None:
    with pytest.raises(BismoothError, match=re.escape(message)):
        made.check([Case(1, 8, 2), case])


def test_what_an_engine_has_no_room_for() -> None:
    made = rtx()
    made.check([Case(4, 60, 5)])
    refused(made, Case(5, 8, 2), "--batch 5: rtx takes 1 to 4 rows. Choose another size, or build the engine for more")
    message = (
        "rtx: has room for 64 positions per row. --prompt-length 60 with --new-tokens 6 takes 65. Choose less, or "
        "build the engine with a larger --capacity."
    )
    refused(made, Case(1, 60, 6), message)
    refused(rtx(capacity=None), Case(1, 8, 2), "rtx: has no caches, so it cannot generate text. Export the model with")
    subject().check([Case(1, 10**6, 2)])  # only once it is open it says how much it takes
    check_room(Path("x"), 9, [Case(1, 8, 2)])
