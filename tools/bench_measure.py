"""Measure engines in alternating rounds: one run of each, then the next of each, so that all see the same noise."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..calibrators.data import load_tokenizer, load_windows
from ..engines.cuda import load_cuda
from ..export.errors import BismoothError
from .bench_process import EngineProcess
from .bench_result import Benched, Measured
from .bench_subject import Case, Subject, check_room
from .bench_timing import Timing
from .console import Report

PROMPT_SEED = 0

Ids = NDArray[np.int64]
Open = Callable[[Path, int | None], EngineProcess]


@dataclass(frozen=True)
class Settings:
    """How engines are measured.

    Attributes:
        repeat: rounds per case.
        warm_up: runs of an engine before its first round of a case; also each time that it was opened again.
        threads: on a CPU; one per core by default.
        one_at_a_time: whether an engine is closed before the next one runs.
        data: text to take prompts from; without, they are random token ids.
    """

    repeat: int = 5
    warm_up: int = 1
    threads: int | None = None
    one_at_a_time: bool = False
    data: tuple[str, ...] = ()

    @property
    def prompts(self) -> str:
        """What the prompts are, in words."""
        return f"text of {', '.join(self.data)}" if self.data else f"random token ids, seed {PROMPT_SEED}"

    def to_json(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "repeat": self.repeat,
            "warm_up": self.warm_up,
            "threads": self.threads,
            "one_at_a_time": self.one_at_a_time,
        }


@dataclass(frozen=True)
class Measurement:
    """All engines, and what was measured of them until it was done or interrupted."""

    engines: tuple[Benched, ...]
    measured: tuple[Measured, ...]
    interrupted: bool = False


def measure(
    subjects: Sequence[Subject],
    cases: Sequence[Case],
    settings: Settings,
    progress: Report,
    open_engine: Open = EngineProcess,
) -> Measurement:
    """Measure every case with every engine that can be opened here.

    Raises:
        BismoothError: an engine for the CPU cannot be opened, one has no room for a case, or the text cannot be used.
        KeyboardInterrupt: before the first round was done.
    """
    rounds: dict[Case, list[list[Timing]]] = {case: [] for case in cases}
    interrupted = False
    with ExitStack() as stack:
        engines = [_Engine(subject, settings, open_engine) for subject in subjects]
        for engine in engines:
            stack.callback(engine.close)
            progress(f"open {engine.subject.path}", 0, 1)
            engine.try_open(cases)
            progress(f"open {engine.subject.path}", 1, 1)
        running = [engine for engine in engines if engine.reason is None]
        try:
            if running:
                prompts = _prompts(running, cases, settings)
                _run(running, prompts, rounds, settings, progress)
        except KeyboardInterrupt:
            if not any(rounds.values()):
                raise
            interrupted = True
    return Measurement(
        tuple(engine.benched() for engine in engines),
        tuple(item for case, done in rounds.items() for item in _measured(running, case, done)),
        interrupted,
    )


def _run(
    engines: Sequence[_Engine],
    prompts: Ids,
    rounds: dict[Case, list[list[Timing]]],
    settings: Settings,
    progress: Report,
) -> None:
    """Append what each round took to ``rounds``: a timing per engine. A round that is interrupted leaves nothing."""
    for case, done in rounds.items():
        step, total = f"measure {case} tokens", settings.repeat * len(engines)
        progress(step, 0, total)
        ids = prompts[: case.batch, : case.prompt_length]
        for number in range(settings.repeat):
            timings: list[Timing] = []
            for engine in engines:
                timings.append(engine.time(case, ids))
                progress(step, number * len(engines) + len(timings), total)
            done.append(timings)


def _measured(engines: Sequence[_Engine], case: Case, rounds: Sequence[Sequence[Timing]]) -> list[Measured]:
    if not rounds:
        return []
    first, *others = zip(*rounds, strict=True)
    measured = [Measured(engines[0].subject, case, first, None)]
    return measured + [
        Measured(engine.subject, case, own, first) for engine, own in zip(engines[1:], others, strict=True)
    ]


class _Engine:
    """An engine that is measured: its process, while there is one, and what that took so far.

    Attributes:
        reason: why it cannot be measured here.
    """

    def __init__(self, subject: Subject, settings: Settings, open_engine: Open) -> None:
        self.subject = subject
        self.reason: str | None = None
        self.vocab_size = 0
        self._settings, self._open_engine = settings, open_engine
        self._process: EngineProcess | None = None
        self._warm: Case | None = None
        self._load_seconds: list[float] = []
        self._peaks: list[int] = []

    def try_open(self, cases: Sequence[Case]) -> None:
        """Open the engine; one for a GPU may have a ``reason`` not to be."""
        try:
            opened = self._open().opened
        except BismoothError as error:
            if not self.subject.runs_on_gpu:
                raise
            self.reason = str(error)
            return
        check_room(self.subject.path, opened.capacity, cases)
        self.vocab_size = opened.vocab_size
        self._close_if_alone()

    def time(self, case: Case, ids: Ids) -> Timing:
        """One run, after those that warm the engine up where it is new or the case is."""
        process = self._process or self._open()
        if self._warm != case:
            for _ in range(self._settings.warm_up):
                process.time(ids, case.new_tokens)
            self._warm = case
        timing = process.time(ids, case.new_tokens)
        if process.peak_rss is not None:
            self._peaks.append(process.peak_rss)
        self._close_if_alone()
        return timing

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = self._warm = None

    def benched(self) -> Benched:
        return Benched(self.subject, tuple(self._load_seconds), max(self._peaks, default=None), self.reason)

    def _open(self) -> EngineProcess:
        self._process = self._open_engine(self.subject.path, self._settings.threads)
        self._load_seconds.append(self._process.opened.seconds)
        return self._process

    def _close_if_alone(self) -> None:
        if self._settings.one_at_a_time:
            self.close()


def _prompts(engines: Sequence[_Engine], cases: Sequence[Case], settings: Settings) -> Ids:
    """Token ids [rows, length] for the largest batch and the longest prompt, the same for all engines."""
    rows, length = max(case.batch for case in cases), max(case.prompt_length for case in cases)
    smallest = min(engines, key=lambda engine: engine.vocab_size)
    if not settings.data:
        return np.random.default_rng(PROMPT_SEED).integers(smallest.vocab_size, size=(rows, length))
    folders = [engine.subject.path for engine in engines]
    folder = next((path for path in folders if (path / "tokenizer.json").is_file()), folders[0])
    ids = load_windows(settings.data, load_tokenizer(folder), windows=rows, length=length).ids
    if ids.max() >= smallest.vocab_size:
        raise BismoothError(
            f"{smallest.subject.path}: knows {smallest.vocab_size} tokens, and the tokenizer of {folder} makes others "
            "of the text. Bench engines of one model, or leave --data out."
        )
    return ids


def machine(engines: Sequence[Benched]) -> dict[str, Any]:
    """The machine that these engines were measured on, by the names that its system gives."""
    found: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count()}
    if any(engine.subject.runs_on_gpu and engine.reason is None for engine in engines):
        found["gpu"] = load_cuda().device().name
    return found


def _processor() -> str:
    details = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*: (.+)$", details.read_text(), re.MULTILINE) if details.is_file() else None
    return match[1] if match else platform.processor() or platform.machine()
