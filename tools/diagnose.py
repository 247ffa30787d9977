"""``bismooth diagnose``: which layers' weights break per-channel INT8, and what repairs them. Runs nothing."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.memory import return_large_blocks
from ..export.artifact import MANIFEST, Artifact
from ..export.errors import BismoothError
from ..passes.diagnosis import Diagnosis, diagnose_weight, output_errors, scaled_error
from ..passes.graph import load
from ..passes.linears import Linear, find_linears
from ..passes.open_graph import OpenGraph
from ..passes.parallel import ordered_map
from ..passes.sites import Site, find_sites
from ..passes.smoothing import Activations
from ..passes.walls import find_walls
from ..passes.weight_reader import WeightReader
from ..passes.weight_scan import scan
from . import console
from .diagnose_page import Picture, diagnosis_page
from .exporting import float_artifact
from .page import check_page, write_page

_SHOWN = 5


@dataclass(frozen=True)
class Remedy:
    """A way to repair flagged linears.

    Attributes:
        name: ``bismooth``, ``bismooth without data`` or ``mixed``.
        errors: Relative error of the other weights with it, by the linears that it repairs.
        before: The same under per-channel INT8, root mean square.
        cost: What it costs at run time, in words.
        command: How to apply it.
        outputs: Relative error of their outputs with it and under per-channel INT8, root mean square; None without
            statistics.
    """

    name: str
    errors: Mapping[str, float]
    before: float
    cost: str
    command: str
    outputs: tuple[float, float] | None = None

    @property
    def linears(self) -> int:
        """How many of the flagged ones it repairs."""
        return len(self.errors)

    @property
    def error(self) -> float:
        """Root mean square of its errors."""
        return _mean(self.errors.values())

    def to_json(self) -> dict[str, Any]:
        return self.brief() | {"command": self.command}

    def brief(self) -> dict[str, Any]:
        """All but the command."""
        return {
            "remedy": self.name,
            "linears": self.linears,
            "weight_error": self.error,
            "weight_error_without": self.before,
            **(dict(zip(("output_error", "output_error_without"), self.outputs, strict=True)) if self.outputs else {}),
            "cost": self.cost,
        }


@dataclass(frozen=True)
class DiagnoseResult:
    """What was found in a model's weights."""

    model: str
    linears: tuple[Diagnosis, ...]
    remedies: tuple[Remedy, ...]
    bytes_read: int
    read_seconds: float

    @property
    def flagged(self) -> tuple[Diagnosis, ...]:
        """The linears that per-channel INT8 breaks."""
        return tuple(item for item in self.linears if item.flagged)

    @property
    def verdict(self) -> str:
        """The finding in words."""
        if not self.flagged:
            worst = max(self.linears, key=lambda item: item.lost_bits)
            return (
                f"None of the {len(self.linears)} linears is at risk under per-channel INT8 weights. The most uneven "
                f"one is {worst.name}: {worst.lost_bits:.2f} bits lost."
            )
        shares = self._shares()
        worst = max(self.flagged, key=lambda item: item.rest_errors["per_channel"])
        return (
            f"{len(self.flagged)} of {len(self.linears)} linears ({shares['linears']:.1%}; {shares['parameters']:.1%} "
            "of their parameters) are at risk under per-channel INT8 weights: a few input channels are far larger than "
            f"the others and take their resolution. The worst is {worst.name}, where {len(worst.channels)} of "
            f"{worst.k} channels leave the other weights a relative error of {worst.rest_errors['per_channel']:.2g}."
        )

    def shown(self) -> Sequence[Diagnosis]:
        """The flagged linears, or the most uneven ones if there are none."""
        return self.flagged or sorted(self.linears, key=lambda item: -item.lost_bits)[:_SHOWN]

    def to_json(self) -> dict[str, Any]:
        return {
            **self._head(),
            "verdict": self.verdict,
            "linears": [item.to_json() for item in self.linears],
            "remedies": [remedy.to_json() for remedy in self.remedies],
            "failures": [self.verdict] if self.flagged else [],
        }

    def brief(self) -> Mapping[str, Any]:
        """The flagged linears, or the most uneven ones if there are none."""
        shown = self.shown()
        rows = [
            {
                "linear": item.name,
                "channels": ", ".join(map(str, item.channels)) or "none",
                "lost_bits": item.lost_bits,
                "error": item.rest_errors["per_channel"],
                "bismoothed": item.rest_errors["bismoothed"],
            }
            for item in shown
        ]
        outputs = [{"linear": item.name, **item.output_errors} for item in shown if item.output_errors]
        return {
            **self._head(),
            **({} if self.flagged else {"verdict": self.verdict}),
            **{f"to apply {remedy.name}": remedy.command for remedy in self.remedies},
            "linears at risk" if self.flagged else "most uneven linears": rows,
            **({"output errors": outputs} if any(outputs) else {}),
            "remedies": [remedy.brief() for remedy in self.remedies],
        }

    def _head(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "flagged": len(self.flagged),
            **{f"flagged_{name}_share": share for name, share in self._shares().items()},
            "bytes_read": self.bytes_read,
            "mb_per_second": self.bytes_read / 1e6 / self.read_seconds if self.read_seconds else None,
        }

    def _shares(self) -> dict[str, float]:
        total = sum(item.n * item.k for item in self.linears)
        return {
            "linears": len(self.flagged) / max(len(self.linears), 1),
            "parameters": sum(item.n * item.k for item in self.flagged) / max(total, 1),
        }


def diagnose(
    source: str | Path,
    *,
    statistics: str | Path | None = None,
    html: str | Path | None = None,
    trust_remote_code: bool = False,
) -> DiagnoseResult:
    """Look for layers whose weights break per-channel INT8 (arXiv 2408.15301), some rows of a weight per core at once.

    Args:
        source: a Hugging Face folder or hub id, a GGUF or ONNX file, or a float artifact.
        statistics: those of 'bismooth calibrate', to measure output errors on.
        html: a file for a page that shows the result; it needs the extra ``report``.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        BismoothError: the source cannot be used or has no linears, the statistics cannot be read or are of another
            model, a weight holds NaN or infinity, or ``html`` cannot be written or is a file of another kind.
    """
    if html is not None:
        check_page(Path(html))
    return_large_blocks()
    with float_artifact(source, trust_remote_code=trust_remote_code) as artifact:
        graph = load(artifact.graph("float32"))
        linears, reader = find_linears(graph), WeightReader(OpenGraph(graph))
        if not linears:
            raise BismoothError(
                f"{source}: has no linear layers. Expected some (MatMul or Gemm with a constant matrix); convolutions "
                "are not looked at."
            )
        activations = _load_statistics(Path(statistics), artifact) if statistics is not None else None
        found: dict[str, _Seen] = {}
        # The widest first: those that work at once are the same in a model of any size, and so is the peak memory.
        widest_first = sorted(linears, key=lambda linear: (-linear.k, -linear.n))
        look, start = partial(_look, reader, activations, html is not None), time.perf_counter()
        with console.progress() as progress:
            for seen in ordered_map(look, widest_first, at_once=os.cpu_count() or 1):
                found[seen.diagnosis.name] = seen
                progress("diagnose", len(found), len(linears))
        seconds = time.perf_counter() - start
        diagnoses = tuple(found[linear.name].diagnosis for linear in linears)
        flagged = [item for item in diagnoses if item.flagged]
        known = {linear.name: linear for linear in linears}
        sites = find_sites(graph, linears)[0] if flagged else []
        foldable = [item for item in flagged if any(_folds(site, item) for site in sites)]
        repaired = _without_data(flagged, sites, known, reader)
    offered = tuple(_remedies(_Commands(source, trust_remote_code), flagged, foldable, repaired))
    remedies = tuple(sorted(offered, key=lambda remedy: remedy.outputs or (0.0, 0.0)))  # the best first, if known
    result = DiagnoseResult(str(source), diagnoses, remedies, sum(seen.nbytes for seen in found.values()), seconds)
    if html is not None:
        pictures = {name: seen.picture for name, seen in found.items() if seen.picture is not None}
        write_page(Path(html), diagnosis_page(result, pictures))
    return result


def _load_statistics(path: Path, artifact: Artifact) -> Activations:
    from ..calibrators.calibration import StatisticsCalibration
    from ..calibrators.run import hash_model
    from ..calibrators.statistics import Statistics

    statistics = Statistics.load(path)
    statistics.check_graph(hash_model(artifact.graph("float32")))
    return StatisticsCalibration(statistics)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What is found in a weight, its bytes as stored, and its picture if one is wanted."""

    diagnosis: Diagnosis
    nbytes: int
    picture: Picture | None


def _look(reader: WeightReader, activations: Activations | None, with_picture: bool, linear: Linear) -> _Seen:
    seen = scan(linear, partial(reader.pieces, linear.weight))
    found = diagnose_weight(linear, seen)
    if activations is not None:
        errors = output_errors(seen, activations.rows(linear.x), activations.absmax(linear.x))
        found = replace(found, output_errors=errors)
    return _Seen(found, seen.nbytes, Picture.of(seen) if with_picture else None)


def _folds(site: Site, item: Diagnosis) -> bool:
    """Whether all walls of a linear can be scaled at a site."""
    labels = next((use.labels for use in site.consumers if use.linear == item.name), None)
    if labels is None:
        return False
    channels = labels[list(item.channels)]
    return bool((channels >= 0).all() and site.free[channels].all())


def _without_data(
    flagged: Sequence[Diagnosis], sites: Sequence[Site], linears: Mapping[str, Linear], reader: WeightReader
) -> dict[str, float]:
    """What smoothing by the weights alone leaves of the error, by linear; those where it scales all walls."""
    errors: dict[str, float] = {}
    for site in sites:
        concerned = [item for item in flagged if _folds(site, item)]
        if not concerned:
            continue
        s = find_walls([(partial(reader.blocks, linears[use.linear]), use.labels) for use in site.consumers], site.free)
        labels = {use.linear: use.labels for use in site.consumers}
        for item in concerned:
            columns = np.where(labels[item.name] < 0, 1.0, s[labels[item.name]]).astype(np.float32)
            if (columns[list(item.channels)] != 1).all():
                linear = linears[item.name]
                rows = scan(linear, partial(reader.pieces, linear.weight)).rows
                errors[item.name] = scaled_error(rows, item.channels, columns)
    return errors


@dataclass(frozen=True)
class _Commands:
    """What applies a remedy to a model or a float artifact."""

    source: str | Path
    trust_remote_code: bool

    def __call__(self, recipe: str, *, with_data: bool) -> str:
        """The command for a recipe, with calibration data or without."""
        model = shlex.quote(str(self.source))
        if (Path(self.source) / MANIFEST).is_file():
            quantize = f"bismooth quantize {model} --recipe {recipe} -o OUT"
            return f"bismooth calibrate {model} --data FILE && {quantize}" if with_data else f"{quantize} --data none"
        trust = " --trust-remote-code" if self.trust_remote_code else ""
        data = "FILE" if with_data else "none --verify-data FILE"
        return f"bismooth compile {model} --recipe {recipe} --engine onnxruntime -o OUT{trust} --data {data}"


def _remedies(
    commands: _Commands, flagged: Sequence[Diagnosis], foldable: Sequence[Diagnosis], repaired: Mapping[str, float]
) -> Iterator[Remedy]:
    free = "none: the factors are folded into the operations before"
    seen = all(item.output_errors for item in flagged)
    if not seen:
        free += "; where walls meet large activations it does not help, which --statistics shows"
    if foldable:
        errors = {item.name: item.rest_errors["bismoothed"] for item in foldable}
        command = commands("w8a8", with_data=True)
        yield Remedy("bismooth", errors, _before(foldable), free, command, _outputs(foldable, "bismoothed"))
    if repaired and not seen:
        items = [item for item in flagged if item.name in repaired]
        command = commands("w8a8", with_data=False)
        yield Remedy("bismooth without data", repaired, _before(items), free, command)
    if flagged:
        errors = {item.name: item.rest_errors["per_magnitude"] for item in flagged}
        cost = "a thin INT8 product for each input of them, and a few small kernels"
        command = commands("w8a8-mixed", with_data=False)
        yield Remedy("mixed", errors, _before(flagged), cost, command, _outputs(flagged, "per_magnitude"))


def _outputs(items: Sequence[Diagnosis], scheme: str) -> tuple[float, float] | None:
    """Output errors of linears by a scheme and per channel, root mean square; None without statistics."""
    found = [item.output_errors for item in items if item.output_errors]
    if len(found) < len(items):
        return None
    return _mean(errors[scheme] for errors in found), _mean(errors["per_channel"] for errors in found)


def _before(items: Sequence[Diagnosis]) -> float:
    return _mean(item.rest_errors["per_channel"] for item in items)


def _mean(errors: Iterable[float]) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(list(errors)))))
