"""The smallest language model: embedding, tanh, tied head, with its weights outside of the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

VOCAB, HIDDEN = 11, 8


IDS = np.array([[1, 2, 3], [4, 5, 10], [0, 0, 7]], dtype=np.int64)


Edit = Callable[[onnx.ModelProto], None]


def external(name: str, shape: list[int], offset: int, location: str = "weights.bin") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    length = 4 * int(np.prod(shape))
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def language_model(folder: Path, edit: Edit = lambda _: None) -> Path:
    """Embedding, tanh, tied head; weights [VOCAB, HIDDEN] outside of the graph."""
    weights = np.random.default_rng(0).standard_normal((VOCAB, HIDDEN)).astype(np.float32)
    (folder / "weights.bin").write_bytes(weights.tobytes())
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["x"], "embed/Gather"),
        helper.make_node("Tanh", ["x"], ["hidden"], "act/Tanh"),
        helper.make_node("Transpose", ["embed"], ["head"], "head/Transpose"),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"], "head/MatMul"),
    ]
    shape = ["batch", "sequence"]
    graph = helper.make_graph(
        nodes,
        "lm",
        [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, VOCAB])],
        [external("embed", [VOCAB, HIDDEN], 0)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    edit(model)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def expected_logits(folder: Path, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    weights = np.fromfile(folder / "weights.bin", np.float32).reshape(VOCAB, HIDDEN).astype(np.float64)
    return np.tanh(weights[ids]) @ weights.T
