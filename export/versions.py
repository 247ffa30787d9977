"""Versions of the tools that make artifacts."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "bismooth",
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnx-graphsurgeon",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx-cu12",
    "tensorrt",
    "numpy",
    "ml_dtypes",
)


def tool_versions() -> dict[str, str]:
    """Installed versions of what takes part in making an artifact; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
