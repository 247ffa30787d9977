"""Inspect anybody's ONNX file: what it computes, how much of it in INT8, and what runtimes will make of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from ..passes.lint import Finding, Severity, Target, lint
from ..passes.lint_view import View, read_model
from .inspection import SHOWN, Inspection

TARGETS: tuple[Target, ...] = ("tensorrt-rtx", "onnxruntime")


def inspect_onnx(path: Path, *, foreign: bool = True, targets: Sequence[Target] = TARGETS) -> Inspection:
    """What an ONNX file holds, and the linter's findings for each runtime.

    Args:
        path: The file; its weights are not read.
        foreign: Whether errors are failures. The graphs of an artifact are for one runtime each.
        targets: The runtimes.

    Raises:
        BismoothError: not an ONNX model.
    """
    model = read_model(path)
    view = View(model, targets[0], (), path.parent)
    findings: dict[Target, list[Finding]] = {target: lint(path, target=target) for target in targets}
    operators = Counter(node.op_type for node in model.graph.node)
    document: dict[str, Any] = {
        "path": str(path),
        "kind": "onnx",
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
        "ir_version": model.ir_version,
        "opsets": dict(view.opsets),
        "inputs": [value.name for value in model.graph.input if value.name not in view.initializers],
        "outputs": [value.name for value in model.graph.output],
        "nodes": len(model.graph.node),
        "operators": dict(operators.most_common()),
        **_linears(view),
    }
    shown = document | {"operators": ", ".join(f"{count} {op}" for op, count in operators.most_common(SHOWN))}
    shown["opsets"] = ", ".join(f"{domain or 'onnx'} {version}" for domain, version in view.opsets.items())
    errors = _errors(findings) if foreign else ()
    return Inspection(
        document | {"findings": {target: [_row(item) for item in found] for target, found in findings.items()}},
        shown | {f"{target}_findings": _by_rule(found) for target, found in findings.items()},
        errors,
    )


def _linears(view: View) -> dict[str, Any]:
    """Products with one constant operand, weighted by multiply-accumulates per position: the size of the weight."""
    integer = {id(gemm.node) for gemm in view.integer_gemms()}
    count, total, both, weight_only = 0, 0, 0, 0
    for node in view.linears():
        weights = [value for value in node.input[:2] if value in view.constants]
        if len(weights) != 1:
            continue
        macs = prod(size or 1 for size in view.shapes.get(weights[0], ()))
        count, total = count + 1, total + macs
        if id(node) in integer:
            both += macs
        elif view.dequantizer(weights[0]) is not None:
            weight_only += macs
    return {
        "linears": count,
        "qdq_mac_share": both / total if total else 0.0,
        "weight_only_mac_share": weight_only / total if total else 0.0,
    }


def _errors(findings: dict[Target, list[Finding]]) -> tuple[str, ...]:
    """The errors, each once, with the runtimes that they are errors for."""
    targets: dict[tuple[str, str, str], list[str]] = {}
    for target, found in findings.items():
        for item in found:
            if item.severity is Severity.ERROR:
                targets.setdefault((item.node, item.message, item.rule), []).append(target)
    return tuple(f"{', '.join(names)}: {node}: {text} [{rule}]" for (node, text, rule), names in targets.items())


def _row(finding: Finding) -> dict[str, Any]:
    return {
        "rule": finding.rule,
        "severity": str(finding.severity),
        "node": finding.node,
        "message": finding.message,
    }


def _by_rule(findings: list[Finding]) -> Any:
    """One row per rule, with its first node; the errors themselves follow as failures."""
    counts = Counter((str(item.severity), item.rule) for item in findings)
    first = {(str(item.severity), item.rule): item.node for item in reversed(findings)}
    rows = [
        {"severity": severity, "rule": rule, "count": count, "first": first[severity, rule]}
        for (severity, rule), count in counts.most_common(SHOWN)
    ]
    return rows or "none"
