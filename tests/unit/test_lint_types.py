"""Lint rules about types, architectures, attention and norms: on a graph that breaks them, and on a near miss."""

import pytest

from bismooth.passes import lint_attention, lint_types
from tests.linting import (
    ATTENDED,
    ATTENTION,
    IN16,
    OUT,
    OUT16,
    ROWS16,
    ROWS32,
    WD,
    WD16,
    XQ,
    Case,
    Cases,
    check_bad,
    check_covered,
    check_good,
    flat,
    graph,
    linear,
    linear16,
)

CASES: Cases = {
    "sm75-matmul": [
        Case(
            linear(WD), linear16(WD16), "y/MatMul", "INT8 GEMM in float32. The build for SM75 fails", capabilities=(75,)
        ),
        Case(linear(WD), linear(WD), "y/MatMul", "Use the float16 graph", capabilities=(75,), fine_capabilities=(80,)),
    ],
    "sm75-conv": [
        Case(
            graph(
                f"{XQ} wd = DequantizeLinear<axis = 0>(cq, s8, z8) y = Conv(xd, wd)",
                "(float[n, 4, 9, 9] x) => (float[n, 8, 7, 7] y)",
            ),
            graph(
                "wd = DequantizeLinear<axis = 0>(cq, s8, z8) y = Conv(x, wd)",
                "(float[n, 4, 9, 9] x) => (float[n, 8, 7, 7] y)",
            ),
            "y/Conv",
            "an INT8 convolution, which SM75 lacks",
            capabilities=(75,),
        )
    ],
    "int4-capability": [
        Case(
            w4 := graph("wd = DequantizeLinear<axis = 0, block_size = 16>(w4, blocks) y = MatMul(x, wd)"),
            w4,
            "wd/DequantizeLinear",
            "is INT4, which SM75 lacks",
            capabilities=(75,),
            fine_capabilities=(80,),
        ),
    ],
    "fp8-capability": [
        Case(
            f8 := graph("wd = DequantizeLinear(fp8, s) y = MatMul(x, wd)"),
            f8,
            "wd/DequantizeLinear",
            "is FP8, which SM86 lacks",
            capabilities=(86, 89),
            fine_capabilities=(89, 120),
        ),
    ],
    "fp4-capability": [
        Case(
            f4 := graph("wd = DequantizeLinear<axis = 0, block_size = 16>(fp4, blocks) y = MatMul(x, wd)"),
            f4,
            "wd/DequantizeLinear",
            "is FP4, which SM89 lacks",
            capabilities=(89,),
            fine_capabilities=(120,),
        ),
    ],
    "bfloat16-capability": [
        Case(
            graph("v = Cast<to = 1>(bf) y = MatMul(x, v)"),
            graph("v = Cast<to = 1>(w16) y = MatMul(x, v)"),
            "bf",
            "is bfloat16, which SM75 lacks",
            capabilities=(75,),
        ),
        Case(
            graph("h = Cast<to = 16>(x) v = Cast<to = 1>(h) y = MatMul(v, w)"),
            graph("h = Cast<to = 10>(x) v = Cast<to = 1>(h) y = MatMul(v, w)"),
            "h/Cast",
            "Build for SM80",
            capabilities=(75,),
        ),
    ],
    "sm75-mixed": [
        Case(
            plain := graph("y = MatMul(x, w)"),
            plain,
            "graph",
            "for SM 75, 86 at once",
            capabilities=(75, 86),
            fine_capabilities=(86, 89),
        ),
        Case(plain, plain, "graph", "Build a separate engine for SM75", capabilities=(75, 80), fine_capabilities=(75,)),
    ],
    "quantize-scale-type": [
        Case(
            linear(WD, XQ.replace("(x, s,", "(x, s16,")),
            linear(WD),
            "xq/QuantizeLinear",
            "float16 scale for a float32 input",
        ),
    ],
    "int8-overflow": [
        Case(
            linear16("wd = DequantizeLinear<axis = 1>(wq, sn16, zn)"),
            linear16(WD16),
            "y/MatMul",
            "overflows above 65504",
        ),
        Case(
            linear16("wd = DequantizeLinear<axis = 1>(wq, sn16, zn)"),
            linear("wd = DequantizeLinear<axis = 1>(wq, sn, zn)"),
            "y/MatMul",
            "multiply by the rest in float32",
        ),
    ],
    "int8-range": [
        Case(linear16("wd = DequantizeLinear(wq, one16, zero)"), linear16(WD16), "y/MatMul", "can sum up to 5.16e+05"),
    ],
    "rescale-type": [
        Case(
            linear16(WD16, after="a = MatMul(xd, wd) y = Mul(a, r16)"),
            linear16(WD16, after="a = MatMul(xd, wd) c = Cast<to = 1>(a) m = Mul(c, r) y = Cast<to = 10>(m)"),
            "y/Mul",
            "rescales INT8 sums in float16",
        ),
        Case(
            linear16(WD16, after="a = MatMul(xd, wd) p = ReduceMax(x, last) y = Mul(a, p)"),
            linear16(WD16, after="a = MatMul(xd, wd) p = Sigmoid(a) y = Mul(a, p)"),
            "y/Mul",
            "it is one kernel",
        ),
    ],
    "row-scale-type": [
        Case(
            linear16(WD16, f"{ROWS16} xq = QuantizeLinear(u, one16, zero) xd = DequantizeLinear(xq, one16, zero)"),
            linear16(WD16, f"{ROWS32} xq = QuantizeLinear(u, one, zero) xd = DequantizeLinear(xq, one16, zero)"),
            "xq/QuantizeLinear",
            "rows that were divided in float16",
        )
    ],
    "quantize-type": [
        Case(
            linear16(WD16, "xq = QuantizeLinear(x, s16, zero) xd = DequantizeLinear(xq, s16, zero)"),
            linear16(WD16),
            "xq/QuantizeLinear",
            "quantizes in float16",
        ),
    ],
    "half-scale": [
        Case(
            linear16("wd = DequantizeLinear(wq, tiny16, zero)"),
            linear16("wd = DequantizeLinear(wq, small16, zero)"),
            "wd/DequantizeLinear",
            "the float16 scale 1.52e-05, of which fewer than 8 bits are left",
        ),
        Case(
            linear16("wd = DequantizeLinear(wq, tiny_or_zero, zn)"),
            linear16("wd = DequantizeLinear(wq, small_or_zero, zn)"),
            "wd/DequantizeLinear",
            "the float16 scale 1.52e-05, of which fewer than 8 bits are left",
        ),
        Case(
            linear16(WD16, "xq = QuantizeLinear(x, small16, zero) xd = DequantizeLinear(xq, small16, zero)"),
            linear16(WD16, "xq = QuantizeLinear(x, above16, zero) xd = DequantizeLinear(xq, above16, zero)"),
            "xq/QuantizeLinear",
            "the float16 scale 1.53e-05. The kernel multiplies by 1/scale, which overflows",
        ),
    ],
    "half-on-cpu": [
        Case(linear16(WD16), linear(WD), "y/MatMul", "Use the float32 graph", "onnxruntime"),
    ],
    "attention-type": [
        Case(
            graph("y = Attention(q, k, v, m)", f"{ATTENTION} => {ATTENDED}".replace("float16", "float")),
            graph("y = Attention(q, k, v, m)", f"{ATTENTION} => {ATTENDED}"),
            "y/Attention",
            "Build from the float16 graph",
        )
    ],
    "attention-cache": [
        Case(
            graph("y, pk, pv = Attention(q, k, v, m)", f"{ATTENTION} => {ATTENDED}"),
            graph("y = Attention(q, k, v, m)", f"{ATTENTION} => {ATTENDED}"),
            "y/Attention",
            "Concatenate old and new K and V",
        )
    ],
    "attention-causal": [
        Case(
            graph("y = Attention<is_causal = 1>(q, k, v, m)", f"{ATTENTION} => {ATTENDED}"),
            graph("y = Attention<is_causal = 1>(q, k, v)", f"{ATTENTION} => {ATTENDED}"),
            "y/Attention",
            "with is_causal=0",
        )
    ],
    "attention-shared": [
        Case(
            graph("h = Attention(q, k, v, m) y = Attention(h, k, v, m)", f"{ATTENTION} => {ATTENDED}"),
            graph("h = Attention(q, k, v, m) y = Attention(h, k, q, m)", f"{ATTENTION} => {ATTENDED}"),
            "y/Attention",
            "the same K and V as h/Attention",
        )
    ],
    "norm-type": [
        Case(
            graph("h = RMSNormalization(x, g) y = MatMul(h, w)", f"{IN16} => {OUT}"),
            graph("h = RMSNormalization(x, g16) y = MatMul(h, w16)", f"{IN16} => {OUT16}"),
            "h/RMSNormalization",
            "narrows gamma and the result, silently",
        )
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
    check_covered(CASES, lint_types, lint_attention)
