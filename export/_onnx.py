"""Typed faces of the functions of onnx whose own annotations type checkers cannot use.

A file that was there before, perhaps a hard link of somebody's own, is replaced and never written to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import onnx

from .replacing import replacing

_onnx: Any = onnx


def load_proto(path: Path) -> onnx.ModelProto:
    """Read an ONNX file; external data stays outside. Raises what protobuf and onnx raise on broken files."""
    return cast(onnx.ModelProto, _onnx.load(str(path), load_external_data=False))


def save_proto(model: onnx.ModelProto, path: Path) -> None:
    """Write an ONNX file; references to external data stay as they are."""
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def check_proto(model: onnx.ModelProto) -> None:
    """Check a model against the operators' schemas; raises ``onnx.checker.ValidationError``."""
    _onnx.checker.check_model(model)
