"""Check an ONNX file, anybody's, against what runtimes refuse, and against what they accept and silently do worse.

The rules are the functions in ``lint_structure``, ``lint_quantization``, ``lint_types`` and ``lint_attention``; each
says in its docstring what happens otherwise. Graphs that this package writes have no finding for their target.

NOTE: no weight is read, except scales and zero points. Subgraphs of control flow are not looked into.
"""

from collections.abc import Sequence
from pathlib import Path

import onnx

from . import lint_attention, lint_quantization, lint_structure, lint_types
from ._gs import FileValues, Graph, export_model
from .lint_rule import RULES, Finding, Severity, Target
from .lint_view import View, read_model

__all__ = ["RULES", "Finding", "Severity", "Target", "lint"]
_RULE_FILES = (lint_structure, lint_quantization, lint_types, lint_attention)


def lint(
    model: Path | onnx.ModelProto | Graph,
    *,
    target: Target,
    capabilities: Sequence[int] = (),
    folder: Path | None = None,
) -> list[Finding]:
    """All findings about a model: errors first, then in the order of the rules and of the graph.

    Args:
        model: An ONNX file, a model or a graph.
        target: The runtime it is meant for.
        capabilities: Compute capabilities (``86`` for SM86) that an engine is built for.
        folder: Where external data lies; known for a file, and for a graph that was loaded from one.

    Raises:
        BismoothError: The file is not an ONNX model.
    """
    if isinstance(model, Path):
        proto, folder = read_model(model), folder or model.parent
    elif isinstance(model, onnx.ModelProto):
        proto = model
    else:
        proto, folder = export_model(model), folder or _weight_folder(model)
    view = View(proto, target, tuple(capabilities), folder)
    found = [finding for rule in RULES if target in rule.targets for finding in rule.findings(view)]
    return sorted(found, key=lambda finding: finding.severity is not Severity.ERROR)


def _weight_folder(graph: Graph) -> Path | None:
    for node in graph.nodes:
        for tensor in node.inputs:
            values = getattr(tensor, "_values", None)
            if isinstance(values, FileValues):
                return values.folder
    return None
