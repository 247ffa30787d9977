"""Tracing without storage, and its errors."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers as _transformers
from transformers.models.llama import modeling_llama

from bismooth.export.errors import BismoothError
from bismooth.export.skeleton import build_skeleton
from bismooth.export.trace import OPSET, cannot_trace, quiet, simplify, trace_transformer
from tests.models import ARCHITECTURES

transformers: Any = _transformers


def config_of(name: str, **overrides: Any) -> Any:
    class_name, arguments = ARCHITECTURES[name]
    return getattr(transformers, class_name)(**(arguments | overrides))


@pytest.fixture(scope="module")
def traced() -> ir.Model:
    config = config_of("llama", num_hidden_layers=1)
    return trace_transformer(transformers.LlamaForCausalLM, config, build_skeleton(config).buffers)


def test_parameters_have_no_values_and_buffers_do(traced: ir.Model) -> None:
    values = {name: value.const_value for name, value in traced.graph.initializers.items()}
    assert values["model.layers.0.self_attn.q_proj.weight"] is None
    frequencies = values["model.rotary_emb.inv_freq"]
    assert frequencies is not None
    assert frequencies.numpy().tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])


def test_inputs_outputs_and_opset(traced: ir.Model) -> None:
    graph = traced.graph
    assert graph.opset_imports[""] == OPSET
    assert [(value.name, str(value.shape), value.dtype) for value in graph.inputs] == [
        ("input_ids", "[batch,sequence]", ir.DataType.INT64),
        ("attention_mask", "[batch,sequence]", ir.DataType.INT64),
    ]
    assert [(value.name, str(value.shape), value.dtype) for value in graph.outputs] == [
        ("logits", "[batch,sequence,96]", ir.DataType.FLOAT)
    ]


def test_simplifying_fuses_norms_and_keeps_parameters(traced: ir.Model) -> None:
    parameters = {name for name, value in traced.graph.initializers.items() if value.const_value is None}
    simplify(traced)
    assert {name for name, value in traced.graph.initializers.items() if value.const_value is None} == parameters
    assert [value.name for value in traced.graph.inputs] == ["input_ids", "attention_mask"]
    kinds = [node.op_type for node in traced.graph]
    assert kinds.count("RMSNormalization") == 3
    assert "Pow" not in kinds
    assert all("pkg.torch.onnx.name_scopes" in node.metadata_props for node in traced.graph)


def test_the_configuration_is_not_changed() -> None:
    config = config_of("llama", num_hidden_layers=1, use_cache=True)
    before = config.to_dict()
    build_skeleton(config)
    assert config.to_dict() == before


def test_a_model_that_looks_at_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(_self: Any, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)
    expected = (
        r"LlamaForCausalLM: the model cannot be traced: .* Export it to ONNX by its own means and pass the \.onnx file"
    )
    with pytest.raises(BismoothError, match=expected):
        build_skeleton(config_of("llama"))
    with pytest.raises(BismoothError, match=expected):
        trace_transformer(transformers.LlamaForCausalLM, config_of("llama"), {})


def test_errors_of_models() -> None:
    with pytest.raises(BismoothError, match=r"M: the model cannot be traced: KeyError Export it"), cannot_trace("M"):
        raise KeyError
    with pytest.raises(BismoothError, match=r"M: the model cannot be traced: first Export it"), cannot_trace("M"):
        raise ValueError("first\nsecond")
    with pytest.raises(BismoothError, match=r"M: the model cannot be traced: inner Export it"), cannot_trace("M"):
        raise ValueError("outer") from TypeError("inner")
    with pytest.raises(BismoothError, match=r"^as it was$"), cannot_trace("M"):
        raise BismoothError("as it was")


def test_loggers_and_warnings_are_as_before() -> None:
    logger = logging.getLogger("torch.onnx")
    before = logger.level, list(warnings.filters)
    with quiet():
        assert logger.level == logging.ERROR
        warnings.warn("old", FutureWarning, stacklevel=1)
        with pytest.warns(UserWarning, match="the model's own"):
            warnings.warn("the model's own", UserWarning, stacklevel=1)
    assert (logger.level, list(warnings.filters)) == before
