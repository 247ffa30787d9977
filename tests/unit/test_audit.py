"""Audits: of recorded builds, and of every way a linear can run or be missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bismooth.engines.audit import Audit, Figures, audit_kernels, audit_log
from bismooth.engines.kernel_log import Kernel, Tensor
from bismooth.engines.linears import Linear
from bismooth.export.errors import BismoothError, GateError

LOGS = Path(__file__).parent / "tensorrt_logs"
FC = [Linear("fc", "fc/MatMul", 65536, quantized=True, head=False)]
QKV = [Linear(name, f"{name}/MatMul", 65536, quantized=True, head=False) for name in ("q_proj", "k_proj", "v_proj")]


def kernel(
    kind: str, *nodes: str, types: tuple[str, str] = ("Half", "Half"), name: str = "", profile: int = 0
) -> Kernel:
    activation, weight = Tensor("x", (-1, 256), types[0]), Tensor("w", (256, 256), types[1])
    return Kernel(name or f"{kind}.{'+'.join(nodes)}", kind, (activation,), (weight,), (activation,), nodes, profile)


def int8(*nodes: str, profile: int = 0) -> Kernel:
    return kernel("gemm", *nodes, types=("Int8", "Int8"), profile=profile)


def linear(name: str, macs: int = 1, head: bool = False) -> Linear:
    return Linear(name, f"{name}/MatMul", macs, quantized=False, head=head)


def recorded(name: str, linears: list[Linear]) -> Audit:
    return audit_log((LOGS / f"{name}.log").read_text("utf-8"), linears, [linear.node for linear in linears])


def test_recorded_per_token_build() -> None:
    audit = recorded("per_token", QKV)
    assert [str(found) for found in audit.linears] == [f"{q.node} (gemm: Int8 x Int8 -> Half)" for q in QKV]
    assert sorted(audit.linears[0].merged_with) == ["k_proj", "v_proj"]
    assert (audit.gemms, audit.int8_gemms, audit.kernels, audit.fused_attention) == (1, 1, 5, 0)
    assert audit.kinds == {"shape_call": 1, "kgen": 4, "gemm": 1}
    assert audit.activation_bytes is not None
    assert audit.int8_share(with_head=True) == audit.int8_share(with_head=False) == 1
    audit.check("model.onnx")


@pytest.mark.parametrize(
    ("log", "how"),
    [
        ("fallback_fused", "runtime_fusion: Int8 x Int8 -> Half"),
        ("fallback_dequantized", "gemm: Half x Half -> Half"),
        ("weight_only", "runtime_fusion: Half x Int8 -> Half"),
        ("float", "gemm: Half x Half -> Half"),
    ],
)
def test_recorded_float_builds_fail_the_gate(log: str, how: str) -> None:
    audit = recorded(log, FC)
    assert (audit.int8_gemms, audit.int8_share(with_head=True)) == (0, 0)
    message = f"model.onnx: 1 of the 1 linears .* fell back to float.* Int8 x Int8, got fc/MatMul [(]{how}[)][.]"
    with pytest.raises(GateError, match=message):
        audit.check("model.onnx")


def test_share_with_and_without_head() -> None:
    audit = audit_kernels([int8("a/MatMul"), kernel("gemm", "h/MatMul")], [linear("a", 30), linear("h", 10, head=True)])
    assert audit.int8_share(with_head=True) == 0.75
    assert audit.int8_share(with_head=False) == 1
    assert audit_kernels([int8("h/MatMul")], [linear("h", head=True)]).int8_share(with_head=False) == 0


def test_kernels_that_only_serve_a_linear_are_not_it() -> None:
    for kernels in (
        [int8("a/MatMul"), kernel("kgen", "a/MatMul")],
        [kernel("kgen", "a/MatMul"), int8("a/MatMul")],
        [kernel("runtime_fusion", "a/MatMul", "b/MatMul"), int8("a/MatMul")],
    ):
        assert audit_kernels(kernels, [linear("a")]).linears[0].int8


def test_doubt_counts_as_float() -> None:
    audit = audit_kernels([int8("a/MatMul"), kernel("gemm", "a/MatMul")], [linear("a")], ["a/MatMul"])
    assert [found.node for found in audit.fallbacks] == ["a/MatMul"]
    unknown = audit_kernels([kernel("cask", "a/MatMul", types=("Int8", "Int8"))], [linear("a")])
    assert (unknown.linears[0].kind, unknown.linears[0].int8, unknown.gemms) == ("cask", False, 1)


def test_linear_in_no_kernel() -> None:
    audit = audit_kernels([int8("a/MatMul")], [linear("a"), linear("b")], ["a/MatMul", "b/MatMul"])
    with pytest.raises(GateError, match=r"1 of the 2 linears .* got b/MatMul \(in no kernel\)"):
        audit.check("model.onnx")


def test_gate_message_is_cut() -> None:
    linears = [linear(f"l{index}") for index in range(13)]
    audit = audit_kernels(
        [kernel("gemm", *(found.node for found in linears))], linears, [found.node for found in linears]
    )
    with pytest.raises(GateError, match=r"13 of the 13 linears .*l9/MatMul .*; and 3 more[.]"):
        audit.check("model.onnx")


def test_float_linears_that_were_not_meant_to_be_int8_pass() -> None:
    audit_kernels([kernel("gemm", "a/MatMul")], [linear("a")]).check("model.onnx")


def test_fused_attention_is_known_by_name() -> None:
    attention = kernel("kgen", "attention/Attention", name="_gemm_mha_v2_myl0_5")
    projection = kernel("gemm", "mha.q/MatMul", name="mha.q/MatMul_myl0_6")
    assert audit_kernels([attention, projection], [linear("mha.q")]).fused_attention == 1


def test_a_linear_is_int8_if_it_is_in_every_profile() -> None:
    linears = [linear("a"), linear("b")]
    first = [int8("a/MatMul"), int8("b/MatMul"), kernel("shape_call"), kernel("kgen", name="mha")]
    second = [int8("a/MatMul", profile=1), kernel("runtime_fusion", "b/MatMul", types=("Int8", "Int8"), profile=1)]
    audit = audit_kernels([*first, *second], linears, ["a/MatMul", "b/MatMul"], [7, 30, 20])
    assert [(found.int8, found.kind) for found in audit.linears] == [(True, "gemm"), (False, "runtime_fusion")]
    assert (audit.gemms, audit.int8_gemms, audit.kernels, audit.fused_attention, audit.activation_bytes) == (
        2,
        2,
        3,
        1,
        30,
    )
    assert audit.others == (Figures({"gemm": 1, "runtime_fusion": 1}, 2, 1, 0, 20),)
    with pytest.raises(GateError, match=r"got b/MatMul \(runtime_fusion: Int8 x Int8 -> Int8\)"):
        audit.check("model.onnx")
    data = json.loads(json.dumps(audit.to_json()))
    assert data["others"] == [audit.others[0].figures()]
    assert Audit.from_json(data) == audit


def test_a_profile_without_linears_is_an_error() -> None:
    with pytest.raises(BismoothError, match="none of the engine's 1 kernels names any of the graph's 1 linears"):
        audit_kernels([int8("a/MatMul"), kernel("kgen", "c", profile=1)], [linear("a")])


def test_names_that_match_nothing_are_errors() -> None:
    with pytest.raises(
        BismoothError, match=r"none of the engine's 1 kernels names any of the graph's 1 linears.*'b/MatMul'"
    ):
        audit_kernels([int8("a/MatMul")], [linear("b")])
    with pytest.raises(BismoothError, match=r"'q_prj/MatMul' is to run in INT8.*Did you mean 'q_proj/MatMul'\?"):
        audit_kernels([], [linear("q_proj")], ["q_prj/MatMul"])
    with pytest.raises(BismoothError, match=r"'zzz' is to run in INT8, but .* Expected one of its 1\.$"):
        audit_kernels([], [linear("a")], ["zzz"])


def test_graph_without_linears() -> None:
    audit = audit_kernels([kernel("conv", "c/Conv")], [])
    assert (audit.linears, audit.gemms, audit.int8_share(with_head=True)) == ((), 0, 0)


def test_json_round_trip() -> None:
    audit = recorded("per_token", QKV)
    data = json.loads(json.dumps(audit.to_json()))
    assert Audit.from_json(data) == audit
    assert (data["int8_share"], data["int8_linears"], data["fallbacks"], data["kernels"]) == (1, 3, [], 5)
    with pytest.raises(ValueError, match="audit version 2, this bismooth reads version 1"):
        Audit.from_json(data | {"version": 2})
