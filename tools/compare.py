"""Compare any number of artifacts with one float reference, on the same windows of text."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..calibrators.data import load_tokenizer, load_windows
from ..engines.token_feeds import Port
from ..export.artifact import Artifact
from ..export.errors import BismoothError
from ..export.hashing import array_sha256
from ..export.replacing import check_replaceable, replacing
from ..export.versions import tool_versions
from . import console
from .bootstrap import Resampling, Rows, difference, interval
from .compare_page import comparison_page
from .compared import FORMAT, Compared, CompareResult, Estimate
from .comparison import Figures, Ids, Replicates, Track, WindowFile, comparison_of, follow
from .finished import finished_engine
from .hops import is_report
from .meant import quantize_stage
from .page import check_page, write_page
from .programs import Program, Programs, float_graph, in_float, scratch
from .shipped import find_engines
from .stages import check_length

_LOGITS = ("kl", "kl_p99", "perplexity", "perplexity_ratio", "log_perplexity", "top1")
_FEATURES = ("cosine_p5", "sqnr_db")
_DIFFERENCES = ("kl", "log_perplexity", "top1", *_FEATURES)
_FEW = 8
"""Windows below which intervals are rough."""

_ADVICE = "Compare artifacts of one model, or of models that differ in their weights alone."


def compare(
    artifacts: Sequence[str | Path],
    data: Sequence[str],
    *,
    reference: str | Path | None = None,
    windows: int = 16,
    length: int = 512,
    skip_windows: int = 0,
    memory: int | None = None,
    output: str | Path | None = None,
    html: str | Path | None = None,
) -> CompareResult:
    """Run the float32 graphs of artifacts, Q/DQ in float arithmetic, and hold each against the reference.

    Intervals are of :mod:`.bootstrap`, on the same resamples for all artifacts; differences are to the first of them.

    Args:
        artifacts: folders, float or quantized, all with one tokenizer; their weights may differ.
        data: text, as ``verify`` takes it.
        reference: the artifact whose float graph is the reference; the first of ``artifacts`` by default. Of a
            quantized artifact it is the graph that was quantized.
        windows: how many windows.
        length: tokens per window.
        skip_windows: windows to pass over first.
        memory: bytes that this process may take; most of what the machine has left by default.
        output: a JSON file to write.
        html: a file for a page that shows the result; it needs the extra ``report``.

    Raises:
        BismoothError: no artifacts or one of them twice, one that cannot be run, or whose vocabulary or tokenizer is
            not the reference's, too little memory, text that cannot be used, a reference that gives NaN or infinity, or
            ``output`` or ``html`` cannot be written or is a file of another kind.
    """
    if output is not None:
        check_replaceable(Path(output), "a report of 'bismooth compare'", lambda path: is_report(path, FORMAT))
    if html is not None:
        check_page(Path(html))
        if output is not None and Path(html).resolve() == Path(output).resolve():
            raise BismoothError(f"--html {html}: is the file that -o writes. Expected another one.")
    paths = [Path(artifact) for artifact in artifacts]
    _check_paths(paths)
    loaded = [Artifact.load(path, "float", "quantized") for path in paths]
    base = loaded[0] if reference is None else Artifact.load(Path(reference), "float", "quantized")
    for artifact in (base, *loaded):
        check_length(artifact, length)
        quantize_stage(artifact)
    ids = _load_ids(base, loaded, data, windows, length, skip_windows)
    engines, problems = zip(*map(_engines, loaded), strict=True)
    with console.progress() as progress:
        runs = list(_run_all(base, loaded, ids, memory, progress))
    result = CompareResult(
        base.path,
        *ids.shape,
        reference_perplexity=next((run.figures.get("reference_perplexity") for run in runs if run.figures), None),
        artifacts=tuple(_compared(run, runs[0], rows) for run, rows in zip(runs, engines, strict=True)),
        notes=(*_notes(base, runs, len(ids)), *chain.from_iterable(problems)),
        data={"data": list(map(str, data)), "data_sha256": array_sha256(ids)},
        tools=tool_versions(),
    )
    if output is not None:
        with replacing(Path(output)) as temporary:
            temporary.write_text(console.json_text(result.to_json()), "utf-8")
    if html is not None:
        write_page(Path(html), comparison_page(result))
    return result


@dataclass(frozen=True)
class _Run:
    """One artifact against the reference: its figures, the same on all resamples, or why there are none.

    Both are empty where the outputs are not finite; ``replicates`` also if there is one window.
    """

    artifact: Artifact
    figures: Figures
    replicates: Replicates
    failure: str | None
    seconds: float

    @property
    def names(self) -> tuple[str, ...]:
        """The figures that are compared."""
        if not self.figures:
            return ()
        return _LOGITS if "kl" in self.figures else _FEATURES


def _check_paths(paths: Sequence[Path]) -> None:
    if not paths:
        raise BismoothError("compare: Expected one or more artifacts, got none.")
    seen: dict[Path, Path] = {}
    for path in paths:
        if (first := seen.setdefault(path.resolve(), path)) is not path:
            raise BismoothError(f"{path}: is given twice, as {first} before. Expected each artifact once.")


def _load_ids(
    base: Artifact, artifacts: Sequence[Artifact], data: Sequence[str], windows: int, length: int, skip: int
) -> Ids:
    """Token windows [N, S] that the tokenizers of all artifacts make of the text."""

    def encode(tokenizer: Tokenizer) -> Ids:
        return load_windows(data, tokenizer, windows=windows + skip, length=length).ids[skip:]

    tokenizer = load_tokenizer(base.path)
    ids, vocabulary = encode(tokenizer), tokenizer.get_vocab()
    for artifact in artifacts:
        other = tokenizer if artifact.path == base.path else load_tokenizer(artifact.path)
        if other.get_vocab() != vocabulary:
            raise BismoothError(
                f"{artifact.path}: its tokenizer has another vocabulary than that of the reference {base.path}. "
                f"Expected the same. {_ADVICE}"
            )
        if not np.array_equal(encode(other), ids):
            raise BismoothError(
                f"{artifact.path}: its tokenizer makes other tokens of the text than that of the reference "
                f"{base.path}. Expected the same. {_ADVICE}"
            )
    return ids


def _run_all(
    base: Artifact, artifacts: Sequence[Artifact], ids: Ids, memory: int | None, progress: console.Report
) -> Iterator[_Run]:
    """Run the reference and then each artifact."""
    resampling = Resampling(len(ids)) if len(ids) > 1 else None
    reference, *others = float_graph(base, len(ids)), *(in_float(artifact, len(ids)) for artifact in artifacts)
    Programs(ids, base.path, progress, memory).check(base.path, [reference, *others], "or a shorter --length")
    with WindowFile([base.path, Path(tempfile.gettempdir())], len(ids)) as outputs:
        with scratch(base.path) as folder:
            port = _run_reference(reference, Programs(ids, folder, progress, memory), outputs)
        make = comparison_of(base, port)
        for artifact, program in zip(artifacts, others, strict=True):
            start, track = time.perf_counter(), Track(make())
            with scratch(artifact.path) as folder:
                programs = Programs(ids, folder, progress, memory)
                _check_width(artifact, programs.output(program.path), base, port)
                follow(ids, programs.outputs(program, f"run {artifact.path}"), (track, outputs))
            figures, replicates, step = track.figures(), dict[str, Rows](), f"resample {artifact.path}"
            if figures and resampling:
                progress(step, 0, 1)
                replicates = track.comparison.resampled(resampling)
                progress(step, 1, 1)
            yield _Run(artifact, figures, replicates, track.failure, time.perf_counter() - start)


def _run_reference(reference: Program, programs: Programs, outputs: WindowFile) -> Port:
    """Store the outputs of the reference, and say what they are."""
    for values in programs.outputs(reference, "run the reference"):
        if not np.isfinite(values).all():
            raise BismoothError(
                f"{reference.path}: the outputs of the reference hold NaN or infinity. Expected finite numbers. "
                "Check the weights of the source."
            )
        outputs.append(values)
    return programs.output(reference.path)


def _check_width(artifact: Artifact, output: Port, base: Artifact, expected: Port) -> None:
    if output.shape[-1:] != expected.shape[-1:]:
        raise BismoothError(
            f"{artifact.path}: its graph gives {output.shape[-1]} values per token, that of the reference {base.path} "
            f"{expected.shape[-1]}. Expected the same vocabulary. {_ADVICE}"
        )


def _notes(base: Artifact, runs: Sequence[_Run], windows: int) -> Iterator[str]:
    if windows < 2:
        yield "One window gives no confidence intervals. Ask for more --windows."
    elif windows < _FEW:
        yield f"Confidence intervals of {windows} windows are rough. Ask for {_FEW} or more --windows."
    for run in runs:
        path, source, other = run.artifact.path, run.artifact.manifest.source, base.manifest.source
        if source.get("path") != other.get("path"):
            yield f"{path}: was made from {source.get('path')}, the reference from {other.get('path')}."
        elif source != other:
            yield f"{path}: was made from {source.get('path')} as it was at another time than for the reference."
        if run.failure:
            yield f"{path}: {run.failure}"


def _engines(artifact: Artifact) -> tuple[list[dict[str, Any]], list[str]]:
    """What ``build`` says of each engine of the artifact, and a sentence for each that is not to be trusted."""
    engines, problems = find_engines(artifact)
    rows: list[dict[str, Any]] = []
    for engine in engines:
        try:
            row = finished_engine(engine).to_json()
        except BismoothError as error:
            problems.append(str(error))
        else:
            del row["wall_seconds"]
            rows.append(row | {"build_seconds": engine.build_seconds})
    return rows, problems


def _compared(run: _Run, first: _Run, engines: Sequence[Mapping[str, Any]]) -> Compared:
    from ..passes.quantize import WEIGHTS

    stage, weights = quantize_stage(run.artifact), run.artifact.manifest.files.get(WEIGHTS)
    return Compared(
        run.artifact.path,
        stage["recipe"]["name"] if stage else None,
        weights.size if weights else None,
        {name: _estimate(run.figures[name], run.replicates.get(name)) for name in run.names},
        {} if run is first else _differences(run, first),
        tuple(engines),
        run.seconds,
    )


def _differences(run: _Run, first: _Run) -> dict[str, Estimate]:
    return {
        name: _estimate(
            float(difference(run.figures[name], first.figures[name])),
            difference(run.replicates[name], first.replicates[name]) if run.replicates else None,
        )
        for name in run.names
        if name in _DIFFERENCES and name in first.names
    }


def _estimate(value: float, replicates: Rows | None) -> Estimate:
    return Estimate(value, None if replicates is None else interval(replicates))
