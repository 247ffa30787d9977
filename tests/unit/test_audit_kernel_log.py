"""Reading kernel listings: recorded ones, TensorRT 10's form, and text that has drifted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bismooth.engines.kernel_log import Tensor, has_listing, read_kernels
from bismooth.export.errors import BismoothError

LOGS = Path(__file__).parent / "tensorrt_logs"
TEN = """Layers:
Name: fc/MatMul_myl0_1, LayerType: gemm, Inputs: [ { Name: x, Location: Device, Dimensions: [4,128,256], \
Format/Datatype: Int8 }, { Name: w, Dimensions: [256,64], Format/Datatype: Int8 }, { Name: alpha, Dimensions: [1], \
Format/Datatype: Float }], Outputs: [ { Name: y, Dimensions: [4,128,64], \
Format/Datatype: Row major linear FP16 format }], ParameterType: Gemm, Bias: {"Type": "Half", "Count": 0}, \
TacticName: i8i8, TacticValue: 0x1, StreamId: 0, Metadata: [ONNX Layer: fc/MatMul]
Name: done, LayerType: NoOp, Inputs: [], Outputs: [], TacticName: , StreamId: 0, Metadata:
"""


def recorded(name: str) -> str:
    return (LOGS / f"{name}.log").read_text("utf-8")


def test_recorded_listing() -> None:
    control, quantize, gemm, *rescales = read_kernels(recorded("per_token"))
    assert (control.kind, control.nodes, control.weight) == ("shape_call", (), None)
    assert quantize.kind == "kgen"
    assert [tensor.type for tensor in quantize.inputs] == ["Half"]
    assert sorted(tensor.type for tensor in quantize.outputs) == ["Float", "Int8"]
    assert gemm.kind == "gemm"
    assert gemm.inputs[0].shape == (-1, 256)
    assert gemm.weight is not None
    assert (gemm.weight.shape, gemm.weight.type) == ((256, 768), "Int8")
    assert gemm.nodes[0] == "v_proj/MatMul"
    assert {"q_proj/MatMul", "k_proj/MatMul", "xd/DequantizeLinear"} < set(gemm.nodes)
    assert [kernel.kind for kernel in rescales] == ["kgen"] * 3


def test_input_and_output_tensors_are_no_kernels() -> None:
    assert "I/O Tensors:\n Name: x, IOMode" in recorded("float")
    assert [kernel.kind for kernel in read_kernels(recorded("float"))] == ["shape_call", "gemm"]


def test_weight_that_another_kernel_makes_is_an_input() -> None:
    gemm = read_kernels(recorded("fallback_dequantized"))[-1]
    assert gemm.weight is not None
    assert (gemm.weight.shape, gemm.weight.type) == ((256, 256), "Half")


def test_listing_of_tensorrt_10() -> None:
    gemm, _ = read_kernels(TEN)
    assert gemm.inputs[0] == Tensor("x", (4, 128, 256), "Int8")
    assert gemm.constants == ()
    assert gemm.weight == Tensor("w", (256, 64), "Int8")
    assert gemm.outputs == (Tensor("y", (4, 128, 64), "Half"),)


@pytest.mark.parametrize("separator", ["\x1e", "\x1f", ""])
def test_metadata_entries(separator: str) -> None:
    entries = separator.join(["[ONNX Layer: fc/MatMul]", "[ONNX Layer: a[0]/Add]"])
    gemm, _ = read_kernels(TEN.replace("[ONNX Layer: fc/MatMul]", entries))
    assert gemm.nodes == ("fc/MatMul", "a[0]/Add")


def line(name: str, tensor: str = "x", kind: str = "kgen") -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {{ Name: {tensor}, Dimensions: [8], Datatype: Half }}], "
        "Outputs: [], TacticName: , StreamId: 0, Metadata: [ONNX Layer: a]\n"
    )


def test_kernels_of_further_profiles() -> None:
    """Known by what one of their graph says, wherever in the listing that is."""
    lines = [line("first_myl0_1"), line("a_myl1_1"), line("b_myl1_2", "x [profile 1]"), line("c_myl11_1")]
    lines += [line("fc/MatMul [profile 2]_myl2_7"), line("d_myl2_8"), line("e [profile 1]"), line("f")]
    kernels = read_kernels("Layers:\n" + "".join(lines))
    assert [kernel.profile for kernel in kernels] == [0, 1, 1, 0, 2, 2, 1, 0]


def test_a_size_that_is_copied_to_the_device() -> None:
    copied = line("[ShapeHostToDeviceCopy 0] [profile 1]", kind="ShapeHostToDevice").replace(
        "TacticName: ", "shapeValues0: [-40], TacticValue: 0x0"
    )
    (kernel,) = read_kernels("Layers:\n" + copied)
    assert (kernel.kind, kernel.profile) == ("ShapeHostToDevice", 1)


def test_last_listing_counts() -> None:
    assert len(read_kernels(f"{recorded('float')}\nmore\n{TEN}")) == 2


def test_size_of_dynamic_tensor_is_zero() -> None:
    assert Tensor("x", (-1, 8), "Half").size == 0
    assert Tensor("x", (), "Half").size == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Layers:", "Engine Layer Information:", "has no 'Layers:' listing"),
        ("Layers:\n", "Layers:\n\n", "listing in the builder's log is empty"),
        ("LayerType: gemm", "Kind: gemm", "cannot be read. Expected 'Name: …, LayerType: …"),
        ("Datatype: Int8", "Precision: Int8", "Expected every tensor as '{ Name: …"),
        ("ONNX Layer: ", "Node ", "Expected metadata entries '[ONNX Layer: …]'"),
        (
            "Metadata: [ONNX Layer: fc/MatMul]",
            "Metadata: ",
            "none of the 2 kernels in the builder's log names an ONNX node",
        ),
        ("Name: done, ", "done, ", "got 'done, LayerType: NoOp"),
    ],
)
def test_drift_is_an_error(old: str, new: str, message: str) -> None:
    assert old in TEN
    with pytest.raises(BismoothError, match=re.escape(message)):
        read_kernels(TEN.replace(old, new))


def test_has_listing() -> None:
    assert has_listing(TEN)
    assert not has_listing("Total Layers: 3")
