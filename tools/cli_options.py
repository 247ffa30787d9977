"""The options that commands share, and the reading of their values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from ..export.errors import BismoothError
from ..passes.gates import Gates
from ..passes.spec import ComputeType

TEXT = "Text files, FILE.jsonl:FIELD, hf:DATASET or 'random'"


class EngineName(StrEnum):
    """The engines there are."""

    TENSORRT_RTX = "tensorrt-rtx"
    TENSORRT = "tensorrt"
    ONNXRUNTIME = "onnxruntime"
    NULL = "null"


class ExecutorName(StrEnum):
    """Who does the work of long steps."""

    LOCAL = "local"
    RAY = "ray"


class Logits(StrEnum):
    """Positions to compute logits of."""

    LAST = "last"
    ALL = "all"


_ENGINES = ", ".join(EngineName)

Artifact = Annotated[Path, typer.Argument(metavar="ART", help="Artifact folder.")]
Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="Hugging Face folder or hub id, GGUF file, or ONNX file.")
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Float artifact, Hugging Face folder or hub id, GGUF or ONNX file.")
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="ART", help="Artifact folder to make.")]
OptionalOutput = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="PATH", help="Where to write, instead of into the artifact.")
]
RecipeOption = Annotated[str, typer.Option("--recipe", metavar="NAME|FILE", help="See 'bismooth recipes'.")]
Alpha = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, metavar="A", help="Smooth with this alpha everywhere, instead of searching one per site."
    ),
]
MaxShare = Annotated[
    float | None,
    typer.Option(min=0, max=1, metavar="S", help="Largest share of the linears that '@walls' may select."),
]
Data = Annotated[list[str], typer.Option("--data", metavar="FILE...", help=f"{TEXT}.")]
DataOrNone = Annotated[
    list[str], typer.Option("--data", metavar="FILE...", help=f"{TEXT}; 'none': smooth by the weights alone.")
]
Engine = Annotated[EngineName, typer.Option("--engine", metavar="NAME", help=f"{_ENGINES}.")]
Engines = Annotated[list[EngineName], typer.Option("--engine", metavar="NAME...", help=f"Any of {_ENGINES}.")]
Capabilities = Annotated[
    list[str],
    typer.Option(
        "--capability",
        metavar="SM...",
        help="Compute capabilities (86, 8.6 or sm86) to build for. 'compile' without it: 75, and 80 86 89 120 in one.",
    ),
]
Batch = Annotated[
    str | None, typer.Option(metavar="MIN:OPT:MAX", help="Batch sizes that the engine accepts; one number fixes it.")
]
Sequence = Annotated[
    str | None,
    typer.Option(metavar="MIN:OPT:MAX", help="Sequence lengths that the engine accepts; one number fixes it."),
]
Dims = Annotated[
    list[str],
    typer.Option("--dim", metavar="NAME=MIN:OPT:MAX...", help="Sizes of any other dynamic dimension, by its name."),
]
Capacity = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Positions per row that an engine has room for, text and padding, if it keeps keys and values.",
    ),
]
LogitsOption = Annotated[
    Logits | None,
    typer.Option(
        metavar="last|all",
        help="Positions that an engine for a CPU computes logits of; by default the last, if it keeps keys and values.",
    ),
]
AllowFloat = Annotated[
    bool, typer.Option("--allow-float", help="Accept linears that run in float although the recipe says INT8.")
]
GateOptions = Annotated[
    list[str],
    typer.Option("--gate", metavar="NAME=LIMIT...", help="Change a gate of the recipe; NAME=none drops it."),
]
Windows = Annotated[int, typer.Option("--windows", min=1, metavar="N", help="Windows of text to compare on.")]
SkipWindows = Annotated[
    int,
    typer.Option(
        "--skip-windows", min=0, metavar="N", help="Windows to pass over first, such as those of the calibration."
    ),
]
Length = Annotated[int, typer.Option(min=2, metavar="N", help="Tokens per window.")]
Rows = Annotated[int, typer.Option(min=1, metavar="N", help="Token rows kept per site, for the alpha search.")]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Chooses the token rows.")]
Opset = Annotated[
    int, typer.Option(metavar="N", help="ONNX opset; 20 decomposes norms and attention, for TensorRT 10.")
]
KvCache = Annotated[
    bool | None,
    typer.Option(
        "--kv-cache/--no-kv-cache",
        help="Whether the graph keeps keys and values between runs, to generate text. By default, if the model can.",
        show_default=False,
    ),
]
ComputeOption = Annotated[
    ComputeType,
    typer.Option("--dtype", metavar="TYPE", help=f"Float type of the deployed graph: {', '.join(ComputeType)}."),
]
ExecutorOption = Annotated[
    ExecutorName,
    typer.Option(
        "--executor",
        metavar="local|ray",
        help="Who does the work: this machine, or the Ray cluster at RAY_ADDRESS, by default the one that this "
        "machine is a node of. All its nodes need bismooth[compile,ray], and ART at the same path.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Only for models you trust."),
]
CopyWeights = Annotated[
    bool,
    typer.Option(
        "--copy-weights", help="Copy weight files instead of linking them: for sources that will be edited in place."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Html = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Draw the result as a page too. Needs bismooth[report]."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, metavar="N", help="Threads on a CPU; one per core by default.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Memory that this process may take, such as 8GB; most of what is there by default."
    ),
]
Restart = Annotated[bool, typer.Option(help="Discard what an unfinished run has left.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON alone to stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


class Command(TyperCommand):
    """A command whose repeatable options take several values at once: ``--data a b`` is ``--data a --data b``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {
            name
            for option in self.params
            if isinstance(option, TyperOption) and option.multiple
            for name in option.opts
        }
        return super().parse_args(ctx, list(spread(args, several)))


def spread(args: Iterable[str], several: set[str]) -> Iterator[str]:
    """``args`` with the option's name repeated before every further value of an option in ``several``."""
    option: str | None = None
    values = 0
    for arg in args:
        if arg.startswith("-") and arg != "-":  # which stands for stdin
            option, values = (arg, 0) if arg in several else (None, 0)
        elif option is not None:
            values += 1
            if values > 1:
                yield option
        yield arg


def parse_text(data: list[str], instead: str) -> tuple[str, ...]:
    """The sources of text, of which there must be some; ``instead`` says what to do without.

    Raises:
        BismoothError: ``none`` is given.
    """
    if "none" in data:
        raise BismoothError(f"--data none: Expected text. {instead} (A file of that name is ./none.)")
    return tuple(data)


def parse_data(data: list[str]) -> tuple[str, ...]:
    """The sources of text; nothing for ``none``.

    Raises:
        BismoothError: ``none`` stands beside other sources.
    """
    if "none" in data and len(data) > 1:
        raise BismoothError(f"--data: Expected 'none' alone, got {' '.join(data)}.")
    return () if data == ["none"] else tuple(data)


def parse_capabilities(texts: list[str]) -> tuple[int, ...]:
    """Compute capabilities as numbers, 86 for SM86, each once and in order.

    Raises:
        BismoothError: a text is no capability.
    """
    return tuple(sorted({_capability(text) for text in texts}))


def _capability(text: str) -> int:
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text, re.ASCII | re.IGNORECASE)
    if not match:
        raise BismoothError(f"--capability: Expected a compute capability such as 86, 8.6 or sm86, got {text!r}.")
    return int("".join(match.groups()))


def parse_sizes(option: str, text: str | None) -> tuple[int, int, int] | None:
    """Minimum, optimum and maximum of a dimension.

    Raises:
        BismoothError: no sizes, or not in that order.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?::(\d+):(\d+))?", text, re.ASCII)
    sizes = [int(size) for size in match.groups() if size] if match else [0]
    if sizes[0] < 1 or sizes != sorted(sizes):
        raise BismoothError(f"{option}: Expected MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX, or one size, got {text!r}.")
    return sizes[0], sizes[len(sizes) // 2], sizes[-1]


def parse_memory(text: str | None) -> int | None:
    """Bytes of a size with a unit; ``GB`` are 10⁹ bytes and ``GiB`` 2³⁰.

    Raises:
        BismoothError: it is no size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", text, re.ASCII | re.IGNORECASE)
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper())) if match else 0
    if size < 1:
        raise BismoothError(f"--memory: Expected a size such as 8GB, 500MB or 7.5GiB, got {text!r}.")
    return size


def parse_dims(texts: list[str]) -> dict[str, tuple[int, int, int]]:
    """Minimum, optimum and maximum by name of the dimension.

    Raises:
        BismoothError: no name, no sizes, sizes not in order, or a name twice.
    """
    dims: dict[str, tuple[int, int, int]] = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        triple = parse_sizes("--dim", sizes)
        if not name or triple is None:
            raise BismoothError(f"--dim: Expected NAME=MIN:OPT:MAX, got {text!r}.")
        if name in dims:
            raise BismoothError(f"--dim: {name} has sizes twice. Expected them once.")
        dims[name] = triple
    return dims


def parse_blocks(text: str) -> tuple[int, ...]:
    """Numbers of blocks, each once and in order.

    Raises:
        BismoothError: the text is no list of numbers.
    """
    if not re.fullmatch(r"\d+(,\d+)*", text, re.ASCII):
        raise BismoothError(f"--blocks: Expected numbers with commas between them, such as 0,1,3, got {text!r}.")
    return tuple(sorted(set(map(int, text.split(",")))))


def refuse_unheeded(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Refuse options that stand on the command line and have no effect.

    Raises:
        BismoothError: names the first of them, and ``reason``.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise BismoothError(f"--{name.replace('_', '-')}: has no effect: {reason}. Leave it out.")


def parse_gates(texts: list[str]) -> dict[str, float | None]:
    """Limits by gate; ``None`` drops a gate.

    Raises:
        BismoothError: there is no such gate, or the limit is no number.
    """
    limits: dict[str, float | None] = {}
    for text in texts:
        match = re.fullmatch(r"(\w+)=(none|\d*\.?\d+(?:e-?\d+)?)", text, re.ASCII)
        if not match:
            raise BismoothError(f"--gate: Expected NAME=LIMIT with a number or 'none', got {text!r}.")
        name, limit = match.groups()
        limits[name] = None if limit == "none" else float(limit)
    Gates().replaced(limits)
    return limits
