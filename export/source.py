"""What a model can be made from: a Hugging Face folder, a GGUF file, a hub id, an ONNX file.

A source is only looked at here: its configuration and the headers of its weight files. No weight is read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from .errors import BismoothError
from .safetensors_file import TensorEntry, read_header

INDEX = "model.safetensors.index.json"
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
        return sorted({path for path, _ in self.entries.values()})

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.length for _, entry in self.entries.values())


@dataclass(frozen=True)
class HuggingFaceSource:
    """A folder with ``config.json`` and safetensors files."""

    folder: Path
    config: dict[str, Any]
    weights: Weights


@dataclass(frozen=True)
class GgufSource:
    path: Path


@dataclass(frozen=True)
class OnnxSource:
    path: Path


Source = HuggingFaceSource | GgufSource | OnnxSource


def resolve_source(source: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Find out what ``source`` names: a folder, a ``.gguf`` or ``.onnx`` file, or the id of a model on the Hugging Face hub.

    Raises:
        BismoothError: nothing is there, or it is something that is not accepted (pickled weights, remote code, a quantized checkpoint).
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
    text = str(source)
    if (
        path.is_absolute()
        or text.startswith(".")
        or text.count("/") > 1
        or path.suffix in (".gguf", ".onnx", ".safetensors")
    ):
        raise BismoothError(f"{source}: no such file or folder.")
    return _folder_source(_hub_folder(text), trust_remote_code)


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client has no common base class for its network, id and cache errors
        reason = str(error).strip().splitlines()[0]
        raise BismoothError(
            f"{name}: no such file or folder, and the Hugging Face hub does not give it: {reason} Check the name, or download the model "
            "and pass its folder."
        ) from error


def _folder_source(folder: Path, trust_remote_code: bool) -> HuggingFaceSource:
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise BismoothError(f"{folder}: there is no config.json. Expected a Hugging Face model folder.")
    try:
        config = json.loads(config_path.read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise BismoothError(f"{config_path}: not valid JSON: {error}.") from error
    config = cast(dict[str, Any], config)
    if config.get("auto_map") and not trust_remote_code:
        raise BismoothError(
            f"{folder}: the model brings its own Python code (auto_map in config.json). Read that code, then pass --trust-remote-code to run it."
        )
    if quantization := config.get("quantization_config"):
        method = (
            quantization.get("quant_method", "an unnamed method") if isinstance(quantization, dict) else quantization
        )
        raise BismoothError(
            f"{folder}: the checkpoint is already quantized ({method}). Expected float weights: export the model that it was made from."
        )
    return HuggingFaceSource(folder, config, _folder_weights(folder))


def _folder_weights(folder: Path) -> Weights:
    single, index = folder / "model.safetensors", folder / INDEX
    if index.is_file():
        try:
            weight_map = cast(dict[str, str], json.loads(index.read_text("utf-8"))["weight_map"])
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BismoothError(f"{index}: the index of the weight files cannot be read ({error}).") from error
        files = [folder / name for name in names]
        if outside := [name for name in names if Path(name).name != name]:
            raise BismoothError(f"{index}: names a weight file outside the model's folder: {outside[0]}.")
        if missing := [path.name for path in files if not path.is_file()]:
            raise BismoothError(f"{folder}: weight files are missing: {', '.join(missing)}. Download the model again.")
        return read_weights(files, {name: folder / file for name, file in weight_map.items()})
    if single.is_file():
        return read_weights([single])
    if others := sorted(folder.glob("*.safetensors")):
        return read_weights(others)
    if pickled := [path.name for pattern in _PICKLED for path in sorted(folder.glob(pattern))]:
        raise BismoothError(
            f"{folder}: the weights are pickled ({pickled[0]}), and loading a pickle can run any code. Expected safetensors: save the model "
            "again with save_pretrained(…, safe_serialization=True)."
        )
    raise BismoothError(f"{folder}: there are no weights. Expected model.safetensors, or {INDEX} and its files.")


def read_weights(files: list[Path], placed: dict[str, Path] | None = None) -> Weights:
    """The tensors of these files; ``placed`` says which file each must lie in (a safetensors index)."""
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
