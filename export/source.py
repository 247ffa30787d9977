"""What a model can be made from: a Hugging Face folder, a GGUF file, a hub id, an ONNX file.

A source is only looked at here: its configuration and the headers of its weight files. No weight is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from .artifact import RESERVED
from .errors import BismoothError
from .safetensors_file import TensorEntry, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "LICENSE*",
    "README.md",
)
"""Patterns of the files beside the weights that belong to a model."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint: name → (file, where it lies in the file)."""

    entries: dict[str, tuple[Path, TensorEntry]]

    def fingerprint(self) -> str:
        """SHA-256 over the names, types, shapes and places of all tensors: cheap, and changes with any of them."""
        lines = [
            f"{name} {path.name} {e.dtype} {e.shape} {e.offset}" for name, (path, e) in sorted(self.entries.items())
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def files(self) -> list[Path]:
        """The files that hold them."""
        return sorted({path for path, _ in self.entries.values()})


@dataclass(frozen=True)
class HuggingFaceSource:
    """A folder with ``config.json`` and safetensors files."""

    folder: Path
    weights: Weights


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file."""

    path: Path


@dataclass(frozen=True)
class OnnxSource:
    """An ONNX file."""

    path: Path


Source = HuggingFaceSource | GgufSource | OnnxSource


def resolve_source(source: str | Path, *, trust_remote_code: bool = False) -> Source:
    """What ``source`` names: a folder, a ``.gguf`` or ``.onnx`` file, or the id of a model on the Hugging Face hub.

    Raises:
        BismoothError: nothing is there, or it is something that is not accepted (pickled weights, remote code, a
            quantized checkpoint).
    """
    path = Path(source)
    if path.is_dir():
        return _folder_source(path, trust_remote_code)
    if path.is_file():
        if path.suffix == ".gguf":
            return GgufSource(path)
        if path.suffix == ".onnx":
            return OnnxSource(path)
        raise BismoothError(
            f"{path}: expected a model folder, a .gguf or a .onnx file, got a file with suffix {path.suffix!r}."
        )
    name = str(source)
    looks_like_a_path = path.is_absolute() or name.startswith(".") or name.count("/") > 1
    if looks_like_a_path or path.suffix in (".gguf", ".onnx", ".safetensors"):
        raise BismoothError(f"{source}: no such file or folder.")
    from .hub import hub_folder

    code = ["*.py"] if trust_remote_code else []
    return _folder_source(hub_folder(name, (WEIGHTS, *SIDE_FILES, *code), INDEX), trust_remote_code)


def identify(source: str | Path, resolved: Source) -> dict[str, Any]:
    """What tells a source from others and from itself after a change, as it is recorded in the manifest.

    Returns:
        ``path``, ``format``, and ``files``: size and time of the last modification of each, Python code included. No
        weight is read. Also ``foreign_code`` where the model names code that lies elsewhere: the names.
    """
    foreign: list[str] = []
    if isinstance(resolved, HuggingFaceSource):
        kind, folder = "huggingface", resolved.folder
        files = [*list_files(resolved), *sorted(folder.glob("*.py"))]
        foreign = _foreign_code(folder)
    elif isinstance(resolved, GgufSource):
        kind, folder, files = "gguf", resolved.path.parent, [resolved.path]
    else:
        from . import onnx_file

        kind, folder, files = "onnx", resolved.path.parent, onnx_file.list_files(resolved.path)
        files += side_files(folder, files)
    return {
        "path": str(Path(source).absolute() if Path(source).exists() else source),
        "format": kind,
        "files": {path.relative_to(folder).as_posix(): _state(path) for path in files if path.is_file()},
        **({"foreign_code": foreign} if foreign else {}),
    }


def _foreign_code(folder: Path) -> list[str]:
    """What ``auto_map`` names outside the folder: ``org/repo--module.Class``, or a module in a folder below."""
    names: set[str] = set()
    for path in folder.glob("*config.json"):
        with suppress(ValueError):  # what is no JSON names no code
            document = json.loads(path.read_text("utf-8"))
            if isinstance(document, dict):
                names.update(_strings(cast(dict[str, Any], document).get("auto_map")))
    return sorted(name for name in names if "--" in name or "/" in name)


def _strings(value: Any) -> Iterator[str]:
    """The strings in plain data; ``auto_map`` holds single ones, and lists of them for tokenizers."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(cast(dict[str, Any], value).values()))
    elif isinstance(value, list):
        for item in cast(list[Any], value):
            yield from _strings(item)


def _state(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def list_files(source: HuggingFaceSource) -> list[Path]:
    """The files of a folder that belong to the model: weights, then what lies beside them."""
    return [*source.weights.files, *list_side_files(source)]


def list_side_files(source: HuggingFaceSource) -> list[Path]:
    """The files beside the weights that belong to the model."""
    return side_files(source.folder, source.weights.files, (*SIDE_FILES, INDEX))


def side_files(folder: Path, others: Iterable[Path], patterns: Sequence[str] = SIDE_FILES) -> list[Path]:
    """Files in ``folder`` that fit ``patterns`` and are none of ``others``."""
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    known = set(others)
    return [path for path in dict.fromkeys(found) if path not in known]


def _folder_source(folder: Path, trust_remote_code: bool) -> HuggingFaceSource:
    path = folder / "config.json"
    if not path.is_file():
        raise BismoothError(f"{folder}: there is no config.json. Expected a Hugging Face model folder.")
    try:
        config = json.loads(path.read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise BismoothError(f"{path}: not valid JSON: {error}.") from error
    config = cast(dict[str, Any], config)
    if config.get("auto_map") and not trust_remote_code and not _known_to_transformers(config):
        raise BismoothError(
            f"{folder}: the model brings its own Python code (auto_map in config.json), and transformers has none for "
            f"model type {config.get('model_type')!r}. Read that code, then pass --trust-remote-code to run it."
        )
    if quantization := config.get("quantization_config") or config.get("compression_config"):
        method: Any = "an unnamed method"
        if isinstance(quantization, dict):
            method = cast(dict[str, Any], quantization).get("quant_method", method)
        raise BismoothError(
            f"{folder}: the checkpoint is already quantized ({method}). Expected float weights: export the model that "
            "it was made from."
        )
    weights = folder_weights(folder)
    if reserved := [file.name for file in weights.files if file.name.endswith(RESERVED)]:
        raise BismoothError(
            f"{folder}: has weights in {reserved[0]}, a name that an artifact needs for itself. Rename the file."
        )
    return HuggingFaceSource(folder, weights)


def _known_to_transformers(config: dict[str, Any]) -> bool:
    from transformers.models.auto import configuration_auto

    return config.get("model_type") in cast(Any, configuration_auto).CONFIG_MAPPING_NAMES


def folder_weights(folder: Path) -> Weights:
    """The weights in a Hugging Face folder.

    Raises:
        BismoothError: there are none, or they are pickled, incomplete or broken.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = _read_index(index)
        names = sorted(set(weight_map.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise BismoothError(f"{index}: names a weight file outside the model's folder: {outside[0]}.")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise BismoothError(f"{folder}: weight files are missing: {', '.join(missing)}. Download the model again.")
        placed = {tensor: folder / file for tensor, file in weight_map.items()}
        return read_weights([folder / name for name in names], placed)
    if (folder / WEIGHTS).is_file():
        return read_weights([folder / WEIGHTS])
    if others := sorted(folder.glob("*.safetensors")):
        return read_weights(others)
    if pickled := [path.name for pattern in _PICKLED for path in sorted(folder.glob(pattern))]:
        raise BismoothError(
            f"{folder}: the weights are pickled ({pickled[0]}), and loading a pickle can run any code. Expected "
            "safetensors: load the model where you trust it and save it again with save_pretrained."
        )
    raise BismoothError(f"{folder}: there are no weights. Expected {WEIGHTS}, or {INDEX} and its files.")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = cast(dict[str, str], json.loads(path.read_text("utf-8"))["weight_map"])
        if not all(type(name) is str for name in weight_map.values()):
            raise TypeError("weight_map has values that are no file names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BismoothError(f"{path}: the index of the weight files cannot be read ({error!r}).") from error
    return weight_map


def read_weights(files: list[Path], placed: dict[str, Path] | None = None) -> Weights:
    """The tensors of these files; ``placed`` says which file each must lie in (a safetensors index).

    Raises:
        BismoothError: a file is broken, a tensor is in two files, or not in the one where the index says that it is.
    """
    entries: dict[str, tuple[Path, TensorEntry]] = {}
    for path in files:
        for name, entry in read_header(path).items():
            if placed is not None and placed.get(name) != path:
                continue
            if name in entries:
                raise BismoothError(
                    f"{path}: tensor {name} is also in {entries[name][0].name}. Expected each tensor once."
                )
            entries[name] = (path, entry)
    if placed is not None and (missing := sorted(set(placed) - set(entries))):
        raise BismoothError(
            f"{placed[missing[0]]}: the index says that tensor {missing[0]} is in this file, but it is not."
        )
    return Weights(entries)
