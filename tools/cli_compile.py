"""The command ``compile``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..passes.recipe import DEFAULT
from . import cli_options as o
from . import console
from .cli_app import finish


def compile_(
    context: typer.Context,
    source: o.Source,
    engine: o.Engines,
    data: o.DataOrNone,
    output: o.Output,
    recipe: o.RecipeOption = DEFAULT,
    verify_data: Annotated[
        list[str], typer.Option(metavar="FILE...", help="Text to verify on, instead of more of --data.")
    ] = [],
    calibrate_windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of text to calibrate on.")] = 8,
    verify_windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of text to verify on.")] = 16,
    length: o.Length = 512,
    rows: o.Rows = 256,
    seed: o.Seed = 0,
    alpha: o.Alpha = None,
    max_share: o.MaxShare = None,
    opset: o.Opset = 23,
    kv_cache: o.KvCache = None,
    capability: o.Capabilities = [],
    batch: o.Batch = None,
    sequence: o.Sequence = None,
    dim: o.Dims = [],
    capacity: o.Capacity = None,
    gate: o.GateOptions = [],
    allow_float: o.AllowFloat = False,
    memory: o.Memory = None,
    executor: o.ExecutorOption = o.ExecutorName.LOCAL,
    trust_remote_code: o.TrustRemoteCode = False,
    copy_weights: o.CopyWeights = False,
    force: o.Force = False,
    restart: o.Restart = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Run every stage: from a model to verified engines. Run again, it goes on where it was interrupted."""
    text, thresholds, capabilities = o.parse_data(data), o.parse_gates(gate), o.parse_capabilities(capability)
    batches, sequences = o.parse_sizes("--batch", batch), o.parse_sizes("--sequence", sequence)
    dims, budget = o.parse_dims(dim), o.parse_memory(memory)
    if not text:
        o.refuse_unheeded(context, ("calibrate_windows", "rows", "seed"), "--data none calibrates on no text")
        if not verify_data:
            reason = "--data none without --verify-data verifies nothing"
            o.refuse_unheeded(context, ("verify_windows", "length"), reason)
    from . import pipeline

    console.show_progress(not quiet)
    result = pipeline.compile(
        source,
        recipe,
        tuple(engine),
        text,
        output,
        verify_data=tuple(verify_data),
        calibrate_windows=calibrate_windows,
        verify_windows=verify_windows,
        length=length,
        rows=rows,
        seed=seed,
        alpha=alpha,
        max_share=max_share,
        opset=opset,
        kv_cache=kv_cache,
        capabilities=capabilities,
        batch=batches,
        sequence=sequences,
        dims=dims,
        capacity=capacity,
        thresholds=thresholds,
        allow_float=allow_float,
        memory=budget,
        executor=executor,
        trust_remote_code=trust_remote_code,
        copy_weights=copy_weights,
        force=force,
        restart=restart,
    )
    finish(result, as_json)
