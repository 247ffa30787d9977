"""A model becomes the contents of an artifact folder: ``model.onnx``, linked weights, tokenizer."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from .artifact import Blocks, Manifest, place_file
from .errors import BismoothError
from .source import INDEX, GgufSource, HuggingFaceSource, OnnxSource, Source, Weights, read_weights, resolve_source
from .versions import tool_versions

GRAPH = "model.onnx"
Progress = Callable[[str, int, int], None]
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
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


def _no_progress(_step: str, _done: int, _total: int) -> None:
    return


def export_model(
    source: str | Path, folder: Path, *, trust_remote_code: bool = False, progress: Progress = _no_progress
) -> Manifest:
    """Write ``model.onnx`` (FP32 compute, opset 23), weight files and tokenizer of ``source`` into ``folder``.

    Weights are not read: the graph's initializers point into the safetensors files of the source, which are hard-linked into the folder
    (copied where links are not possible). Memory and time do not depend on the number of weights.

    Returns:
        The manifest, without ``files``; the caller writes it when the folder is complete.

    Raises:
        BismoothError: the source is missing, broken or of a kind that is not accepted.
    """
    resolved: Source = resolve_source(source, trust_remote_code=trust_remote_code)
    if isinstance(resolved, OnnxSource):
        from .onnx_file import import_onnx

        return import_onnx(resolved.path, folder)
    origin: dict[str, Any] = {"path": str(Path(source).absolute() if Path(source).exists() else source)}
    if isinstance(resolved, GgufSource):
        from .gguf_file import convert_gguf

        convert_gguf(resolved.path, folder, progress)
        origin["format"] = "gguf"
        config = cast(dict[str, Any], json.loads((folder / "config.json").read_text("utf-8")))
        resolved = HuggingFaceSource(folder, config, read_weights([folder / "model.safetensors"]))
    else:
        origin["format"] = "huggingface"
        _place_files(resolved, folder)
        resolved = replace(resolved, weights=_moved(resolved.weights, folder))
    origin["fingerprint"] = resolved.weights.fingerprint()
    manifest = _write_graph(resolved, folder, trust_remote_code, progress)
    return replace(manifest, source=origin)


def _place_files(source: HuggingFaceSource, folder: Path) -> None:
    for path in source.weights.files:
        place_file(path, folder / path.name)
    for pattern in _SIDE_FILES:
        for path in sorted(source.folder.glob(pattern)):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
    if not (source.folder / INDEX).is_file():
        (folder / INDEX).unlink(missing_ok=True)
    if not (folder / "tokenizer.json").is_file() and list(source.folder.glob("*vocab*")):
        _convert_tokenizer(source.folder, folder)


def _convert_tokenizer(source: Path, folder: Path) -> None:
    """Write ``tokenizer.json`` from the vocabulary files of older tokenizers."""
    from transformers import AutoTokenizer

    try:
        cast(Any, AutoTokenizer).from_pretrained(source).save_pretrained(folder)
    except Exception as error:  # tokenizers raise bare exceptions of many kinds
        raise BismoothError(
            f"{source}: the tokenizer cannot be converted to tokenizer.json ({error}). Save it with a current transformers."
        ) from error


def _moved(weights: Weights, folder: Path) -> Weights:
    return Weights({name: (folder / path.name, entry) for name, (path, entry) in weights.entries.items()})


def _write_graph(source: HuggingFaceSource, folder: Path, trust_remote_code: bool, progress: Progress) -> Manifest:
    import onnx_ir as ir
    from transformers import AutoConfig

    from .link import link_weights, stored_names
    from .naming import name_constants, name_nodes
    from .skeleton import build_skeleton, model_class

    try:
        config = cast(Any, AutoConfig).from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        progress("read the configuration", 1, 4)
        skeleton = build_skeleton(config)
    except BismoothError:
        raise
    except Exception as error:  # configuration classes validate with exceptions of their own
        raise BismoothError(f"{source.folder / 'config.json'}: no model can be made from it: {error}.") from error
    buffers = dict(skeleton.model.named_buffers())
    model, blocks = _trace(config, skeleton.blocks, skeleton.short_config, skeleton.short_blocks, buffers, progress)
    progress("link the weights", 3, 4)
    link_weights(model, source.weights, stored_names(skeleton.model, source.weights))
    name_constants(model, set(source.weights.entries))
    name_nodes(model)
    model.producer_name = "bismooth"
    ir.save(model, folder / GRAPH)
    progress("link the weights", 4, 4)
    dims = {name: int(value) for name in _DIMS if isinstance(value := getattr(config, name, None), int)}
    return Manifest(
        kind="float",
        source={},
        graphs={"float32": GRAPH},
        architecture=model_class(config).__name__,
        dims=dims,
        blocks=blocks,
        tools=tool_versions(),
    )


def _trace(
    config: Any,
    blocks: Blocks | None,
    short_config: Any | None,
    short_blocks: Sequence[int],
    buffers: Mapping[str, Any],
    progress: Progress,
) -> tuple[Any, Blocks | None]:
    """The simplified graph: traced from two blocks of each kind and repeated where that is possible, else traced whole."""
    from .skeleton import model_class
    from .stamp import NotAlikeError, stamp
    from .trace import simplify, trace_transformer

    cls = model_class(config)
    progress("trace", 2, 4)
    if blocks is not None and short_config is not None:
        model = trace_transformer(cls, copy.deepcopy(short_config), buffers)
        simplify(model)
        try:
            stamp(model, blocks, short_blocks)
            return model, blocks
        except NotAlikeError as difference:
            progress(f"blocks are not copies ({difference}); trace all of them", 2, 4)
    model = trace_transformer(cls, config, buffers)
    simplify(model)
    return model, blocks
