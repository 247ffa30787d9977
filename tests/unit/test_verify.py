"""Hops, their gates and their verdicts; what outputs are compared by; and where they wait."""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from bismooth.engines.publish import read_audit
from bismooth.export.errors import BismoothError, GateError
from bismooth.passes.gates import Gates, Hop
from bismooth.tools import comparison
from bismooth.tools.comparison import Features, WindowFile
from bismooth.tools.hops import HopResult, Judge, VerifyResult

DOCS = Path(__file__).parents[2] / "docs"
IDS = np.arange(4)


def judge(hop: Hop, **limits: float | None) -> Judge:
    return Judge(Gates(**limits), hop, "a→b")


def result(*hops: HopResult) -> VerifyResult:
    return VerifyResult(Path("art"), 2, 16, hops, Gates())


@pytest.mark.parametrize(
    ("limits", "metrics", "verdict"),
    [
        ({"kl": 0.1}, {"kl": 0.05}, "passed"),
        ({"kl": 0.1}, {"kl": 0.2}, "failed"),
        ({"kl": 0.1}, {"kl": math.nan}, "failed"),
        ({"top1": 0.9}, {"top1": 0.8}, "failed"),
        ({}, {"kl": 0.2}, "measured"),
        ({"top1_stable": 0.9}, {"top1_stable": None}, "measured"),
        ({"folded_error": 0.0}, {"folded_error": 1.0, "kl": 1.0}, "measured"),  # a gate of another hop
    ],
)
def test_a_hop_is_held_against_its_own_gates(limits: dict[str, float], metrics: dict[str, float], verdict: str) -> None:
    assert judge(Hop.REFERENCE, **limits).result(metrics).verdict == verdict


def test_the_verdict_says_what_was_not_judged() -> None:
    passed = judge(Hop.REFERENCE, kl=1.0).result({"kl": 0.5})
    skipped = judge(Hop.DEVICE).skip("needs a GPU")
    failed = judge(Hop.INT8).result({}, ["int8: no numbers"])
    assert result(passed).verdict == "passed"
    assert result(passed, skipped).verdict == "passed; not judged: device"
    assert result(passed, skipped, failed).verdict == "failed"
    assert result(passed, failed).failures == ("int8: no numbers",)
    assert result(passed, skipped).brief()["notes"] == {"device": "needs a GPU"}


def test_a_gate_that_was_asked_for_is_judged_or_missed() -> None:
    passed = judge(Hop.REFERENCE, kl=1.0, top1=0.5).result({"kl": 0.5})
    skipped = judge(Hop.DEVICE).skip("needs a GPU")
    assert result(passed, skipped).demanding(["kl"]).failures == ()
    assert result(passed, skipped).demanding(["top1", "device_kl"]).failures == (
        "reference: top1 was asked for and could not be judged: it was not measured.",
        "device: device_kl was asked for and could not be judged: needs a GPU.",
    )


def test_what_was_not_measured_says_why() -> None:
    unmeasured = {"greedy_agreement": "it does not fit"}
    hop = judge(Hop.DECODE, decode_kl=1.0, greedy_agreement=0.5).result({"decode_kl": 0.1, "unmeasured": unmeasured})
    assert hop.verdict == "passed"
    assert hop.note() == "greedy_agreement was not measured: it does not fit"
    assert result(hop).demanding(["decode_kl", "greedy_agreement"]).failures == (
        "decode: greedy_agreement was asked for and could not be judged: it does not fit.",
    )


def test_the_summary_is_of_the_int8_kernels() -> None:
    names = ("reference_perplexity", "perplexity", "perplexity_ratio", "kl", "top1")
    half = judge(Hop.HALF).result(dict.fromkeys(names, 1.0))
    reference = judge(Hop.REFERENCE).result(dict.fromkeys(names, 2.0))
    int8 = judge(Hop.INT8).result({f"float_{name}": 3.0 for name in names} | dict.fromkeys(names, 0.0))
    assert set(result(reference, int8, half).summary().values()) == {3.0}
    assert set(result(reference, half).summary().values()) == {2.0}
    assert set(result(half).summary().values()) == {1.0}
    assert result().summary() == {}


def test_features_are_compared_without_probabilities() -> None:
    reference = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    features = Features()
    features.update(IDS, reference, reference * np.float32(1.1))
    figures = features.figures()
    assert figures["cosine_p5"] == pytest.approx(1)
    assert figures["sqnr_db"] == pytest.approx(20, abs=1e-4)
    assert figures["relative_error"] == pytest.approx(0.1, rel=1e-5)


def test_features_that_are_no_numbers() -> None:
    ones = np.ones((4, 8), np.float32)
    with pytest.raises(GateError, match="the outputs of the candidate hold NaN or infinity"):
        Features().update(IDS, ones, ones * np.float32(np.nan))


def test_outputs_wait_in_a_file_without_a_name(tmp_path: Path) -> None:
    windows = [np.full((3, 5), number, np.float32) for number in range(3)]
    with WindowFile([tmp_path], 3) as file:
        for window in windows:
            file.append(window)
        assert list(tmp_path.iterdir()) == []
        for number in (2, 0, 1):
            np.testing.assert_array_equal(file.read(number), windows[number])


class Usage(NamedTuple):
    free: int


class Full:
    """A file on a full disk."""

    def write(self, _data: Iterable[int]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None: ...


def no_space(_path: Path) -> Usage:
    return Usage(10)


def full_disk(**_options: Any) -> Full:
    return Full()


def test_outputs_go_where_there_is_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison.shutil, "disk_usage", no_space)
    message = re.escape(f"no space for the float graph's outputs. Expected 0 MB in one of {tmp_path}")
    with WindowFile([tmp_path], 3) as file, pytest.raises(BismoothError, match=message):
        file.append(np.zeros((3, 5), np.float32))


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison.tempfile, "TemporaryFile", full_disk)
    with (
        WindowFile([tmp_path], 3) as file,
        pytest.raises(BismoothError, match="no space for the float graph"),
    ):
        file.append(np.zeros((3, 5), np.float32))


def test_an_audit_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "model.audit.json"
    path.write_text("{}")
    with pytest.raises(BismoothError, match=r"not an audit file: 'audit'. Build the engine again"):
        read_audit(path)


def table_keys(text: str) -> set[str]:
    """Names in backquotes in the first column of the table."""
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_the_documented_keys_are_those_written() -> None:
    text = (DOCS / "verify.md").read_text("utf-8")
    hops, keys = text.split("## verify.json")
    assert table_keys(hops) == set(Hop)
    names = ("reference_perplexity", "perplexity", "perplexity_ratio", "kl", "top1")
    document: dict[str, Any] = VerifyResult(
        Path("art"),
        2,
        16,
        (judge(Hop.REFERENCE).result(dict.fromkeys(names, 1.0)),),
        Gates(),
        data={"data": [], "data_sha256": ""},
    ).to_json()
    assert table_keys(keys) == set(document)
    row = next(line for line in keys.splitlines() if line.startswith("| `hops`"))
    assert set(re.findall(r"`(\w+)`", row)) == {"hops", *document["hops"][0]}
    assert all(f"`{name}`" in hops for name in Gates().to_dict())


def test_a_run_that_judged_nothing_fails() -> None:
    skipped = HopResult(Hop.DEVICE, "FP16 → INT8 engine", {}, skipped="there is no GPU")
    result = VerifyResult(Path("art"), 1, 8, (skipped,), Gates())
    assert result.failures == ("no hop was judged: device: there is no GPU.",)
    assert result.verdict == "failed"
