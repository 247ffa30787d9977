"""Typed faces of the functions of onnx and onnx-ir whose own annotations type checkers cannot use.

A file that was there before, perhaps a hard link of somebody's own, is replaced and never written to.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import onnx
import onnx_ir as ir

from .replacing import replacing

_onnx: Any = onnx
_ir: Any = ir


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


def save_ir(model: ir.Model, path: Path) -> None:
    """Write an ONNX file of bismooth's own making; references to external data stay as they are."""
    model.producer_name, model.producer_version = "bismooth", version("bismooth")
    with replacing(path) as temporary:
        _ir.save(model, str(temporary), format="protobuf")
