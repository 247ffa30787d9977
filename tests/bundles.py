"""A bundle folder made by hand, whose files hold next to nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bismooth.engines.bundle_manifest import MANIFEST, write_manifest

FILES = {
    "README.md": b"# card\n",
    "config.json": b"{}\n",
    "engines/onnxruntime/model.audit.json": b"{}",
    "engines/onnxruntime/model.onnx": b"graph",
    "engines/onnxruntime/weights.bin": b"weights of some length",
    "tokenizer.json": b"{}",
}
AUDIT = {
    "linears": 3,
    "int8_linears": 2,
    "int8_mac_share": 1.0,
    "int8_mac_with_head_share": 0.75,
    "int8_gemms": 2,
    "fused_attention": 1,
    "kernels": 9,
    "fallbacks": 0,
}


def engine(runtime: str, folder: str | None = None, **changes: Any) -> dict[str, Any]:
    """An engine's entry in the manifest; its files are those of ``FILES`` in its folder."""
    place = f"engines/{folder or runtime}/"
    files = [name for name in FILES if name.startswith(place)]
    file = f"{place}model.{'onnx' if runtime == 'onnxruntime' else 'engine'}"
    plain = {"runtime": runtime, "version": "1.31", "capabilities": [], "capacity": 64, "file": file, "files": files}
    return {**plain, "audit": AUDIT, **changes}


def manifest(files: Mapping[str, bytes] = FILES, **changes: Any) -> dict[str, Any]:
    """Content of ``bundle.json`` without its hash."""
    return {
        "name": "tiny-w8a8",
        "architecture": "LlamaForCausalLM",
        "decodes": True,
        "dims": {"hidden_size": 8},
        "source": {"name": "tiny", "format": "huggingface", "fingerprint": "00", "content_sha256": None},
        "recipe": {"name": "w8a8", "fingerprint": "11", "description": "INT8."},
        "licence": {"id": "mit", "stated_by": "README.md", "files": []},
        "verdict": None,
        "engines": {"onnxruntime": engine("onnxruntime")},
        "tools": {"python": "3.11"},
        "files": {name: record(content) for name, content in files.items()},
        **changes,
    }


def record(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def make_bundle(folder: Path, files: Mapping[str, bytes] = FILES, **changes: Any) -> Path:
    """Write ``files``, and a manifest of them with ``changes``."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, manifest(files, **changes))
    return folder


def forge(folder: Path, document: Mapping[str, Any]) -> None:
    """Replace the manifest as an attacker would: its hash is right, its content need not be."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    sealed = {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(sealed), "utf-8")
