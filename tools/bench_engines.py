"""Measure engines side by side, and bound what they can do on GPUs that are not here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ..export.errors import BismoothError
from ..export.replacing import check_replaceable, replacing
from ..export.versions import tool_versions
from . import console
from .bench_measure import Measurement, Settings, machine, measure
from .bench_page import bench_page
from .bench_result import FORMAT, Benched, BenchResult
from .bench_subject import Case, Subject, load_subjects
from .hops import is_report
from .page import check_page, write_page
from .roofline import Bound, Gpu, bounds, find_gpus, known_gpus


def bench(
    engines: Sequence[str | Path],
    *,
    batch: Sequence[int] = (1,),
    prompt_length: Sequence[int] = (128, 512),
    new_tokens: int = 64,
    repeat: int = 5,
    warm_up: int = 1,
    threads: int | None = None,
    one_at_a_time: bool = False,
    data: Sequence[str] = (),
    gpus: Sequence[str] = (),
    estimate: bool = False,
    output: str | Path | None = None,
    html: str | Path | None = None,
) -> BenchResult:
    """Time prompts and new tokens with each engine, in alternating rounds: what disturbs the machine hits all alike.

    Every engine has a process of its own. One for a GPU that cannot be opened here is listed with the reason.
    Ctrl-C ends the measurement; the result then has the rounds that all engines had done.

    Args:
        engines: engine folders or bundles; ratios are to the first that can be measured.
        batch: numbers of rows.
        prompt_length: tokens of a prompt. Every batch is measured with every length.
        new_tokens: that follow each prompt, at least 2. No token ends a text.
        repeat: rounds per batch and length.
        warm_up: runs of each engine before the first round of a batch and length.
        threads: per operator, of engines that run on the CPU; one per core by default.
        one_at_a_time: close each engine before the next one runs: for engines that memory does not hold together.
        data: text to take prompts from; random token ids without.
        gpus: names of GPUs to bound the engines on, see :mod:`.roofline`. By default, for engines that were not
            measured, those that they were built for.
        estimate: measure nothing.
        output: a JSON file to write.
        html: a file for a page that shows the result; it needs the extra ``report``.

    Raises:
        BismoothError: no engines or one of them twice, one that is damaged, or has no room for a case; a GPU that is
            not known or that none of the engines is for; text that cannot be used; or ``output`` or ``html`` cannot be
            written or is a file of another kind.
    """
    _check_files(output, html)
    _check_sizes({"batch": batch, "prompt_length": prompt_length}, 1)
    _check_sizes({"new_tokens": [new_tokens]}, 2)
    _check_sizes({"repeat": [repeat]}, 1)
    subjects, chosen = load_subjects(engines, estimate=estimate), find_gpus(gpus)
    cases = [Case(*sizes, new_tokens) for sizes in product(dict.fromkeys(batch), dict.fromkeys(prompt_length))]
    for subject in subjects:
        subject.check(cases)
    _check_gpus(subjects, chosen, estimate=estimate)
    if estimate:
        run, asked = Measurement(tuple(map(Benched, subjects)), ()), dict[str, Any]()
    else:
        settings = Settings(repeat, warm_up, threads, one_at_a_time, tuple(data))
        with console.progress() as progress:
            run, asked = measure(subjects, cases, settings, progress), settings.to_json()
    bounded, problems = _bounds(run.engines, cases, chosen, estimate=estimate)
    result = BenchResult(
        run.engines,
        run.measured,
        tuple(bounded),
        {"new_tokens": new_tokens, **asked},
        machine(run.engines) if run.measured else {},
        (*_reasons(run.engines), *problems),
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


def _check_sizes(sizes: Mapping[str, Sequence[int]], least: int) -> None:
    for name, values in sizes.items():
        if not values or min(values) < least:
            got = ", ".join(map(str, values)) or "none"
            raise BismoothError(f"bench: {name}: Expected numbers from {least}, got {got}.")


def _check_gpus(subjects: Sequence[Subject], gpus: Sequence[Gpu], *, estimate: bool) -> None:
    """Refuse what gives no bound."""
    for gpu in gpus:
        if not any(subject.is_for(gpu) for subject in subjects):
            built = "; ".join(f"{subject.path}: {_targets(subject)}" for subject in subjects)
            raise BismoothError(
                f"--gpu {gpu.name}: none of the engines is for its compute capability {gpu.capability}: {built}. "
                "Choose another GPU, or build an engine for this one."
            )
    if estimate and not any(subject.is_for(gpu) for subject in subjects for gpu in gpus or known_gpus()):
        built = "; ".join(f"{subject.path}: {_targets(subject)}" for subject in subjects)
        raise BismoothError(f"--estimate: none of the engines is for a GPU whose figures are known: {built}.")


def _targets(subject: Subject) -> str:
    capabilities = subject.record.capabilities
    return f"for {', '.join(f'SM{number}' for number in capabilities)}" if capabilities else "runs on the CPU"


def _reasons(engines: Sequence[Benched]) -> Iterator[str]:
    return (f"{engine.subject.path}: was not measured: {engine.reason}" for engine in engines if engine.reason)


def _bounds(
    engines: Sequence[Benched], cases: Sequence[Case], gpus: Sequence[Gpu], *, estimate: bool
) -> tuple[list[tuple[int, Bound]], list[str]]:
    """Bounds by place of the engine, and a sentence where there can be none."""
    found: list[tuple[int, Bound]] = []
    problems: list[str] = []
    for place, engine in enumerate(engines):
        subject = engine.subject
        wanted = gpus or (known_gpus() if estimate or engine.reason else ())
        targets = list(filter(subject.is_for, wanted))
        if subject.cost is None:
            problems += [subject.problem] if targets else []
            continue
        for gpu, case in product(targets, cases):
            both = bounds(gpu, subject.cost, case.batch, case.prompt_length, case.new_tokens)
            if max(bound.cost.bytes for bound in both) > gpu.memory_gb * 1e9:
                problems.append(
                    f"{subject.path}: does not fit in the {gpu.memory_gb:g} GB of {gpu.name} at {case} tokens."
                )
            else:
                found += [(place, bound) for bound in both]
    return found, problems
