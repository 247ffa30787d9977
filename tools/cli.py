"""The command line: reads the arguments, calls one stage, shows its result.

Exit status: 0 done and the gates pass, 1 a gate failed, 2 bad input or a missing extra, 70 a defect, 130 interrupted
(143, 129 by SIGTERM, SIGHUP).
NOTE: `bismooth --help` needs the base dependencies alone. So the stages are imported by the command that runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Annotated

import typer

from ..passes.gates import Hop
from ..passes.recipe import DEFAULT
from ..passes.spec import ComputeType, StandinKind
from . import cli_options as o
from . import console
from .cli_app import app, command, finish
from .cli_bench import bench
from .cli_bundle import package
from .cli_compile import compile_
from .cli_errors import Interrupted, report
from .cli_run import generate
from .cli_show import cache, inspect, recipes
from .entry import INTERRUPTED, interrupted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        # in a copy of the context, so that what a command switches on ends with it
        status = copy_context().run(app, args=arguments, prog_name="bismooth", standalone_mode=False) or 0
        if status == INTERRUPTED:  # how typer passes KeyboardInterrupt on
            raise KeyboardInterrupt
    except Interrupted:
        return interrupted()
    except (Exception, KeyboardInterrupt) as error:
        known = [str(command.name) for command in app.registered_commands]
        return report(error, next((word for word in arguments[:1] if word in known), None), "--json" in arguments)
    return status


@command
def export(
    source: o.Source,
    output: o.Output,
    dtype: o.ComputeOption = ComputeType.FLOAT16,
    opset: o.Opset = 23,
    kv_cache: o.KvCache = None,
    trust_remote_code: o.TrustRemoteCode = False,
    copy_weights: o.CopyWeights = False,
    force: o.Force = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Turn a model into an ONNX artifact that shares its weights."""
    from . import stages

    console.show_progress(not quiet)
    result = stages.export(
        source,
        output,
        dtype=dtype,
        opset=opset,
        kv_cache=kv_cache,
        trust_remote_code=trust_remote_code,
        copy_weights=copy_weights,
        force=force,
    )
    finish(result, as_json)


@command
def calibrate(
    artifact: o.Artifact,
    data: o.Data,
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of text to run.")] = 8,
    length: o.Length = 512,
    rows: o.Rows = 256,
    seed: o.Seed = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Windows per run; as many as have 512 tokens by default, one at least."),
    ] = None,
    histograms: Annotated[
        bool, typer.Option(help="Count magnitudes too: percentile, entropy and mse ranges need it.")
    ] = False,
    grams: Annotated[
        bool, typer.Option(help="Compute XᵀX of each linear's input too: K x K x 4 bytes for K channels.")
    ] = False,
    memory: o.Memory = None,
    executor: o.ExecutorOption = o.ExecutorName.LOCAL,
    restart: o.Restart = False,
    output: o.OptionalOutput = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Collect statistics of activations by running text."""
    text = o.parse_text(data, "To quantize without: 'bismooth quantize ART --data none'.")
    budget = o.parse_memory(memory)
    from . import stages

    console.show_progress(not quiet)
    result = stages.calibrate(
        artifact,
        text,
        windows=windows,
        length=length,
        rows=rows,
        seed=seed,
        batch_size=batch_size,
        histograms=histograms,
        grams=grams,
        memory=budget,
        executor=executor,
        restart=restart,
        output=output,
    )
    finish(result, as_json)


@command
def quantize(
    artifact: o.Artifact,
    output: o.Output,
    recipe: o.RecipeOption = DEFAULT,
    data: Annotated[str | None, typer.Option(metavar="none", help="'none': without calibration.")] = None,
    statistics: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Statistics to use instead of the artifact's.")
    ] = None,
    alpha: o.Alpha = None,
    max_share: o.MaxShare = None,
    memory: o.Memory = None,
    executor: o.ExecutorOption = o.ExecutorName.LOCAL,
    force: o.Force = False,
    restart: o.Restart = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Smooth and quantize an artifact by a recipe."""
    if data not in (None, "none"):
        raise typer.BadParameter(
            f"Expected 'none', got {data!r}. Text goes to 'bismooth calibrate'.", param_hint="--data"
        )
    budget = o.parse_memory(memory)
    from . import stages

    console.show_progress(not quiet)
    result = stages.quantize(
        artifact,
        recipe,
        output,
        data_free=data == "none",
        statistics=statistics,
        alpha=alpha,
        max_share=max_share,
        memory=budget,
        executor=executor,
        force=force,
        restart=restart,
    )
    finish(result, as_json)


@command
def build(
    artifact: o.Artifact,
    engine: o.Engine,
    capability: o.Capabilities = [],
    output: o.OptionalOutput = None,
    batch: o.Batch = None,
    sequence: o.Sequence = None,
    dim: o.Dims = [],
    capacity: o.Capacity = None,
    logits: o.LogitsOption = None,
    split_blocks: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Build a chain of engines instead: embedding, N ranges of blocks, head. Each takes less memory.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory that the build may take, such as 16GB; most of what is there by default."
        ),
    ] = None,
    allow_float: o.AllowFloat = False,
    force: o.Force = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Build an engine and audit which linears run as INT8."""
    capabilities = o.parse_capabilities(capability)
    batches, sequences = o.parse_sizes("--batch", batch), o.parse_sizes("--sequence", sequence)
    dims, budget = o.parse_dims(dim), o.parse_memory(memory)
    from . import stages

    console.show_progress(not quiet)
    result = stages.build(
        artifact,
        engine,
        capabilities=capabilities,
        output=output,
        batch=batches,
        sequence=sequences,
        dims=dims,
        capacity=capacity,
        logits=None if logits is None else logits.value,
        split_blocks=split_blocks,
        memory=budget,
        allow_float=allow_float,
        force=force,
    )
    finish(result, as_json)


@command
def verify(
    artifact: o.Artifact,
    data: o.Data,
    windows: o.Windows = 16,
    skip_windows: o.SkipWindows = 0,
    length: o.Length = 512,
    hop: Annotated[
        list[Hop], typer.Option("--hop", metavar="NAME...", help=f"Hops to judge, of {', '.join(Hop)}.")
    ] = [],
    gate: o.GateOptions = [],
    memory: o.Memory = None,
    restart: o.Restart = False,
    output: o.OptionalOutput = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Judge every hop from the source to the engine by its gates."""
    text = o.parse_text(data, "Programs are compared by what they compute on it.")
    thresholds, budget = o.parse_gates(gate), o.parse_memory(memory)
    from . import stages

    console.show_progress(not quiet)
    result = stages.verify(
        artifact,
        text,
        windows=windows,
        skip_windows=skip_windows,
        length=length,
        hops=tuple(hop),
        thresholds=thresholds,
        memory=budget,
        restart=restart,
        output=output,
    )
    finish(result, as_json)


@command
def compare(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ART", help="Artifact folders.")],
    data: o.Data,
    reference: Annotated[
        Path | None, typer.Option(metavar="ART", help="Whose float graph to hold them against; the first's by default.")
    ] = None,
    windows: o.Windows = 16,
    skip_windows: o.SkipWindows = 0,
    length: o.Length = 512,
    memory: o.Memory = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="JSON report to write.")] = None,
    html: o.Html = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare artifacts with one float reference, and with each other."""
    text = o.parse_text(data, "Artifacts are compared by what they compute on it.")
    budget = o.parse_memory(memory)
    from .compare import compare as run

    console.show_progress(not quiet)
    result = run(
        artifacts,
        text,
        reference=reference,
        windows=windows,
        skip_windows=skip_windows,
        length=length,
        memory=budget,
        output=output,
        html=html,
    )
    finish(result, as_json)


@command
def diagnose(
    model: o.Model,
    statistics: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Statistics of the model, to measure output errors on.")
    ] = None,
    html: o.Html = None,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Find the layers whose weights break per-channel INT8. Ends with 1 if there are any."""
    from .diagnose import diagnose as run

    console.show_progress(not quiet)
    finish(run(model, statistics=statistics, html=html, trust_remote_code=trust_remote_code), as_json)


@command
def standin(
    model: o.Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Model folder to make.")],
    kind: Annotated[
        StandinKind,
        typer.Option(metavar="KIND", help="scale: what smoothing can undo. rotate: what no scale per channel can."),
    ] = StandinKind.SCALE,
    factor: Annotated[float, typer.Option(metavar="F", help="How much larger the channels become.")] = 100.0,
    channels: Annotated[int, typer.Option(min=1, metavar="N", help="Channels behind each norm.")] = 4,
    blocks: Annotated[str, typer.Option(metavar="N,N...", help="Blocks to change, from 0.")] = "0,1,3",
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Chooses the channels and all that is random.")] = 0,
    trust_remote_code: o.TrustRemoteCode = False,
    force: o.Force = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Give a model the weight defect of LLaMA3-70B without changing what it computes, to test remedies on."""
    chosen = o.parse_blocks(blocks)
    from .standin import standin as run

    console.show_progress(not quiet)
    result = run(
        model,
        output,
        kind=kind,
        factor=factor,
        channels=channels,
        blocks=chosen,
        seed=seed,
        trust_remote_code=trust_remote_code,
        force=force,
    )
    finish(result, as_json)


for function in (compile_, inspect, package, generate, bench, recipes, cache):
    command(function)
