"""The modules around a traced node, as the exporter of torch notes them in its metadata."""

from __future__ import annotations

import ast
from typing import cast

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"


def scopes_of(node: ir.Node) -> list[str]:
    """Module paths around a traced node, outermost first; the last entry is the traced operation's own name."""
    text = node.metadata_props.get(SCOPES)
    return [scope for scope in cast(list[str], ast.literal_eval(text)) if scope] if text else []


def set_scopes(node: ir.Node, scopes: list[str]) -> None:
    """Inverse of :func:`scopes_of`."""
    node.metadata_props[SCOPES] = repr(scopes)
