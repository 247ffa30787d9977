"""Graphs with one thing wrong for the lint rules, and the tests that each rule must pass on its cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import ml_dtypes
import numpy as np
import onnx

from bismooth.passes.lint import RULES, Target, lint
from tests.textgraphs import Array, parse

K, N = 32, 16
RNG = np.random.default_rng(0)
HALF = np.dtype(np.float16)
CONSTANTS: dict[str, Array] = {
    "w": RNG.standard_normal((K, N)).astype(np.float32),
    "w16": RNG.standard_normal((K, N)).astype(HALF),
    "wq": RNG.integers(-127, 128, (K, N)).astype(np.int8),
    "wq_t": RNG.integers(-127, 128, (N, K)).astype(np.int8),
    "wu": RNG.integers(0, 128, (K, N)).astype(np.uint8),
    "cq": RNG.integers(-127, 128, (8, 4, 3, 3)).astype(np.int8),
    "bq": np.ones(N, np.int32),
    "b": np.ones(N, np.float32),
    "g": np.ones(K, np.float32),
    "g16": np.ones(K, HALF),
    "s": np.array(0.02, np.float32),
    "s16": np.array(0.02, HALF),
    "s0": np.array(2.0**-14, np.float32),
    "s0_16": np.array(2.0**-14, HALF),
    "small16": np.array(2.0**-16, HALF),
    "tiny16": np.array(2.0**-16 - 2.0**-24, HALF),
    "above16": np.array(2.0**-16 + 2.0**-24, HALF),
    "tiny_or_zero": np.array([0] + [2.0**-16 - 2.0**-24] * (N - 1), HALF),
    "small_or_zero": np.array([0] + [2.0**-16] * (N - 1), HALF),
    "one": np.array(1, np.float32),
    "one16": np.array(1, HALF),
    "zero": np.array(0, np.int8),
    "three": np.array(3, np.int8),
    "u0": np.array(0, np.uint8),
    "i4": np.array(0, np.int8).astype(ml_dtypes.int4),
    "w4": np.ones((K, N), ml_dtypes.int4),
    "sk": np.full(K, 0.02, np.float32),
    "sk16": np.full(K, 0.02, HALF),
    "zk": np.zeros(K, np.int8),
    "sn": np.full(N, 0.02, np.float32),
    "sn16": np.full(N, 0.02, HALF),
    "zn": np.zeros(N, np.int8),
    "s8": np.full(8, 0.02, np.float32),
    "z8": np.zeros(8, np.int8),
    "blocks": np.full((2, N), 0.02, np.float32),
    "blocks8": np.full((4, N), 0.02, np.float32),
    "s_zero": np.array([0.02] * (N - 1) + [0], np.float32),
    "s_nan": np.array("nan", np.float32),
    "fp8": np.ones((K, N), ml_dtypes.float8_e4m3fn),
    "fp4": np.ones((K, N), ml_dtypes.float4_e2m1fn),
    "bf": np.ones((K, N), ml_dtypes.bfloat16),
    "last": np.array([-1]),
    "r": np.full(N, 100, np.float32),
    "r16": np.full(N, 100, HALF),
    "huge": np.array(100, np.float32),
}
IN, OUT = f"(float[n, {K}] x)", f"(float[n, {N}] y)"
IN16, OUT16 = f"(float16[n, {K}] x)", f"(float16[n, {N}] y)"
#: x and the weight, quantized by scalars.
XQ = "xq = QuantizeLinear(x, s, zero) xd = DequantizeLinear(xq, s, zero)"
XQ16 = "xc = Cast<to = 1>(x) xq = QuantizeLinear(xc, one, zero) xd = DequantizeLinear(xq, one16, zero)"
WD = "wd = DequantizeLinear(wq, s, zero)"


def graph(body: str, signature: str = f"{IN} => {OUT}") -> onnx.ModelProto:
    """A model with the constants of the table that it reads."""
    used = {name: values for name, values in CONSTANTS.items() if f" {name}" in body.replace("(", "( ")}
    return parse(f"{signature} {{ {body} }}", **used)


def linear(weight: str, activation: str = XQ) -> onnx.ModelProto:
    return graph(f"{activation} {weight} y = MatMul(xd, wd)")


def linear16(weight: str, activation: str = XQ16, after: str = "y = MatMul(xd, wd)") -> onnx.ModelProto:
    return graph(f"{activation} {weight} {after}", f"{IN16} => {OUT16}")


def renamed(*names: str) -> onnx.ModelProto:
    model = graph("a = Relu(x) y = MatMul(a, w)")
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name
    return model


def reordered(body: str) -> onnx.ModelProto:
    """The nodes of a body, last first."""
    model = graph(body)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def located(location: str) -> onnx.ModelProto:
    model = graph("y = MatMul(x, w)")
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return model


def in_domain(domain: str) -> onnx.ModelProto:
    model = graph("y = MatMul(x, w)")
    model.graph.node[0].domain = domain
    model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    return model


ATTENTION = "(float16[1, 2, n, 16] q, float16[1, 2, n, 16] k, float16[1, 2, n, 16] v, bool[n, n] m)"
ATTENDED = "(float16[1, 2, n, 16] y)"
ROWS16 = "a = Abs(x) t = ReduceMax(a, last) u = Div(x, t)"
ROWS32 = "xc = Cast<to = 1>(x) a = Abs(xc) t = ReduceMax(a, last) u = Div(xc, t)"
WD16 = "wd = DequantizeLinear(wq, s0_16, zero)"


@dataclass(frozen=True)
class Case:
    """A graph that breaks a rule, one that does not, the node that is named, and words of the message."""

    bad: onnx.ModelProto
    good: onnx.ModelProto
    node: str
    words: str
    target: Target = "tensorrt-rtx"
    capabilities: tuple[int, ...] = (86,)
    fine_capabilities: tuple[int, ...] | None = None


Cases = Mapping[str, Sequence[Case]]


def flat(cases: Cases) -> dict[str, tuple[str, Case]]:
    """Rule and case by a name for the test."""
    return {f"{rule}-{place}": (rule, case) for rule, several in cases.items() for place, case in enumerate(several)}


def check_bad(rule: str, case: Case) -> None:
    """The rule finds the bad graph, and names the node."""
    everything = lint(case.bad, target=case.target, capabilities=case.capabilities)
    found = [finding for finding in everything if finding.rule == rule]
    assert found, everything
    assert found[0].node == case.node
    assert case.words in found[0].message


def check_good(rule: str, case: Case) -> None:
    """The rule does not find the near miss."""
    capabilities = case.capabilities if case.fine_capabilities is None else case.fine_capabilities
    everything = lint(case.good, target=case.target, capabilities=capabilities)
    assert [finding for finding in everything if finding.rule == rule] == []


def check_covered(cases: Cases, *modules: ModuleType) -> None:
    """Every rule of the modules has a case, and says why it is one."""
    rules = [rule for rule in RULES if rule.check.__module__ in {module.__name__ for module in modules}]
    assert set(cases) == {rule.name for rule in rules}
    assert all(rule.check.__doc__ and rule.check.__doc__.endswith(".") for rule in rules)
