"""Small graphs of quantized linears, as the package lowers them and as it must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray
from onnx import numpy_helper

Array = NDArray[Any]
K = N = 256
SCALE = 2.0**-14


def per_token(*names: str) -> onnx.ModelProto:
    """Per-token INT8 linears that share one activation quantizer, x [batch, sequence, K] in float16."""
    linears = "".join(
        f"""
        {name}_w = DequantizeLinear({name}_int8, s0)
        {name} = MatMul(xd, {name}_w)
        {name}_wide = Cast<to = 1>({name})
        {name}_channels = Mul({name}_wide, {name}_r)
        {name}_tokens = Mul({name}_channels, t)
        {name}_y = Cast<to = 10>({name}_tokens)"""
        for name in names
    )
    body = f"""
        wide = Cast<to = 1>(x)
        magnitude = Abs(wide)
        peak = ReduceMax<keepdims = 1>(magnitude, last)
        floor = Max(peak, tiny)
        t = Div(floor, steps)
        unit = Div(wide, t)
        xq = QuantizeLinear(unit, one, zero)
        xd = DequantizeLinear(xq, one16, zero)
        {linears}"""
    constants = {f"{name}_int8": _integers(K, N) for name in names} | {f"{name}_r": _floats(N) for name in names}
    return _model(
        body,
        [f"{name}_y" for name in names],
        **constants,
        s0=np.float16(SCALE),
        last=np.array([-1]),
        tiny=np.float32(1e-20),
        steps=np.float32(127),
        one=np.float32(1),
        one16=np.float16(1),
        zero=np.int8(0),
    )


def channel_scaled_activation() -> onnx.ModelProto:
    """Q/DQ with one activation scale per channel: valid ONNX, for which TensorRT has no INT8 kernel."""
    return _model(
        """
        xq = QuantizeLinear<axis = 2>(x, scales, zeros)
        xd = DequantizeLinear<axis = 2>(xq, scales, zeros)
        fc_w = DequantizeLinear<axis = 1>(fc_int8, fc_scales)
        fc = MatMul(xd, fc_w)""",
        ["fc"],
        fc_int8=_integers(K, N),
        fc_scales=_floats(N).astype(np.float16),
        scales=np.full(K, 0.1, np.float16),
        zeros=np.zeros(K, np.int8),
    )


def weight_only() -> onnx.ModelProto:
    """An INT8 weight and a float16 activation."""
    return _model(
        """
        fc_w = DequantizeLinear<axis = 1>(fc_int8, fc_scales)
        fc = MatMul(x, fc_w)""",
        ["fc"],
        fc_int8=_integers(K, N),
        fc_scales=_floats(N).astype(np.float16),
    )


def float_linear() -> onnx.ModelProto:
    """A float16 linear with its weight as [N, K] and a Transpose."""
    return _model(
        """
        fc_t = Transpose<perm = [1, 0]>(fc_weight)
        fc = MatMul(x, fc_t)""",
        ["fc"],
        fc_weight=_floats(N, K).astype(np.float16),
    )


def save(model: onnx.ModelProto, folder: Path, data_file: str = "weights.bin") -> Path:
    """Write the model with its weights in a file of their own, at offsets that are no multiple of anything."""
    path = folder / "model.onnx"
    folder.mkdir(exist_ok=True)
    with (folder / data_file).open("wb") as file:
        for tensor in model.graph.initializer:
            if len(data := tensor.raw_data) < K:
                continue
            file.write(b"\x00" * 3)
            entries = {"location": data_file, "offset": file.tell(), "length": len(data)}
            file.write(data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    return path


def make(text: str, **constants: Array | np.generic) -> onnx.ModelProto:
    """A model from ONNX's text format; nodes are named ``<output>/<operator>``."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> graph {text}')
    for node in model.graph.node:
        node.name = f"{node.output[0]}/{node.op_type}"
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    model.graph.initializer.extend(tensors)
    return model


def _model(body: str, outputs: list[str], **constants: Array | np.generic) -> onnx.ModelProto:
    results = ", ".join(f"float16[batch, sequence, {N}] {name}" for name in outputs)
    return make(f"(float16[batch, sequence, {K}] x) => ({results}) {{ {body} }}", **constants)


def _integers(*shape: int) -> Array:
    return np.random.default_rng(0).integers(-127, 128, shape, np.int8)


def _floats(*shape: int) -> Array:
    return np.random.default_rng(1).uniform(0.01, 0.02, shape).astype(np.float32)
