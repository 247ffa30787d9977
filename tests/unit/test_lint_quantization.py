"""Lint rules about Q/DQ: each on a graph that breaks it, and on a near miss."""

import pytest

from bismooth.passes import lint_quantization
from tests.linting import (
    ATTENDED,
    ATTENTION,
    IN,
    OUT,
    WD,
    XQ,
    Case,
    Cases,
    K,
    N,
    check_bad,
    check_covered,
    check_good,
    flat,
    graph,
    linear,
)

CASES: Cases = {
    "zero-point": [
        Case(linear(WD, XQ.replace("zero", "three")), linear(WD), "xq/QuantizeLinear", "has the zero point 3"),
        Case(linear(WD.replace("zero", "three")), linear(WD), "wd/DequantizeLinear", "has the zero point 3"),
    ],
    "uint8": [
        Case(linear("wd = DequantizeLinear(wu, s, u0)"), linear(WD), "wd/DequantizeLinear", "UINT8 with zero point 0"),
        Case(
            linear(WD, "xq = QuantizeLinear(x, s) xd = DequantizeLinear(xq, s)"),
            linear(WD),
            "xq/QuantizeLinear",
            "as INT8, silently",
        ),
    ],
    "scale-constant": [
        Case(
            graph(f"p = ReduceMax<keepdims = 0>(x) {XQ} {WD} y = MatMul(xd, wd)".replace("s, zero", "p, zero", 2)),
            graph(f"p = Mul(s, one) {XQ} {WD} y = MatMul(xd, wd)".replace("s, zero", "p, zero", 2)),
            "xq/QuantizeLinear",
            "computed at run time",
        )
    ],
    "scale-value": [
        Case(
            linear("wd = DequantizeLinear<axis = 1>(wq, s_zero, zn)"),
            linear("wd = DequantizeLinear<axis = 1>(wq, sn, zn)"),
            "wd/DequantizeLinear",
            f"scale 0 at index {N - 1}",
        ),
        Case(linear(WD.replace("s,", "s_nan,")), linear(WD), "wd/DequantizeLinear", "scale nan at index 0"),
    ],
    "activation-scale": [
        Case(
            linear(WD, XQ.replace("(x, s, zero)", "(x, sk, zk)").replace("(xq, s, zero)", "(xq, sk, zk)")),
            linear("wd = DequantizeLinear<axis = 1>(wq, sn, zn)"),
            "xq/QuantizeLinear",
            "runs in float, silently",
        ),
    ],
    "weight-scale-axis": [
        Case(
            linear("wd = DequantizeLinear<axis = 0>(wq, sk, zk)"),
            linear("wd = DequantizeLinear<axis = 1>(wq, sn, zn)"),
            "wd/DequantizeLinear",
            "axis 0 of the weight, over which y/MatMul sums",
        ),
        Case(
            linear("wt = DequantizeLinear<axis = 1>(wq_t, sk, zk) wd = Transpose<perm = [1, 0]>(wt)"),
            linear("wt = DequantizeLinear<axis = 0>(wq_t, sn, zn) wd = Transpose<perm = [1, 0]>(wt)"),
            "wt/DequantizeLinear",
            "axis 1",
        ),
        Case(
            graph(f"{XQ} wd = DequantizeLinear<axis = -1>(wq_t, sk, zk) y = Gemm<transB = 1>(xd, wd)"),
            graph(f"{XQ} wd = DequantizeLinear<axis = 0>(wq_t, sn, zn) y = Gemm<transB = 1>(xd, wd)"),
            "wd/DequantizeLinear",
            "axis -1",
        ),
    ],
    "blocked-activation": [
        Case(
            linear("wd = DequantizeLinear<axis = 0, block_size = 16>(wq, blocks)"),
            graph("wd = DequantizeLinear<axis = 0, block_size = 16>(wq, blocks) y = MatMul(x, wd)"),
            "y/MatMul",
            "the first block's scale",
            target,
        )
        for target in ("tensorrt", "onnxruntime")
    ],
    "blocked-weight": [
        Case(
            graph("wd = DequantizeLinear<axis = 0, block_size = 16>(wq, blocks) y = MatMul(x, wd)"),
            graph("wd = DequantizeLinear<axis = 0, block_size = 16>(w4, blocks) y = MatMul(x, wd)"),
            "y/MatMul",
            "rewrites the whole weight",
        )
    ],
    "int4-block": [
        Case(
            graph("wd = DequantizeLinear<axis = 0, block_size = 8>(w4, blocks8) y = MatMul(x, wd)"),
            graph("wd = DequantizeLinear<axis = 0, block_size = 16>(w4, blocks) y = MatMul(x, wd)"),
            "wd/DequantizeLinear",
            "block size 8",
        )
    ],
    "blocked-matmulnbits": [
        Case(
            graph("wd = DequantizeLinear<axis = 0, block_size = 16>(w4, blocks) y = MatMul(x, wd)"),
            graph("wd = DequantizeLinear<axis = 1>(wq, sn, zn) y = MatMul(x, wd)"),
            "wd/DequantizeLinear",
            "accuracy_level=1",
            "onnxruntime",
        )
    ],
    "integer-operator": [
        Case(
            graph("xq, xs, xz = DynamicQuantizeLinear(x) y = DequantizeLinear(xq, xs, xz)"),
            linear(WD),
            "xq/DynamicQuantizeLinear",
            "TensorRT refuses it",
        ),
        Case(
            graph("xq = QuantizeLinear(x, s, zero) a = MatMulInteger(xq, wq) y = Cast<to = 1>(a)"),
            linear(WD),
            "a/MatMulInteger",
            "QDQ format",
        ),
    ],
    "int32-bias": [
        Case(
            graph("bd = DequantizeLinear(bq, s) m = MatMul(x, w) y = Add(m, bd)"),
            graph("m = MatMul(x, w) y = Add(m, b)"),
            "bd/DequantizeLinear",
            "Keep biases in float",
        )
    ],
    "weight-constant": [
        Case(
            graph(
                f"{XQ} wd = DequantizeLinear(v, s, zero) y = MatMul(xd, wd)",
                f"(float[n, {K}] x, int8[{K}, {N}] v) => {OUT}",
            ),
            graph(
                f"{XQ} vq = QuantizeLinear(v, s, zero) wd = DequantizeLinear(vq, s, zero) y = MatMul(xd, wd)",
                f"(float[n, {K}] x, float[{K}, {N}] v) => {OUT}",
            ),
            "wd/DequantizeLinear",
            "dequantizes v, which is neither stored nor quantized",
        )
    ],
    "quantized-residual": [
        Case(
            graph(f"{XQ} h = Add(x, xd) y = MatMul(h, w)"),
            graph(f"h = Add(x, g) {XQ} {WD} m = MatMul(xd, wd) y = Add(m, b)"),
            "h/Add",
            "residual stream",
        ),
    ],
    "quantized-norm": [
        Case(
            graph(f"{XQ} h = RMSNormalization(xd, g) y = MatMul(h, w)"),
            graph(f"h = RMSNormalization(x, g) {XQ.replace('(x,', '(h,')} {WD} y = MatMul(xd, wd)"),
            "h/RMSNormalization",
            "Quantize after the norm",
        )
    ],
    "quantized-attention": [
        Case(
            graph(f"{XQ} xt = Transpose<perm = [1, 0]>(xd) y = MatMul(xd, xt)", f"{IN} => (float[n, n] y)"),
            linear(WD),
            "y/MatMul",
            "Leave attention in float16",
        ),
        Case(
            graph(
                "qq = QuantizeLinear(q, s16, zero) qd = DequantizeLinear(qq, s16, zero) y = Attention(qd, k, v)",
                f"{ATTENTION} => {ATTENDED}",
            ),
            graph("y = Attention(q, k, v)", f"{ATTENTION} => {ATTENDED}"),
            "y/Attention",
            "head sizes 16, 32 and 64",
        ),
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
    check_covered(CASES, lint_quantization)
