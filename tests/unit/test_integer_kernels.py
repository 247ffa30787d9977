"""Which INT8 kernels are taken, on CPUs whose default ones saturate and on others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from bismooth.engines import onnxruntime as engine
from bismooth.engines.integer_kernels import DEPTH, MODEL, products_saturate
from bismooth.engines.onnxruntime import Mode, entries_of, import_onnxruntime

EXACT = {"session.x64quantprecision": "1"}


class Kernels:
    """Sessions whose products are exact for many rows, and end at ``limit`` for one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sessions = 0
        self.SessionOptions = SimpleNamespace

    def InferenceSession(self, model: bytes, options: object, providers: list[str]) -> Kernels:
        assert (model, providers) == (MODEL, ["CPUExecutionProvider"])
        self.sessions += 1
        return self

    def run(self, outputs: None, feeds: dict[str, NDArray[np.uint8]]) -> list[NDArray[np.int64]]:
        weight = np.repeat(np.array([127, -127]), 32) * np.ones((DEPTH, 1), np.int64)
        product = feeds["x"].astype(np.int64) @ weight
        return [np.clip(product, -self.limit, self.limit) if len(product) == 1 else product]


@pytest.mark.parametrize("saturates", [False, True])
def test_both_outcomes_are_found_once(saturates: bool) -> None:
    kernels = Kernels(32767 * DEPTH // 2 if saturates else 1 << 31)
    assert [products_saturate(kernels) for _ in range(2)] == [saturates] * 2
    assert kernels.sessions == 1


@pytest.mark.parametrize("saturates", [False, True])
@pytest.mark.parametrize("mode", ["int8", "reference", "plain"])
def test_settings(monkeypatch: pytest.MonkeyPatch, mode: Mode, saturates: bool) -> None:
    def found(runtime: None) -> bool:
        return saturates

    monkeypatch.setattr(engine, "products_saturate", found)
    settings = entries_of(None, mode)
    assert (EXACT.items() <= settings.items()) == (saturates and mode == "int8")
    assert engine.MODES[mode].items() <= settings.items()
    assert entries_of(None, mode, "cuda") == engine.MODES[mode]


def test_the_trial_is_the_product_it_says_it_is() -> None:
    values = [helper.make_tensor("", TensorProto.INT8, [1], [value]) for value in (127, -127)]
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["p"], value=values[0]),
        helper.make_node("ConstantOfShape", ["shape"], ["n"], value=values[1]),
        helper.make_node("Concat", ["p", "n"], ["w"], axis=1),
        helper.make_node("MatMulInteger", ["x", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["m", DEPTH])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["m", 64])],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [DEPTH, 32])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert model.SerializeToString() == MODEL


def test_the_trial_runs_here() -> None:
    runtime: Any = import_onnxruntime()
    assert products_saturate(runtime) in (False, True)
