"""Measure engines side by side, and bound what they can do on GPUs that are not here."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..calibrators.data import load_tokenizer, load_windows
from ..engines.cuda import load_cuda
from ..export.errors import BismoothError
from ..export.replacing import replacing
from ..export.versions import tool_versions
from . import console
from .bench_page import bench_page
from .bench_process import EngineProcess
from .bench_result import FORMAT, Benched, BenchResult, Measured
from .bench_subject import Case, Subject, check_room, load_subjects
from .bench_timing import Timing
from .page import check_page, write_page
from .roofline import Bound, Gpu, bounds, find_gpus, known_gpus
from .stages import check_replaceable
from .verify import is_report

PROMPT_SEED = 0


@dataclass(frozen=True)
class Settings:
    """How engines are measured.

    Attributes:
        repeat: rounds per case.
        warm_up: runs of each engine before the first round of a case, and after it was opened.
        threads: on a CPU; one per core by default.
        one_at_a_time: whether one engine at a time is open.
        data: text to take prompts from; random token ids without.
    """

    repeat: int = 5
    warm_up: int = 1
    threads: int | None = None
    one_at_a_time: bool = False
    data: tuple[str, ...] = ()


Open = Callable[[Path, int | None], EngineProcess]
Prompts = NDArray[np.int64]


def bench(
    engines: Sequence[str | Path],
    *,
    batch: Sequence[int] = (1,),
    prompt_length: Sequence[int] = (128, 512),
    new_tokens: int = 64,
    settings: Settings = Settings(),
    gpus: Sequence[str] = (),
    estimate: bool = False,
    output: str | Path | None = None,
    html: str | Path | None = None,
) -> BenchResult:
    """Time prompts and new tokens with each engine, in alternating rounds: what disturbs the machine hits all alike.

    Every engine has a process of its own. One for a GPU that cannot be opened here is listed with the reason.
    Ctrl-C ends the measurement; the result then has the rounds that all engines had done.

    Args:
        engines: engine folders; ratios are to the first that can be measured.
        batch: numbers of rows.
        prompt_length: tokens of a prompt. Every batch is measured with every length.
        new_tokens: that follow each prompt, at least 2. No token ends a text.
        settings: how to measure.
        gpus: names of GPUs to bound the engines on, see :mod:`.roofline`. By default, for engines that were not
            measured, those that they were built for.
        estimate: measure nothing.
        output: a JSON file to write.
        html: a file for a page that shows the result; it needs the extra ``report``.

    Raises:
        BismoothError: no engines or one of them twice, one that is damaged, or has no room for a case; a GPU that is not
            known or that none of the engines is for; text that cannot be used; or ``output`` or ``html`` cannot be
            written or is a file of another kind.
    """
    _check_files(output, html)
    subjects, chosen = load_subjects(engines), find_gpus(gpus)
    cases = [Case(*sizes, new_tokens) for sizes in product(dict.fromkeys(batch), dict.fromkeys(prompt_length))]
    for subject in subjects:
        subject.check(cases)
    _check_gpus(subjects, chosen, estimate=estimate)
    run = _Run(tuple(map(Benched, subjects))) if estimate else _measure(subjects, cases, settings)
    bounded = list(_bounds(run.engines, cases, chosen, estimate=estimate))
    result = BenchResult(
        run.engines,
        run.measured,
        tuple(bound for bound in bounded if not isinstance(bound, str)),
        {
            "new_tokens": new_tokens,
            **({} if estimate else {"prompts": run.prompts, **_plain(settings)}),
        },
        _machine(run.engines) if run.measured else {},
        (*_notes(run.engines), *(bound for bound in bounded if isinstance(bound, str))),
        run.interrupted,
        tool_versions(),
    )
    if output is not None:
        with replacing(Path(output)) as temporary:
            temporary.write_text(console.json_text(result.to_json()), "utf-8")
    if html is not None:
        write_page(Path(html), bench_page(result))
    return result


def _check_files(output: str | Path | None, html: str | Path | None) -> None:
    if output is not None:
        check_replaceable(Path(output), "a report of 'bismooth bench'", lambda path: is_report(path, FORMAT))
    if html is not None:
        check_page(Path(html))
        if output is not None and Path(html).resolve() == Path(output).resolve():
            raise BismoothError(f"--html {html}: is the file that -o writes. Expected another one.")


def _check_gpus(subjects: Sequence[Subject], gpus: Sequence[Gpu], *, estimate: bool) -> None:
    """Refuse what gives no bound."""
    for gpu in gpus:
        if not any(subject.is_for(gpu) for subject in subjects):
            built = "; ".join(f"{subject.path}: {_targets(subject)}" for subject in subjects)
            raise BismoothError(
                f"--gpu {gpu.name}: has compute capability {gpu.capability}, and none of the engines is for it: {built}. "
                f"Build one with: bismooth build ART --engine tensorrt-rtx --capability {gpu.capability}"
            )
    if estimate and not any(subject.is_for(gpu) for subject in subjects for gpu in gpus or known_gpus()):
        built = "; ".join(f"{subject.path}: {_targets(subject)}" for subject in subjects)
        raise BismoothError(f"--estimate: none of the engines is for a GPU whose figures are known: {built}.")


def _targets(subject: Subject) -> str:
    capabilities = subject.record.capabilities
    return f"for {', '.join(f'SM{number}' for number in capabilities)}" if capabilities else f"runs on the CPU"


def _bounds(
    engines: Sequence[Benched], cases: Sequence[Case], gpus: Sequence[Gpu], *, estimate: bool
) -> Iterator[tuple[int, Bound] | str]:
    """Bounds, and a sentence for each that there cannot be."""
    for place, engine in enumerate(engines):
        subject, wanted = engine.subject, gpus
        if not gpus and (estimate or engine.reason):
            wanted = known_gpus()
        for gpu in filter(subject.is_for, wanted):
            if subject.cost is None:
                yield subject.problem
                break
            for case in cases:
                both = bounds(gpu, subject.cost, case.batch, case.prompt_length, case.new_tokens)
                if max(bound.cost.bytes for bound in both) > gpu.memory_gb * 1e9:
                    yield f"{subject.path}: does not fit into the {gpu.memory_gb:g} GB of {gpu.name} with {case} tokens."
                else:
                    yield from ((place, bound) for bound in both)
