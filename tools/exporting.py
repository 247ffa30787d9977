"""The stage ``export``: a model, or a torch module, becomes a float artifact."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.artifact import MANIFEST, Artifact, Manifest, finish_folder, new_folder
from ..export.errors import BismoothError
from ..export.model import export_model
from ..export.source import GgufSource, HuggingFaceSource, resolve_source
from ..passes.spec import ComputeType
from . import console
from .results import ExportResult

if TYPE_CHECKING:
    import torch


def export(
    source: str | Path,
    output: str | Path,
    *,
    dtype: ComputeType = ComputeType.FLOAT16,
    opset: int = 23,
    kv_cache: bool | None = None,
    trust_remote_code: bool = False,
    copy_weights: bool = False,
    force: bool = False,
) -> ExportResult:
    """Turn a model into a float artifact: ``model.onnx`` in float32, and a graph in ``dtype`` beside it.

    Args:
        source: a Hugging Face folder or hub id, a GGUF file, or an ONNX file.
        output: the folder to write.
        dtype: float type of the deployed graph.
        opset: ONNX opset, 23 or 20.
        kv_cache: whether the graph takes keys and values of earlier tokens as inputs and gives them as outputs; by
            default, if the model generates text.
        trust_remote_code: run Python code that comes with the model.
        copy_weights: copy the weight files instead of linking them, in everything that is made of the artifact too.
        force: replace an artifact at ``output``.

    Raises:
        BismoothError: the source or the output folder cannot be used, or there is no such opset.
    """
    options = export_options(
        dtype, opset, kv_cache=kv_cache, trust_remote_code=trust_remote_code, copy_weights=copy_weights
    )
    with console.progress() as progress:
        return _exported(
            lambda folder: export_model(
                source,
                folder,
                kv_cache=kv_cache,
                trust_remote_code=trust_remote_code,
                weights="copy" if copy_weights else "link",
                progress=progress,
            ),
            Path(output),
            options,
            force,
            Path(source),
        )


@contextmanager
def float_artifact(
    source: str | Path, folder: Path | None = None, *, trust_remote_code: bool = False
) -> Generator[Artifact]:
    """The float artifact at ``source``, or one made of a model for as long as the block runs.

    Args:
        source: a float artifact, or what :func:`export` takes.
        folder: where to make it. Without it: in the system's folder for temporary files, or beside the model if that
            is another file system, so that no weights are copied.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        BismoothError: as :meth:`Artifact.load` and :func:`export`; or weights would have to be copied.
    """
    if (Path(source) / MANIFEST).is_file():
        yield Artifact.load(Path(source), "float")
        return
    place = folder or _place_for_links(source, trust_remote_code)
    with tempfile.TemporaryDirectory(prefix=".bismooth.", dir=place) as temporary:
        made = Path(temporary) / "float"
        export(source, made, dtype=ComputeType.FLOAT32, trust_remote_code=trust_remote_code)
        yield Artifact.load(made)


def _place_for_links(source: str | Path, trust_remote_code: bool) -> Path:
    """A folder that can be written to and that can hold hard links to the weights of a model."""
    resolved, temporary = resolve_source(source, trust_remote_code=trust_remote_code), Path(tempfile.gettempdir())
    if isinstance(resolved, GgufSource):
        return temporary
    files = resolved.weights.files if isinstance(resolved, HuggingFaceSource) else [resolved.path]
    devices = {file.stat().st_dev for file in files}
    beside = files[0].parent.resolve().parent
    for place in (temporary, beside):
        if devices == {place.stat().st_dev} and os.access(place, os.W_OK):
            return place
    raise BismoothError(
        f"{source}: its weights are on another file system than {temporary}, and nothing can be written to {beside}. "
        f"Run 'bismooth export {source} -o ART' first, and then this on ART."
    )


def export_options(
    dtype: ComputeType,
    opset: int,
    *,
    kv_cache: bool | None = None,
    trust_remote_code: bool = False,
    copy_weights: bool = False,
) -> dict[str, Any]:
    """What decides, beside the source, how an artifact comes out: the manifest's entry of the stage.

    Raises:
        BismoothError: there is no such opset.
    """
    if opset not in (20, 23):
        raise BismoothError(f"--opset {opset}: Expected 23, or 20 for TensorRT 10.")
    return {
        "stage": "export",
        "dtype": str(dtype),
        "opset": opset,
        "kv_cache": kv_cache,
        "trust_remote_code": trust_remote_code,
        "copy_weights": copy_weights,
    }


def copies_weights(artifact: Artifact) -> bool:
    """Whether the artifact was made with copies of the weights, so that what is made of it has copies as well."""
    return any(stage.get("copy_weights") for stage in artifact.manifest.stages)


def export_module(
    module: torch.nn.Module,
    output: str | Path,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dtype: ComputeType = ComputeType.FLOAT16,
    opset: int = 23,
    force: bool = False,
) -> ExportResult:
    """Turn any torch module, with example inputs, into a float artifact; the module is not changed.

    Args:
        module: as it is in evaluation mode.
        output: the folder to write.
        args: example inputs.
        kwargs: example inputs by name.
        dynamic_shapes: which sizes may vary, as for ``torch.onnx.export``: ``({0: "batch"},)``.
        input_names: names of the graph's inputs.
        output_names: names of the graph's outputs.
        dtype: see :func:`export`.
        opset: see :func:`export`.
        force: replace an artifact at ``output``.

    Raises:
        BismoothError: the module cannot be traced, or the output folder cannot be used.
    """
    from ..export.module import export_module as write

    return _exported(
        lambda folder: write(
            module,
            folder,
            args,
            kwargs,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
        ),
        Path(output),
        export_options(dtype, opset),
        force,
    )


def _exported(
    write: Callable[[Path], Manifest], output: Path, options: dict[str, Any], force: bool, *inputs: Path
) -> ExportResult:
    """The artifact whose float32 graph and weights ``write`` puts into a folder."""
    from ..export.external_data import weight_files
    from ..passes.graph import load
    from ..passes.linears import find_linears

    start = time.perf_counter()
    with new_folder(output, "float", force=force, inputs=inputs) as folder:
        manifest = write(folder)
        graph = load(folder / manifest.graphs["float32"])
        linears = len(find_linears(graph))
        graphs = _lower_export(graph, folder, manifest, ComputeType(options["dtype"]), options["opset"])
        manifest = replace(manifest, graphs=graphs, stages=(options,))
        finish_folder(folder, manifest)
        weights = sum(path.stat().st_size for path in weight_files(folder / graphs["float32"]).values())
    return ExportResult(
        output, manifest.architecture, tuple(graphs.values()), linears, weights, time.perf_counter() - start
    )


def _lower_export(graph: Any, folder: Path, manifest: Manifest, dtype: ComputeType, opset: int) -> dict[str, str]:
    """Lower to opset 20 if asked, and add the graph in a 16-bit type."""
    from ..passes.decompose import Decompose
    from ..passes.graph import save
    from ..passes.precision import SetPrecision

    graphs = dict(manifest.graphs)
    if opset == 20:
        Decompose().apply(graph)
        save(graph, folder / graphs["float32"])
    if dtype is not ComputeType.FLOAT32:
        SetPrecision(dtype.value).apply(graph)
        graphs[dtype.value] = f"model.{dtype.value}.onnx"
        save(graph, folder / graphs[dtype.value])
    return graphs
