"""Typed faces of the functions of onnx and onnx-ir whose own annotations type checkers cannot use.

Files are written under a temporary name and renamed: a file that was there before, perhaps a hard link of somebody's
own, is replaced and never written to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import onnx
import onnx_ir as ir

_onnx: Any = onnx
_ir: Any = ir


def load_proto(path: Path) -> onnx.ModelProto:
    """Read an ONNX file; external data stays outside. Raises what protobuf and onnx raise on broken files."""
    return cast(onnx.ModelProto, _onnx.load(str(path), load_external_data=False))


def save_proto(model: onnx.ModelProto, path: Path) -> None:
    """Write an ONNX file; references to external data stay as they are."""
    temporary = _temporary(path)
    temporary.write_bytes(model.SerializeToString())
    temporary.replace(path)


def check_proto(model: onnx.ModelProto) -> None:
    """Check a model against the operators' schemas; raises ``onnx.checker.ValidationError``."""
    _onnx.checker.check_model(model)


def save_ir(model: ir.Model, path: Path) -> None:
    """Write an ONNX file; references to external data stay as they are."""
    temporary = _temporary(path)
    _ir.save(model, str(temporary), format="protobuf")
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
