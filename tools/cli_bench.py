"""The command that measures engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import cli_options as o
from . import console
from .cli_errors import Interrupted

_MEASURING = ("repeat", "warm_up", "threads", "one_at_a_time", "data")


def bench(
    context: typer.Context,
    engines: Annotated[list[Path], typer.Argument(metavar="ENGINE", help="Engine folders; ratios are to the first.")],
    batch: Annotated[list[int], typer.Option("--batch", min=1, metavar="N...", help="Rows.")] = [1],
    prompt_length: Annotated[
        list[int], typer.Option("--prompt-length", min=1, metavar="N...", help="Tokens of a prompt.")
    ] = [128, 512],
    new_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens that follow each prompt.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds, in which engines take turns.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, metavar="N", help="Runs of each engine before the first round.")] = 1,
    threads: o.Threads = None,
    one_at_a_time: Annotated[
        bool, typer.Option("--one-at-a-time", help="Close each engine before the next one runs, to need less memory.")
    ] = False,
    data: Annotated[
        list[str], typer.Option("--data", metavar="FILE...", help="Prompts from text, instead of random token ids.")
    ] = [],
    gpu: Annotated[
        list[str], typer.Option("--gpu", metavar="NAME...", help="GPUs to estimate bounds for, from published figures.")
    ] = [],
    estimate: Annotated[bool, typer.Option("--estimate", help="Bounds alone: measure nothing.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="JSON report to write.")] = None,
    html: o.Html = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure how fast engines read prompts and make tokens, in alternating rounds."""
    if estimate:
        o.refuse_unheeded(context, _MEASURING, "--estimate measures nothing")
    from .bench_engines import bench as run

    console.show_progress(not quiet)
    result = run(
        engines,
        batch=batch,
        prompt_length=prompt_length,
        new_tokens=new_tokens,
        repeat=repeat,
        warm_up=warm_up,
        threads=threads,
        one_at_a_time=one_at_a_time,
        data=data,
        gpus=gpu,
        estimate=estimate,
        output=output,
        html=html,
    )
    console.show(result, as_json)
    if result.interrupted:
        raise Interrupted
