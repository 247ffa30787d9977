"""Measure time, memory and disk of every stage by the number of blocks, on models of LLaMA3-70B's shapes.

What docs/scale.md states. Every step is a process of its own, and starts with its files out of the page cache. Rows of
finished steps are kept until the bench is through: one that broke off goes on with what lacks. Models and artifacts are
deleted, whatever ends it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..export.errors import BismoothError
from ..export.replacing import replacing, scratch_folder
from . import console
from .bench_measure import machine
from .bench_scale_report import LEAST_MEMORY, MODELS, ScaleResult
from .bench_scale_rows import (
    BASELINES,
    FLOAT,
    LARGE,
    LENGTH,
    NO_BUDGET,
    QUANTIZED,
    SMALL,
    STEPS,
    STREAMED,
    TARGETS,
    WHOLE,
    Row,
    Rows,
)
from .bench_steps import Runner, Step, add_texts, texts
from .cli_errors import report
from .cli_options import parse_memory
from .demo import demo_model
from .large_model import LLAMA3_70B, Shape, write_large_model

BLOCKS = (2, 4, 8)
MEMORY, SMALL_MEMORY = "4GB", "700MB"
"""Budgets. That of large models is too little for the smallest as a whole: it streams as the largest does."""

_COPY = (
    'dd if="$1" of="$2" bs=1M count="$3" iflag=count_bytes conv=fsync status=none && '
    'dd if="$1" of=/dev/null bs=1M skip="$3" iflag=skip_bytes status=none'
)
_SCRIPTS = {"cp": _COPY, "cat": 'cat "$1" > /dev/null', "cat both": 'cat "$1" "$2" > /dev/null'}
"""Of a shell; $1 is the model, $2 a file to write, which has $3 bytes."""

_TOO_LITTLE = 1
"""Megabytes that no command does with."""

_MARGIN = 1e9
"""Bytes of disk for what is no weights."""


class ScaleBench:
    """The measurements, step by step.

    Args:
        output: folder to write.
        rows: those that are already there, and where new ones go.
        calibration: text to calibrate on.
        evaluation: text to verify on.
        memory: budget of calibration, quantization and verification of large models; None for none.
        shape: of the large models, but for their blocks.
        runner: of the steps.
    """

    def __init__(
        self,
        output: Path,
        rows: Rows,
        calibration: Sequence[str],
        evaluation: Sequence[str],
        memory: str | None,
        shape: Shape = LLAMA3_70B,
        runner: Runner | None = None,
    ) -> None:
        self._output, self._rows, self._shape, self._memory = output, rows, shape, memory
        self._calibration, self._evaluation = ("--data", *calibration), ("--data", *evaluation)
        self._runner = runner or Runner()

    def run(self, model: str, blocks: Sequence[int], steps: Sequence[str]) -> ScaleResult:
        """Measure what lacks of ``steps``; large models have the tokenizer of ``model``, the small one.

        Raises:
            BismoothError: the disk is too small, or a step fails.
        """
        with scratch_folder(self._output / SMALL) as place:
            art = place / FLOAT
            self._runner.bismooth("export", model, "-o", art, label="SmolLM2-135M: export")
            for count in blocks:
                self._large(count, [step for step in STEPS if step in steps], art)
            if SMALL in steps:
                for name, memory in ((WHOLE, None), (STREAMED, SMALL_MEMORY)):
                    self._small(name, memory, art)
            if TARGETS in steps:
                for name, shape in MODELS.items():
                    self._target(name, shape, art)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return ScaleResult(tuple(self._rows), self._shape, machine(()) | {"memory_bytes": memory}, self._rows.settings)

    def _large(self, blocks: int, steps: Sequence[str], tokenizer: Path) -> None:
        beside = {STEPS[step].beside for step in steps}
        wanted = (*steps, *(step for step in BASELINES if step in beside))
        lacking = [step for step in wanted if self._rows.get(LARGE, blocks, step) is None]
        if not lacking:
            return
        shape = replace(self._shape, blocks=blocks)
        self._check_disk(shape)
        with scratch_folder(self._output / "large") as place:
            write_large_model(place / "model", tokenizer, shape)
            needed = {need for step in STEPS if step in lacking for need in (step, *STEPS[step].needs)}
            for step in STEPS:
                if step in needed:
                    self._stage(blocks, step, place)
            shutil.rmtree(place / QUANTIZED, ignore_errors=True)
            needed = {*lacking, *(("cp",) if "cat both" in lacking else ())}
            for step in BASELINES:
                if step in needed:
                    self._baseline(blocks, step, place)

    def _stage(self, blocks: int, step: str, place: Path) -> None:
        known = self._rows.get(LARGE, blocks, step) is not None  # so that only its files are needed
        rounds: list[Row] = []
        for _ in range(1 if known else STEPS[step].rounds):
            if made := STEPS[step].makes:
                shutil.rmtree(place / made, ignore_errors=True)
            _drop_cache(place)
            before = _disk(place)
            done = self._runner.bismooth(*self._command(step, place), label=f"{blocks} blocks: {step}")
            rounds.append(Row(LARGE, blocks, step, done.seconds, done.peak_bytes, _disk(place) - before))
        if not known:
            self._rows.add(_summary(rounds))

    def _command(self, step: str, place: Path) -> tuple[str | Path, ...]:
        model, art, quantized = (place / name for name in ("model", FLOAT, QUANTIZED))
        text = ("--windows", str(STEPS[step].windows), "--length", str(LENGTH), *_budget(self._memory))
        match step:
            case "export":
                return ("export", model, "-o", art)
            case "calibrate":
                return ("calibrate", art, *self._calibration, *text)
            case "calibrate more":
                return ("calibrate", art, *self._calibration, *text, "-o", place / "more.safetensors")
            case "diagnose":
                return ("diagnose", art)
            case "convert" | "quantize":
                return ("quantize", art, "-o", quantized, "--recipe", STEPS[step].recipe, *_budget(self._memory))
            case _:
                return ("verify", quantized, *self._evaluation, *text)

    def _baseline(self, blocks: int, step: str, place: Path) -> None:
        written = max(row.written_bytes for row in self._rows if (row.model, row.blocks) == (LARGE, blocks))
        files = (place / "model/model.safetensors", place / "copy")
        command = ["sh", "-c", _SCRIPTS[step], "sh", *map(str, files), str(written)]
        rounds: list[Row] = []
        for _ in range(BASELINES[step]):
            _drop_cache(place)
            done = self._runner.process(f"{blocks} blocks: {step}", command)
            rounds.append(Row(LARGE, blocks, step, done.seconds, done.peak_bytes))
        self._rows.add(_summary(rounds))

    def _small(self, name: str, memory: str | None, art: Path) -> None:
        """Calibrate, quantize and verify; all of it again where a row lacks."""
        if self._rows.get(name, 0, "verify"):
            return
        statistics, quantized = art.with_name("statistics.safetensors"), art.with_name("w8a8")
        budget = _budget(memory)
        commands = {
            "calibrate": ("calibrate", art, *self._calibration, "-o", statistics, *budget),
            "quantize": ("quantize", art, "-o", quantized, "--force", "--statistics", statistics, *budget),
            "verify": ("verify", quantized, *self._evaluation, "--windows", "4", *budget),
        }
        for step, command in commands.items():
            done = self._runner.bismooth(*command, label=f"{name}: {step}")
            figures = _figures(done) if step == "verify" else {}
            self._rows.add(Row(name, 0, step, done.seconds, done.peak_bytes, figures=figures))

    def _target(self, name: str, shape: Shape, tokenizer: Path) -> None:
        """Export a model that has no weights on disk, and ask how much memory its calibration takes."""
        if self._rows.get(name, shape.blocks, "export"):
            return
        with scratch_folder(self._output / TARGETS) as place:
            model, art = place / "model", place / FLOAT
            write_large_model(model, tokenizer, shape, sparse=True)
            done = self._runner.bismooth("export", model, "-o", art, label=f"{name}: export")
            least = {LEAST_MEMORY: self._least_memory(name, art)}
            self._rows.add(Row(name, shape.blocks, "export", done.seconds, done.peak_bytes, figures=least))

    def _least_memory(self, name: str, art: Path) -> int:
        """Bytes, from the message that refuses less."""
        text = ("--windows", str(STEPS["calibrate"].windows), "--length", str(LENGTH))
        command = ("calibrate", art, *self._calibration, *text, "--memory", f"{_TOO_LITTLE}MB")
        try:
            self._runner.bismooth(*command, label=f"{name}: least memory")
        except BismoothError as refusal:
            if match := re.search(r"--memory .*Expected (\d+)MB or more", str(refusal)):
                return int(match[1]) * 10**6
            raise
        return _TOO_LITTLE * 10**6

    def _check_disk(self, shape: Shape) -> None:
        """For the model and, beside it, INT8 weights with embedding and head in 16 bits, or a file of that size."""
        needed = 2 * shape.parameters + shape.blocks * shape.block_parameters + 2 * shape.outer_parameters + _MARGIN
        free = shutil.disk_usage(self._output).free
        if free < needed:
            raise BismoothError(
                f"{self._output}: {shape.blocks} blocks take {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free. "
                "Free some, or choose another --output or fewer --blocks."
            )


def _summary(rounds: Sequence[Row]) -> Row:
    middle = sorted(rounds, key=lambda row: row.seconds)[len(rounds) // 2]
    return replace(middle, peak_bytes=max(row.peak_bytes for row in rounds))


def _budget(memory: str | None) -> tuple[str, ...]:
    return () if memory is None else ("--memory", memory)


def _figures(verified: Step) -> dict[str, float]:
    hops: dict[str, Any] = {hop["hop"]: hop["metrics"] for hop in verified.output["hops"]}
    return {
        "kl": hops["reference"]["kl"],
        "top1": hops["reference"]["top1"],
        "perplexity_ratio": hops["reference"]["perplexity_ratio"],
        "int8_kl": hops["int8"]["float_kl"],
    }


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _disk(folder: Path) -> int:
    """Bytes of the files in ``folder``, hard links counted once."""
    found = (path.stat() for path in _files(folder))
    return sum({(status.st_dev, status.st_ino): status.st_size for status in found}.values())


def _drop_cache(folder: Path) -> None:
    """Let the system forget the pages of the files, so that steps read from disk whatever ran before."""
    if sys.platform == "linux":
        for path in _files(folder):
            with path.open("rb") as file:
                os.fsync(file.fileno())  # pages that are not yet written stay
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(arguments: Iterable[str] | None = None) -> int:
    """Entry point of ``python -m bismooth.tools.bench_scale``: prints Markdown; status 1 if a limit does not hold."""
    parser = argparse.ArgumentParser(description="Measure time, memory and disk by the number of blocks.")
    add_texts(parser)
    choices = (*STEPS, SMALL, TARGETS)
    parser.add_argument("--blocks", nargs="+", type=int, default=list(BLOCKS), help="sizes of large models (2 4 8)")
    parser.add_argument("--steps", nargs="+", choices=choices, default=list(choices), help="what to measure (all)")
    parser.add_argument("--memory", default=MEMORY, help=f"budget on large models, or {NO_BUDGET} ({MEMORY})")
    parser.add_argument("--restart", action="store_true", help="discard the rows of a bench that broke off")
    parser.add_argument("--output", type=Path, default=Path("build/scale"), help="folder to write (build/scale)")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        memory = None if options.memory == NO_BUDGET else options.memory
        parse_memory(memory)  # which is read again at the end of hours
        options.output.mkdir(parents=True, exist_ok=True)
        calibration, evaluation = texts(options)
        settings = {"memory": options.memory, "calibration": calibration, "evaluation": evaluation}
        rows = Rows(options.output / "unfinished.json", settings, restart=options.restart)
        bench = ScaleBench(options.output, rows, calibration, evaluation, memory)
        result = bench.run(str(demo_model()), options.blocks, options.steps)
        for name, text in (("scale.json", console.json_text(result.to_json())), ("scale.md", result.markdown())):
            with replacing(options.output / name) as path:
                path.write_text(text, "utf-8")
        rows.finish()
        console.write(result.markdown())
        return 1 if console.failures(result) else 0
    except (Exception, KeyboardInterrupt) as error:
        return report(error, "bench", False)


if __name__ == "__main__":
    console.show_progress(True)  # of this process; main() leaves that of its caller
    sys.exit(main())
