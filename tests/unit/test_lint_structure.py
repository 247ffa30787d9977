"""Lint rules about the graph itself: each on a graph that breaks it, and on a near miss."""

import pytest

from bismooth.passes import lint_structure
from tests.linting import (
    WD,
    WD16,
    Case,
    Cases,
    check_bad,
    check_covered,
    check_good,
    flat,
    graph,
    in_domain,
    linear,
    located,
    renamed,
    reordered,
)

CASES: Cases = {
    "cycle": [
        Case(
            graph("a = Add(x, b2) b2 = Relu(a) y = MatMul(b2, w)"),
            graph("a = Relu(x) y = MatMul(a, w)"),
            "a/Add",
            "a cycle",
        ),
        Case(
            reordered("a = Relu(x) y = MatMul(a, w)"), graph("a = Relu(x) y = MatMul(a, w)"), "y/MatMul", "out of order"
        ),
    ],
    "undefined-value": [
        Case(graph("y = MatMul(gone, w)"), graph("y = Gemm(x, w,)"), "y/MatMul", "reads gone, which nothing computes"),
        Case(graph("z = MatMul(x, w)"), graph("y = MatMul(x, w)"), "graph outputs", "reads y"),
    ],
    "duplicate-value": [
        Case(
            graph("y = MatMul(x, w) y = MatMul(x, w)"), graph("z = MatMul(x, w) y = MatMul(x, w)"), "y", "has 2 sources"
        ),
        Case(graph("w = Relu(x) y = MatMul(x, w)"), graph("v = Relu(x) y = MatMul(v, w)"), "w", "has 2 sources"),
    ],
    "node-name": [
        Case(renamed("", "b"), renamed("a", "b"), "Relu → a", "has no name"),
        Case(renamed("a", "a"), renamed("a", "b"), "a", "names 2 nodes"),
    ],
    "unknown-operator": [
        Case(
            graph("a = Reluu(x) y = MatMul(a, w)"),
            graph("a = Relu(x) y = MatMul(a, w)"),
            "a/Reluu",
            "opset 23 does not have",
        ),
        Case(
            graph("a = Upsample(x, s) y = MatMul(a, w)"),
            graph("a = Mish(x) y = MatMul(a, w)"),
            "a/Upsample",
            "opset 23",
        ),
    ],
    "foreign-operator": [
        Case(in_domain("com.microsoft"), in_domain("trt.plugins"), "y/MatMul", "of the domain com.microsoft"),
        Case(
            in_domain("trt.plugins"), in_domain("com.microsoft"), "y/MatMul", "of the domain trt.plugins", "onnxruntime"
        ),
    ],
    "types": [
        Case(graph("y = MatMul(x, w16)"), graph("y = MatMul(x, w)"), "graph", "types do not fit"),
        Case(linear(WD16), linear(WD), "graph", "types do not fit"),
    ],
    "external-data": [
        Case(located("../w.bin"), located("w.bin"), "w", "is stored at '../w.bin'"),
        Case(located("/elsewhere/w.bin"), located("sub/w.bin"), "w", "Put the file next to the model"),
    ],
}
FLAT = flat(CASES)


@pytest.mark.parametrize(("rule", "case"), FLAT.values(), ids=FLAT)
def test_rule_fires(rule: str, case: Case) -> None:
    check_bad(rule, case)


@pytest.mark.parametrize(("rule", "case"), FLAT.values(), ids=FLAT)
def test_rule_spares_the_near_miss(rule: str, case: Case) -> None:
    check_good(rule, case)


def test_every_rule_has_a_case() -> None:
    check_covered(CASES, lint_structure)
