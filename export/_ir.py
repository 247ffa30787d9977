"""A typed face of onnx-ir's writer; apart from ``_onnx``, since most stages need no onnx-ir, which imports slowly."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from .replacing import replacing

_ir: Any = ir


def save_ir(model: ir.Model, path: Path) -> None:
    """Write an ONNX file of bismooth's own making; references to external data stay as they are."""
    model.producer_name, model.producer_version = "bismooth", version("bismooth")
    with replacing(path) as temporary:
        _ir.save(model, str(temporary), format="protobuf")
