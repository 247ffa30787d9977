"""What the folder of an engine says before the engine is opened."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from bismooth.engines import bundle_choice
from bismooth.export.errors import BismoothError
from bismooth.tools.bench_subject import Case, Subject, check_room, load_subjects, short_names
from bismooth.tools.engine_folder import engine_file
from bismooth.tools.roofline import find_gpus
from tests import artifacts, bundles
from tests.benched import COST, DIMS, rtx, subject, write_engine


def fails(message: str, *paths: Path) -> None:
    with pytest.raises(BismoothError, match=re.escape(message)):
        load_subjects(paths)


def test_engines_as_they_were_built(tmp_path: Path) -> None:
    cpu, gpu = write_engine(tmp_path / "cpu", subject()), write_engine(tmp_path / "gpu", rtx("gpu", 86, 89))
    first, second = load_subjects([cpu, gpu])
    assert (first.path, first.engine, first.runtime, first.recipe) == (cpu, "onnxruntime", "onnxruntime 1.2", "w8a8")
    assert (first.cost, first.runs_on_gpu, second.runs_on_gpu) == (COST, False, True)


def bundle(folder: Path, *made: Subject) -> Path:
    """A bundle of these engines, by their names."""
    files = dict[str, bytes]()
    for one in made:
        path = write_engine(folder / "made" / str(one.path), one)
        files |= {f"engines/{one.path}/{name}": (path / name).read_bytes() for name in ("model.audit.json",)}
        files[f"engines/{one.path}/{engine_file(one.engine)}"] = b"engine"
    entries = {
        str(one.path): bundles.engine(one.engine, str(one.path), capabilities=list(one.record.capabilities))
        for one in made
    }
    for name, entry in entries.items():
        entry["files"] = [file for file in files if file.startswith(f"engines/{name}/")]
    return bundles.make_bundle(folder / "bundle", files, dims=DIMS, engines=entries)


def test_a_bundle_is_the_engine_that_runs_here_or_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_choice, "cuda_available", lambda: "there is no GPU")
    both = bundle(tmp_path / "both", subject("cpu"), rtx("gpu"))
    (here,), (estimated,) = load_subjects([both]), load_subjects([both], estimate=True)
    assert (here.path, here.engine, here.cost) == (both, "onnxruntime", COST)
    assert (estimated.path, estimated.engine, estimated.record.capabilities) == (both, "tensorrt-rtx", (89,))
    (elsewhere,) = load_subjects([bundle(tmp_path / "gpu", rtx("gpu"))])
    assert elsewhere.runs_on_gpu, "which says why it is not measured when it is opened"


def test_a_cost_that_cannot_be_told_is_a_reason(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "engine", subject(), dims={"hidden_size": 8})
    (found,) = load_subjects([path])
    assert found.cost is None
    assert found.problem.startswith(f"{path}: the manifest lacks num_hidden_layers")


def test_bad_engines(tmp_path: Path) -> None:
    path = write_engine(tmp_path / "engine", subject())
    fails("bench: Expected one or more engine folders or bundles, got none.")
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


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ("art/engines/onnxruntime art8/engines/onnxruntime", "art art8"),
        ("/x/art/engines/a /x/art/engines/b", "a b"),
        ("/x/a/b /x/a/b/c", "b b/c"),
        ("a/b b", "a/b b"),
        ("a/x b/c/x", "a b/c"),
        ("/x/art/engines/onnxruntime", "onnxruntime"),
    ],
)
def test_names_tell_engines_apart(paths: str, names: str) -> None:
    assert short_names(list(map(Path, paths.split()))) == names.split()


def refused(made: Subject, case: Case, message: str) -> None:
    with pytest.raises(BismoothError, match=re.escape(message)):
        made.check([Case(1, 8, 2), case])


def test_what_an_engine_has_no_room_for() -> None:
    made = rtx()
    made.check([Case(4, 60, 5)])
    refused(made, Case(5, 8, 2), "--batch 5: rtx takes 1 to 4 rows. Choose another size, or build the engine for more")
    message = (
        "rtx: has room for 64 positions per row. --prompt-length 60 with --new-tokens 6 takes 65. Choose less. "
        "Engines for a GPU can be built with a larger --capacity."
    )
    refused(made, Case(1, 60, 6), message)
    refused(rtx(capacity=None), Case(1, 8, 2), "rtx: has no caches, so it cannot generate text. Export the model with")
    subject().check([Case(1, 10**6, 2)])  # only once it is open it says how much it takes
    check_room(Path("x"), 9, [Case(1, 8, 2)])
