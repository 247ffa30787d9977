"""Say what a bundle holds, and hold all of its files against its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..engines.bundle import Bundle
from ..engines.bundle_manifest import read_manifest
from ..export.errors import BismoothError
from . import console
from .inspection import Inspection

_VERDICT_KEYS = ("verdict", "windows", "perplexity_ratio", "kl", "top1", "failures")


def inspect_bundle(path: Path) -> Inspection:
    """What the bundle ``path`` says of itself; its failures are the files that are not as the manifest says."""
    try:
        bundle = Bundle(path, read_manifest(path))
    except BismoothError as error:
        document = {"path": str(path), "kind": "bundle"}
        return Inspection(document, document, (str(error),))
    with console.progress() as progress:
        total = len(bundle.manifest["files"])
        names: list[str] = []

        def read(name: str) -> None:
            names.append(name)
            progress("hash files", len(names), total)

        problems = tuple(bundle.problems("full", read))
    files = bundle.manifest["files"]
    size = sum(record["size"] for record in files.values())
    document = {"path": str(path), "kind": "bundle", "bundle_bytes": size, **bundle.manifest}
    return Inspection(document, _brief(bundle, size), problems)


def _brief(bundle: Bundle, size: int) -> dict[str, Any]:
    manifest = bundle.manifest
    verdict, recipe, licence = manifest["verdict"], manifest["recipe"], manifest["licence"]
    return {
        "path": str(bundle.path),
        "kind": "bundle",
        "name": bundle.name,
        "model": manifest["architecture"],
        "source": f"{manifest['source']['name']} ({manifest['source']['format']})",
        "recipe": "none" if recipe is None else recipe["name"],
        "licence": licence["id"] or ", ".join(licence["files"]) or "unknown",
        "files": len(manifest["files"]),
        "bundle_bytes": size,
        "manifest_sha256": manifest["sha256"],
        "engines": [
            {
                "engine": engine.name,
                "runtime": f"{engine.runtime} {engine.version}",
                "capabilities": list(engine.capabilities),
                "positions": engine.capacity,
                "engine_bytes": sum(manifest["files"][name]["size"] for name in engine.files),
                "int8_mac_share": manifest["engines"][engine.name]["audit"]["int8_mac_share"],
            }
            for engine in bundle.engines
        ],
        "verify": "not run" if verdict is None else {key: verdict[key] for key in _VERDICT_KEYS},
    }
