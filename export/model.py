"""A model becomes the contents of an artifact folder: ``model.onnx``, linked weights, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from .artifact import Manifest, place_file
from .errors import BismoothError
from .source import (
    WEIGHTS,
    GgufSource,
    HuggingFaceSource,
    OnnxSource,
    identify,
    list_side_files,
    read_weights,
    resolve_source,
    side_files,
)
from .tokenizer import complete_tokenizer
from .versions import tool_versions

if TYPE_CHECKING:
    import onnx_ir as ir

    from .skeleton import Skeleton

GRAPH = "model.onnx"
Progress = Callable[[str, int, int], None]
"""Called with a step's name, how many of its units are done, and how many there are."""
Placing = Literal["link", "copy"]

_DIMS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


_REMOTE = "transformers_modules."
"""The package in which transformers puts code that a model brings along."""


def _no_progress(_step: str, _done: int, _total: int) -> None:
    return


def export_model(
    source: str | Path,
    folder: Path,
    *,
    kv_cache: bool | None = None,
    trust_remote_code: bool = False,
    weights: Placing = "link",
    progress: Progress = _no_progress,
) -> Manifest:
    """Write ``model.onnx`` (FP32 compute, opset 23), weight files and tokenizer of ``source`` into ``folder``.

    Weights are not read: the graph's initializers point into the safetensors files of the source. Memory and time do
    not depend on the number of weights, unless files are copied.

    Args:
        source: a Hugging Face folder or hub id, a GGUF file, or an ONNX file.
        folder: an existing empty folder.
        kv_cache: whether the graph takes keys and values of earlier tokens and gives those with the new ones, so that
            it can generate text; by default, if the model is one that generates. An ONNX file stays as it is.
        trust_remote_code: run Python code that the model brings along.
        weights: ``link`` makes the weight files in ``folder`` hard links of the source's where the system permits it;
            ``copy`` always copies them: for tools that refuse links, and for sources that will be edited.
        progress: told about the steps.

    Returns:
        The manifest, without ``files``; the caller writes it when the folder is complete.

    Raises:
        BismoothError: the source is missing, broken or of a kind that is not accepted.
    """
    resolved = resolve_source(source, trust_remote_code=trust_remote_code)
    origin = identify(source, resolved)
    copy = weights == "copy"
    if isinstance(resolved, OnnxSource):
        from .onnx_file import import_onnx

        if kv_cache is not None:
            raise BismoothError(
                f"{resolved.path}: --kv-cache and --no-kv-cache have no effect on an ONNX file. Leave the option out."
            )
        manifest = import_onnx(resolved.path, folder, copy=copy)
        for path in side_files(resolved.path.parent, [resolved.path]):
            if not (folder / path.name).exists():  # not weights of that name
                _copy_side_file(path, folder / path.name)
        return replace(manifest, source=manifest.source | origin)
    if isinstance(resolved, GgufSource):
        from .gguf_file import convert_gguf

        convert_gguf(resolved.path, folder, progress)
        resolved = HuggingFaceSource(folder, read_weights([folder / WEIGHTS]))
    else:
        _place_files(resolved, folder, copy, progress)
        complete_tokenizer(resolved.folder, folder, trust_remote_code=trust_remote_code)
    origin["fingerprint"] = resolved.weights.fingerprint()
    manifest = _write_graph(resolved, folder, kv_cache, trust_remote_code, progress)
    return replace(manifest, source=origin | manifest.source)


def _place_files(source: HuggingFaceSource, folder: Path, copy: bool, progress: Progress) -> None:
    files = source.weights.files
    for done, path in enumerate(files, 1):
        if not place_file(path, folder / path.name, copy=copy):
            progress("copy the weights", done, len(files))
    for path in list_side_files(source):
        _copy_side_file(path, folder / path.name)


def _copy_side_file(path: Path, target: Path) -> None:
    """Copy; a configuration loses its ``auto_map``, which names Python files that an artifact does not carry."""
    if path.name.endswith("config.json"):
        with suppress(ValueError):  # what is no JSON is copied as it is
            document = json.loads(path.read_text("utf-8"))
            if isinstance(document, dict) and cast(dict[str, Any], document).pop("auto_map", None) is not None:
                target.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
                return
    shutil.copyfile(path, target)


def _write_graph(
    source: HuggingFaceSource, folder: Path, kv_cache: bool | None, trust_remote_code: bool, progress: Progress
) -> Manifest:
    from ._ir import save_ir
    from .link import link_weights
    from .naming import name_constants, name_nodes
    from .stored_names import stored_names

    progress("read the configuration", 0, 1)
    config, skeleton = _skeleton(source.folder, kv_cache, trust_remote_code)
    progress("read the configuration", 1, 1)
    model = _trace(config, skeleton, trust_remote_code, progress)
    progress("link the weights", 0, 1)
    link_weights(model, source.weights, stored_names(skeleton.model, source.weights))
    name_constants(model, set(source.weights.entries))
    name_nodes(model)
    save_ir(model, folder / GRAPH)
    progress("link the weights", 1, 1)
    return Manifest(
        kind="float",
        source={"remote_code": True} if type(skeleton.model).__module__.startswith(_REMOTE) else {},
        graphs={"float32": GRAPH},
        architecture=type(skeleton.model).__name__,
        dims={name: value for name in _DIMS if type(value := getattr(config, name, None)) is int},
        blocks=skeleton.blocks,
        tools=tool_versions(),
    )


def _skeleton(folder: Path, kv_cache: bool | None, trust_remote_code: bool) -> tuple[Any, Skeleton]:
    """The configuration of transformers, and the model that it describes."""
    import transformers

    from .skeleton import build_skeleton

    try:
        config = cast(Any, transformers).AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return config, build_skeleton(config, kv_cache=kv_cache, trust_remote_code=trust_remote_code)
    except BismoothError:
        raise
    except Exception as error:  # configuration classes validate with exceptions of their own
        raise BismoothError(f"{folder / 'config.json'}: no model can be made from it: {error}.") from error


def _trace(config: Any, skeleton: Skeleton, trust_remote_code: bool, progress: Progress) -> ir.Model:
    """The simplified graph: two blocks of each kind are traced and repeated; all, where that is not possible."""
    from .model_class import model_class
    from .stamp import NotAlikeError, stamp
    from .trace import simplify, trace_transformer

    cls = model_class(config, trust_remote_code=trust_remote_code)
    if skeleton.blocks is not None and skeleton.short_config is not None:
        step = f"trace {len(skeleton.short_blocks)} of {len(skeleton.blocks.kinds)} blocks"
        progress(step, 0, 1)
        model = trace_transformer(cls, skeleton.short_config, skeleton.short_buffers, kv_cache=skeleton.kv_cache)
        simplify(model)
        progress(step, 1, 1)
        try:
            stamp(model, skeleton.blocks, skeleton.short_blocks)
            return model
        except NotAlikeError as difference:
            step = f"trace the whole model: its blocks are no copies of each other ({difference})"
    else:
        step = "trace the whole model"
    progress(step, 0, 1)
    model = trace_transformer(cls, config, skeleton.buffers, kv_cache=skeleton.kv_cache)
    simplify(model)
    progress(step, 1, 1)
    return model
