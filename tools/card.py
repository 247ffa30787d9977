"""The model card of a bundle: its ``README.md``, written from the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..engines.tensorrt_runtime import RUNTIMES
from ..passes.gates import Hop

CARD = "README.md"
_TEMPLATE = "card.md"


def model_card(manifest: Mapping[str, Any]) -> str:
    """The text of the card in Markdown, with the YAML header that the Hugging Face hub reads.

    Args:
        manifest: content of ``bundle.json``; ``files`` needs the engines' alone.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    environment.filters |= {"yaml": json.dumps, "figure": _figure}
    runtimes = {engine["runtime"] for engine in manifest["engines"].values()}
    return environment.get_template(_TEMPLATE).render(
        manifest,
        engines=list(_engines(manifest)),
        extras="".join(f",{runtime}" for runtime in RUNTIMES if runtime in runtimes),
        limits=list(limits(manifest)),
    )


def limits(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What was not judged, and what a reader could expect and is not there, a sentence each."""
    verdict = manifest["verdict"]
    if verdict is None:
        yield "Nothing was verified: how close this model is to its source is unknown."
    else:
        for hop in verdict["hops"]:
            if hop["verdict"] == "skipped":
                yield f"The hop `{hop['hop']}` ({hop['compared']}) was not judged: {hop['note'].removesuffix('.')}."
            elif hop["verdict"] == "measured":
                yield f"The hop `{hop['hop']}` ({hop['compared']}) was measured, and held against no gate."
        ran = any(hop["hop"] == Hop.DEVICE and hop["verdict"] != "skipped" for hop in verdict["hops"])
        if not ran and any(engine["runtime"] in RUNTIMES for engine in manifest["engines"].values()):
            yield "The engines of TensorRT were not run: what a GPU computes with them was compared with nothing."
        for name in sorted(manifest["engines"].keys() - {*verdict["engines"]}):
            yield f"The engine `{name}` was built after the verification; its own audit lies beside it."
        yield (
            "Figures are of one text. They say how close the model is to its source on text of that kind, and nothing "
            "of how good the source is."
        )
    for name, engine in manifest["engines"].items():
        if left := engine["audit"]["fallbacks"]:
            yield f"In the engine `{name}`, {left} linears run in float although the recipe says INT8."
    if "tokenizer.json" not in manifest["files"]:
        yield "There is no tokenizer."


def _engines(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, engine in manifest["engines"].items():
        audit = engine["audit"]
        on_gpu = engine["runtime"] in RUNTIMES
        yield {
            **engine,
            "name": name,
            "gpus": ", ".join(f"SM{capability}" for capability in engine["capabilities"])
            or ("that of the machine that built it" if on_gpu else "none needed"),
            "size": f"{sum(manifest['files'][file]['size'] for file in engine['files']) / 1e6:,.0f} MB",
            "int8_linears": audit["int8_linears"],
            "linears": audit["linears"],
            "int8_share": audit["int8_mac_with_head_share"],
            "kernels": audit["kernels"],
        }


def _figure(value: float | None, prefix: str = "") -> str:
    return "–" if value is None else f"{prefix}{value:.3g}"
