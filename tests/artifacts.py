"""Artifact folders with next to nothing in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bismooth.export.artifact import Blocks, Manifest, new_folder, place_file, scan_files, write_manifest

FLOAT = Manifest(
    kind="float",
    source={"path": "somewhere", "format": "huggingface", "fingerprint": "00"},
    graphs={"float32": "model.onnx", "float16": "model.float16.onnx"},
    architecture="LlamaForCausalLM",
    dims={"hidden_size": 8},
    blocks=Blocks("model.layers", (0, 1, 0)),
    tools={"python": "3.11"},
    stages=({"stage": "export"},),
)


def write(folder: Path, content: bytes = b"graph", weights: Path | None = None) -> Manifest:
    """Fill an artifact folder; ``weights`` is placed as ``model.safetensors``."""
    for graph in FLOAT.graphs.values():
        (folder / graph).write_bytes(content)
    if weights:
        place_file(weights, folder / "model.safetensors")
    manifest = replace(FLOAT, files=scan_files(folder))
    write_manifest(folder, manifest)
    return manifest


def make(path: Path, content: bytes = b"graph", weights: Path | None = None, *, force: bool = False) -> Path:
    with new_folder(path, force=force) as folder:
        write(folder, content, weights)
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
