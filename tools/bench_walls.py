"""Measure the remedies for weights with walls, on stand-ins and on a model of LLaMA3-70B's shapes.

What docs/llama3-70b.md states. Results go to ``OUTPUT/walls.json``; each step is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log10
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from . import console
from .bench_steps import Runner, add_texts, texts
from .cli_errors import report
from .demo import demo_model
from .large_model import LLAMA3_70B, write_large_model

RECIPES: Mapping[str, tuple[str, ...]] = {
    "w8a8-per-channel": ("w8a8-per-channel",),
    "w8a8": ("w8a8",),
    "w8a8, no data": ("w8a8", "--data", "none"),
    "w8a8-mixed": ("w8a8-mixed",),
    "w8a8-mixed+bismooth": ("w8a8-mixed+bismooth",),
}
GROUPS = (16, 32, 64)
"""Contiguous groups for the linears with walls, reported beside."""

KINDS = ("scale", "rotate")
CAPABILITIES = ("75", "89")
ENGINES = ("w8a8", "w8a8-mixed", "groups of 64")
"""What is built of one stand-in, for the size and the kernels."""


@dataclass(frozen=True)
class Limit:
    """What must hold: a figure of a recipe on stand-ins, against what it is on the unmodified model.

    Attributes:
        kind: Of the stand-ins.
        factor: Of the stand-ins; None for all.
        recipe: Whose KL is judged.
        base: The recipe whose KL on ``of`` it is divided by; None: the KL itself.
        of: ``model`` or the stand-in's own ``kind``.
        at_most: The largest allowed, or
        above: the smallest.
    """

    kind: str
    factor: int | None
    recipe: str
    base: str | None = None
    of: str = "model"
    at_most: float | None = None
    above: float | None = None


LIMITS = (
    Limit("scale", 100, "w8a8-per-channel", above=0.15),
    Limit("scale", 300, "w8a8-per-channel", above=2.0),
    Limit("scale", None, "w8a8", "w8a8", at_most=1.05),
    Limit("scale", None, "w8a8, no data", "w8a8, no data", at_most=1.3),
    Limit("scale", None, "w8a8-mixed", "w8a8-per-channel", at_most=1.3),
    Limit("rotate", None, "w8a8-mixed", "w8a8-per-channel", at_most=1.5),
    Limit("rotate", None, "w8a8-mixed", "w8a8", of="rotate", at_most=0.5),
    Limit("rotate", None, "w8a8-mixed", "float where walls are", of="rotate", at_most=1.05),
)


@dataclass(frozen=True)
class WallsResult:
    """Rows of the tables in the documentation."""

    accuracy: tuple[dict[str, Any], ...]
    limits: tuple[dict[str, Any], ...]
    engines: tuple[dict[str, Any], ...]
    large: tuple[dict[str, Any], ...]
    large_linears: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        return {key: list(getattr(self, key)) for key in ("accuracy", "limits", "engines", "large", "large_linears")}

    def brief(self) -> dict[str, Any]:
        """All but the figures of single linears."""
        return {key: rows for key, rows in self.to_json().items() if key != "large_linears" and rows}


class WallsBench:
    """The measurements, step by step."""

    def __init__(self, output: Path, calibration: Sequence[str], evaluation: Sequence[str], windows: int) -> None:
        self._output, self._calibration, self._evaluation = output, list(calibration), list(evaluation)
        self._windows = windows
        self._runner = Runner()

    def run(
        self, model: str, kinds: Sequence[str], factors: Sequence[int], seeds: Sequence[int], *, large: bool
    ) -> WallsResult:
        """All measurements of one model and its stand-ins."""
        source = self._output / "model"
        self._runner.bismooth("export", model, "-o", source, "--force")
        accuracy = [{"model": "unmodified", **row} for row in self._recipes(source, RECIPES)]
        engines: list[dict[str, Any]] = []
        for kind in kinds:
            for factor in factors:
                for seed in seeds:
                    made, art = self._output / "standin", self._output / "standin-float"
                    options = ("--kind", kind, "--factor", str(factor), "--seed", str(seed), "--force")
                    self._runner.bismooth("standin", source, "-o", made, *options)
                    self._runner.bismooth("export", made, "-o", art, "--force")
                    first = seed == seeds[0]
                    rows = self._recipes(art, {**RECIPES, **self._grouped()}, half=first)
                    label = {"model": kind, "factor": factor, "seed": seed}
                    accuracy += [{**label, **row} for row in rows]
                    if first and factor == factors[0]:
                        engines += [{"model": kind, "factor": factor, **row} for row in self._engines()]
        steps, linears = self._large(source) if large else ([], [])
        limits = tuple(judged(accuracy))
        return WallsResult(tuple(accuracy), limits, tuple(engines), tuple(steps), tuple(linears))

    def _grouped(self) -> dict[str, tuple[str, ...]]:
        """Recipes as files: contiguous groups of each size for the linears with walls, and these in float."""
        weights = {f"groups of {size}": f"{{granularity: per_group, group_size: {size}}}" for size in GROUPS}
        weights["float where walls are"] = "null"
        made: dict[str, tuple[str, ...]] = {}
        for number, (name, words) in enumerate(weights.items()):
            path = self._output / f"walls-{number}.yaml"
            rule = f'{{match: "@walls", weights: {words}}}'
            path.write_text(f"extends: w8a8-per-channel\nlayers:\n  - {rule}\n", "utf-8")
            made[name] = (str(path),)
        return made

    def _recipes(
        self, art: Path, recipes: Mapping[str, Sequence[str]], *, half: bool = False
    ) -> Iterator[dict[str, Any]]:
        """How far each recipe is from the float model, all on the same windows."""
        self._runner.bismooth("calibrate", art, "--data", *self._calibration)
        folders = {name: self._folder(name) for name in recipes}
        for name, options in recipes.items():
            command = ("quantize", art, "-o", folders[name], "--force", "--recipe", *options)
            self._runner.bismooth(*command, label=f"quantize {name}")
        text = ("--data", *self._evaluation, "--windows", str(self._windows))
        compared = self._runner.bismooth("compare", *folders.values(), *text).output["artifacts"]
        for name, row in zip(recipes, compared, strict=True):
            figures = {key: row["figures"][key]["value"] for key in ("kl", "top1", "perplexity_ratio")}
            interval = [row["figures"]["kl"][key] for key in ("low", "high")]
            yield {
                "recipe": name,
                **figures,
                "kl_interval": interval,
                **self._simulated(folders[name], name, half, text),
            }

    def _simulated(self, folder: Path, name: str, half: bool, text: Sequence[str]) -> dict[str, Any]:
        """What per-channel scales do in simulated float16 and in INT8 kernels: the error is not one of overflow."""
        if not half or name != "w8a8-per-channel":
            return {}
        self._runner.bismooth("verify", folder, *text, "--hop", "reference", "int8", "half", label=f"verify {name}")
        report = json.loads((folder / "verify-partial.json").read_text("utf-8"))
        hops = {hop["hop"]: hop["metrics"] for hop in report["hops"]}
        return {
            "kl_int8": hops["int8"]["float_kl"],
            "kl_half": hops["half"]["kl"],
            "half_max_ratio": hops["half"]["half_max_ratio"],
        }

    def _folder(self, name: str) -> Path:
        return self._output / name.replace(", ", "-").replace(" ", "-")

    def _engines(self) -> Iterator[dict[str, Any]]:
        keys = ("engine_bytes", "int8_linears", "int8_gemms", "kernels", "int8_mac_share")
        for name in ENGINES:
            for capability in CAPABILITIES:
                yield {"recipe": name, "sm": capability, **self._built(self._folder(name), capability, keys)}

    def _built(self, folder: Path, capability: str, keys: Sequence[str]) -> dict[str, Any]:
        command = ("build", folder, "--engine", "tensorrt-rtx", "--force", "--capability", capability)
        built = self._runner.bismooth(*command, label=f"build {folder.name} sm{capability}").output
        return {key: built[key] for key in keys}

    def _large(self, tokenizer: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Time and peak memory by step, and the linears' output errors as SQNR."""
        made, walls, art = (self._output / f"large{suffix}" for suffix in ("", "-standin", "-float"))
        shutil.rmtree(made, ignore_errors=True)
        words = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
        write_large_model(made, tokenizer, replace(LLAMA3_70B, blocks=3, vocabulary=words, tied=True))
        self._runner.steps.clear()
        self._runner.bismooth("standin", made, "-o", walls, "--factor", "100", "--blocks", "0,1", "--force")
        self._runner.bismooth("export", walls, "-o", art, "--force")
        self._runner.bismooth("calibrate", art, "--data", *self._calibration, "--windows", "2")
        statistics = ("--statistics", art / "statistics.safetensors")
        found = self._runner.bismooth("diagnose", art, *statistics, label="diagnose").output
        for recipe in ("w8a8-mixed", "w8a8"):
            folder = self._output / f"large-{recipe}"
            command = ("quantize", art, "-o", folder, "--force", "--recipe", recipe)
            self._runner.bismooth(*command, label=f"quantize {recipe}")
        self._built(self._output / "large-w8a8-mixed", CAPABILITIES[-1], ())
        return [step.to_row() for step in self._runner.steps], [
            {"linear": linear["name"], "flagged": linear["flagged"], **_decibels(linear["output_errors"])}
            for linear in found["linears"]
        ]


def _decibels(errors: Mapping[str, float]) -> dict[str, float]:
    """Relative errors as signal-to-noise ratios."""
    return {f"sqnr_db_{name}": -20 * log10(error) for name, error in errors.items()}


def judged(accuracy: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The limits, and the worst of the stand-ins that they are for."""
    for limit in LIMITS:
        rows = [
            row
            for row in accuracy
            if row["model"] == limit.kind and row["recipe"] == limit.recipe and limit.factor in (None, row["factor"])
        ]
        if not rows:
            continue
        ratios = [row["kl"] / _base(accuracy, limit, row) for row in rows]
        worst = max(ratios) if limit.at_most is not None else min(ratios)
        holds = worst <= limit.at_most if limit.at_most is not None else worst > (limit.above or 0)
        what = "KL" if limit.base is None else f"KL / KL of {limit.base} on {limit.of}"
        bound = f"at most {limit.at_most:g}" if limit.at_most is not None else f"above {limit.above:g}"
        stand_ins = limit.kind if limit.factor is None else f"{limit.kind}, factor {limit.factor}"
        yield {
            "stand-ins": stand_ins,
            "recipe": limit.recipe,
            "figure": what,
            "limit": bound,
            "worst": worst,
            "holds": holds,
        }


def _base(accuracy: Sequence[Mapping[str, Any]], limit: Limit, row: Mapping[str, Any]) -> float:
    if limit.base is None:
        return 1.0
    place = ("model", "factor", "seed") if limit.of != "model" else ()
    model = "unmodified" if limit.of == "model" else limit.of
    return next(
        other["kl"]
        for other in accuracy
        if other["model"] == model and other["recipe"] == limit.base and all(other[key] == row[key] for key in place)
    )


def main(arguments: Iterable[str] | None = None) -> int:
    """Entry point of ``python -m bismooth.tools.bench_walls``."""
    parser = argparse.ArgumentParser(description="Measure remedies for weights with walls.")
    parser.add_argument("--model", default=None, help="model to make stand-ins of (SmolLM2-135M-Instruct)")
    add_texts(parser)
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens to evaluate on (4)")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="kinds of stand-ins")
    parser.add_argument("--factors", nargs="+", type=int, default=[100, 300], help="how large walls are (100 300)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the stand-ins (0 1 2)")
    parser.add_argument("--large", action="store_true", help="three blocks of LLaMA3-70B's shapes too (25 GB of disk)")
    parser.add_argument("--output", type=Path, default=Path("build/bench-walls"), help="folder to write")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        bench = WallsBench(options.output, *texts(options), options.windows)
        model = options.model or str(demo_model())
        result = bench.run(model, options.kinds, options.factors, options.seeds, large=options.large)
        (options.output / "walls.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", "utf-8")
        console.show(result, as_json=False)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return report(error, "bench", False)


if __name__ == "__main__":
    sys.exit(main())
