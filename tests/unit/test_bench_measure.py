"""Who runs when, and what is left of a measurement that was interrupted; on processes that only seem to be some."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from bismooth.export.errors import BismoothError
from bismooth.tools import bench_measure
from bismooth.tools.bench_measure import Measurement, Settings, machine, measure
from bismooth.tools.bench_process import EngineProcess, Opened
from bismooth.tools.bench_result import Benched
from bismooth.tools.bench_subject import Case, Subject
from bismooth.tools.bench_timing import Timing
from tests import toy_tokenizers as toy
from tests.benched import rtx, subject

SHORT, LONG = Case(1, 4, 3), Case(2, 6, 3)


class Host:
    """Opens engines, and writes down what happens to them; ``interrupt`` is the run that Ctrl-C hits, from 1."""

    def __init__(self, vocab: dict[str, int] | None = None, interrupt: int | None = None) -> None:
        self.log: list[str] = []
        self.ids: list[NDArray[np.int64]] = []
        self.vocab = vocab or {}
        self.broken: dict[str, str] = {}
        self.interrupt = interrupt
        self.capacity = 100

    def __call__(self, path: Path, threads: int | None) -> EngineProcess:
        return cast(EngineProcess, Process(self, str(path), threads))

    @property
    def runs(self) -> list[str]:
        return [word for word in self.log if " " not in word]


class Process:
    def __init__(self, host: Host, name: str, threads: int | None) -> None:
        host.log.append(f"open {name} {threads}")
        if name in host.broken:
            raise BismoothError(host.broken[name])
        self.host, self.name = host, name
        self.opened = Opened(0.5, host.vocab.get(name, 10), host.capacity)
        self.peak_rss: int | None = None

    def time(self, ids: NDArray[np.int64], new_tokens: int) -> Timing:
        self.host.log.append(self.name)
        self.host.ids.append(ids)
        number = len(self.host.runs)
        if number == self.host.interrupt:
            raise KeyboardInterrupt
        self.peak_rss = 1000 * number
        return Timing(float(number), float(number), (0.1,) * (new_tokens - 1))

    def close(self) -> None:
        self.host.log.append(f"close {self.name}")


def run(
    host: Host, *subjects: Subject, cases: tuple[Case, ...] = (SHORT,), steps: list[Any] | None = None, **settings: Any
) -> Measurement:
    seen: list[Any] = [] if steps is None else steps
    options: dict[str, Any] = {"repeat": 2, **settings}

    def progress(*step: Any) -> None:
        seen.append(step)

    return measure(subjects, cases, Settings(**options), progress, host)


def test_engines_take_turns() -> None:
    host, steps = Host(), list[Any]()
    result = run(host, subject("a"), subject("b"), cases=(SHORT, LONG), steps=steps, threads=3)
    assert host.log[:2] == ["open a 3", "open b 3"]
    assert host.runs == ["a", "a", "b", "b", "a", "b"] * 2, "each case: warm-up and first round, second round"
    assert host.log[-2:] == ["close b", "close a"]
    a, b, *_ = result.measured
    assert [timing.prefill for timing in a.rounds] == [2.0, 5.0], "the warm-up is not counted"
    assert [timing.prefill for timing in b.rounds] == [4.0, 6.0]
    assert (a.first, b.first) == (None, a.rounds)
    assert [str(item.case) for item in result.measured] == ["1 × 4", "1 × 4", "2 × 6", "2 × 6"]
    assert [engine.load_seconds for engine in result.engines] == [(0.5,), (0.5,)]
    assert [engine.peak_rss for engine in result.engines] == [11000, 12000]
    assert ("measure 2 × 6 tokens", 4, 4) in steps


def test_without_warm_up() -> None:
    host = Host()
    run(host, subject("a"), subject("b"), warm_up=0)
    assert host.runs == ["a", "b", "a", "b"]


def test_one_at_a_time() -> None:
    host = Host()
    result = run(host, subject("a"), subject("b"), one_at_a_time=True)
    once = ["open a None", "a", "a", "close a", "open b None", "b", "b", "close b"]
    assert host.log == ["open a None", "close a", "open b None", "close b", *once, *once]
    assert [len(engine.load_seconds) for engine in result.engines] == [3, 3]
    assert len(result.measured[0].rounds) == 2


def test_all_engines_get_the_same_prompts() -> None:
    host = Host({"b": 7})
    run(host, subject("a"), subject("b"), cases=(SHORT, LONG), warm_up=0)
    assert [ids.shape for ids in host.ids] == [(1, 4)] * 4 + [(2, 6)] * 4
    assert np.array_equal(host.ids[-1], host.ids[-2])
    assert np.array_equal(host.ids[0], host.ids[-1][:1, :4])
    assert 0 <= host.ids[-1].min() <= host.ids[-1].max() < 7, "tokens that all engines know"
    assert Settings().prompts == "random token ids, seed 0"


def test_prompts_of_a_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("red green blue " * 20, "utf-8")
    (tmp_path / "engine").mkdir()
    tokenizer = toy.words()
    tokenizer.save(str(tmp_path / "engine" / "tokenizer.json"))
    host, made = Host(), subject(str(tmp_path / "engine"))
    run(host, subject("a"), made, cases=(LONG,), data=(str(text),))
    assert host.ids[0].tolist() == np.reshape(tokenizer.encode("red green blue " * 4).ids, (2, 6)).tolist()
    assert Settings(data=(str(text),)).prompts == f"text of {text}"
    message = f"a: knows 2 tokens, and the tokenizer of {made.path} makes others of the text."
    with pytest.raises(BismoothError, match=re.escape(message)):
        run(Host({"a": 2}), subject("a"), made, data=(str(text),))


@pytest.mark.parametrize(("interrupt", "rounds"), [(6, (1, 0)), (9, (2, 0)), (11, (2, 1)), (12, (2, 1))])
def test_an_interrupt_leaves_whole_rounds(interrupt: int, rounds: tuple[int, int]) -> None:
    host = Host(interrupt=interrupt)
    result = run(host, subject("a"), subject("b"), cases=(SHORT, LONG))
    assert result.interrupted
    counts = [len(item.rounds) for item in result.measured]
    assert counts == [count for count in rounds for _ in "ab" if count]
    assert host.log[-2:] == ["close b", "close a"]


def test_an_interrupt_before_the_first_round() -> None:
    host = Host(interrupt=3)
    with pytest.raises(KeyboardInterrupt):
        run(host, subject("a"), subject("b"))
    assert host.log[-2:] == ["close b", "close a"]


def test_an_engine_for_a_gpu_that_is_not_here() -> None:
    host = Host()
    host.broken["rtx"] = "rtx: there is no GPU."
    result = run(host, rtx("rtx"), subject("a"), subject("b"))
    assert [engine.reason for engine in result.engines] == ["rtx: there is no GPU.", None, None]
    a, b = result.measured
    assert (a.first, b.first) == (None, a.rounds), "ratios are to the first that is measured"
    nothing = run(host, rtx("rtx"))
    assert (nothing.measured, nothing.interrupted) == ((), False)


def test_an_engine_for_the_cpu_has_to_open() -> None:
    host = Host()
    host.broken["b"] = "b: is damaged."
    with pytest.raises(BismoothError, match=r"^b: is damaged\.$"):
        run(host, subject("a"), subject("b"))
    assert host.log[-1] == "close a"


def test_an_engine_without_room() -> None:
    host = Host()
    host.capacity = 5
    with pytest.raises(BismoothError, match=r"^a: has room for 5 positions per row\. --prompt-length 4 with"):
        run(host, subject("a"))
    assert host.runs == []


def test_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        def device(self) -> Any:
            return type("Device", (), {"name": "NVIDIA L4"})

    load: Callable[[], Any] = Cuda
    monkeypatch.setattr(bench_measure, "load_cuda", load)
    assert set(machine([Benched(subject()), Benched(rtx(), reason="no GPU.")])) == {"processor", "cores"}
    assert machine([Benched(rtx())])["gpu"] == "NVIDIA L4"
    assert machine([])["processor"]
