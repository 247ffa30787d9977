"""Initializers and the checkpoint: names, shapes, types, ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import transformers as _transformers
from numpy.typing import NDArray

from bismooth.export.errors import BismoothError
from bismooth.export.link import link_weights
from bismooth.export.naming import name_constants, name_nodes
from bismooth.export.safetensors_file import SafetensorsWriter
from bismooth.export.scopes import set_scopes
from bismooth.export.source import Weights, read_weights
from bismooth.export.stored_names import stored_names
from tests.models import random_model

transformers: Any = _transformers
FLOAT = ir.DataType.FLOAT
Array = NDArray[Any]


def save(folder: Path, **tensors: Array) -> Weights:
    path = folder / "model.safetensors"
    with SafetensorsWriter(path, [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return read_weights([path])


def graph(*names: str) -> ir.Model:
    """y = x · a, z = y · b, … with parameters [2, 2] without data, each in a module of its name; b's also feeds c's."""
    x = ir.val("x", FLOAT, (2, 2))
    nodes: list[ir.Node] = []
    parameters: list[ir.Value] = []
    value = x
    for name in names:
        parameters.append(ir.val(name, FLOAT, (2, 2)))
        node = ir.node("MatMul", [value, parameters[-1]])
        set_scopes(node, [name, "matmul"])
        nodes.append(node)
        value = node.outputs[0]
    value.name = "out"
    graph = ir.Graph([x], [value], nodes=nodes, initializers=parameters, opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)


def test_initializers_point_into_the_file(tmp_path: Path) -> None:
    weights = save(tmp_path, first=np.ones((2, 2), np.float32), w=np.arange(4, dtype=np.float32).reshape(2, 2))
    model = graph("fc")
    link_weights(model, weights, {"fc": "w"})
    value = model.graph.initializers["w"].const_value
    assert isinstance(value, ir.ExternalTensor)
    assert (str(cast(Any, value).location), value.offset, value.length) == (
        "model.safetensors",
        weights.entries["w"][1].offset,
        16,
    )
    np.testing.assert_array_equal(value.numpy(), [[0, 1], [2, 3]])
    assert [node.op_type for node in model.graph] == ["MatMul"]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_float_types_are_cast_where_they_are_used(tmp_path: Path, dtype: Any) -> None:
    weights = save(tmp_path, w=np.ones((2, 2), dtype))
    model = graph("a", "b", "c")
    link_weights(model, weights, {"a": "w", "b": "w", "c": "w"})
    name_nodes(model)
    assert [node.name for node in model.graph] == ["a/Cast", "a/MatMul", "b/MatMul", "c/MatMul"]
    assert model.graph[0].outputs[0].dtype == FLOAT
    assert [node.inputs[1] is model.graph[0].outputs[0] for node in list(model.graph)[1:]] == [True] * 3
    assert set(model.graph.initializers) == {"w"}


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    weights = save(tmp_path, **{name: np.ones(1, np.float32) for name in "abcd"})
    with pytest.raises(
        BismoothError,
        match=r"the checkpoint has no tensor fc\. It has 4 tensors, for example a, b, c\. Is the checkpoint complete",
    ):
        link_weights(graph("fc"), weights, {})


def test_a_tensor_of_another_shape(tmp_path: Path) -> None:
    weights = save(tmp_path, fc=np.ones((2, 3), np.float32))
    with pytest.raises(
        BismoothError,
        match=r"safetensors: tensor fc has shape \[2, 3\], but the model's is \[2, 2\]\. Weights and configuration",
    ):
        link_weights(graph("fc"), weights, {"fc": "fc"})


def test_a_tensor_of_integers(tmp_path: Path) -> None:
    weights = save(tmp_path, fc=np.ones((2, 2), np.int8))
    expected = r"tensor fc has type I8\. Expected a float type: one of F64, F32, F16, BF16\."
    with pytest.raises(BismoothError, match=expected):
        link_weights(graph("fc"), weights, {"fc": "fc"})


def test_names_of_a_base_model_and_old_names(tmp_path: Path) -> None:
    model = random_model("bert", num_hidden_layers=1)
    old = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma"): np.ones(1, np.float32)
        for name, _ in model.named_parameters()
    }
    names = stored_names(model, save(tmp_path, **old))
    assert names["embeddings.LayerNorm.weight"] == "bert.embeddings.LayerNorm.gamma"
    assert names.keys() == dict(model.named_parameters()).keys()


def test_names_that_the_model_does_not_have_are_ignored(tmp_path: Path) -> None:
    model = random_model("gpt2", n_layer=1)
    weights = save(tmp_path, **{"h.0.attn.bias": np.ones(1, np.bool_), "wte.weight": np.ones(1, np.float32)})
    assert stored_names(model, weights) == {"transformer.wte.weight": "wte.weight", "lm_head.weight": "wte.weight"}


@pytest.mark.parametrize("equal", [True, False])
def test_tied_tensors_that_are_both_stored(tmp_path: Path, equal: bool) -> None:
    model = random_model("llama", num_hidden_layers=1)
    embedding, head = np.ones((96, 32), np.float32), np.ones((96, 32), np.float32)
    head[-1, -1] += 0 if equal else 1
    weights = save(tmp_path, **{"lm_head.weight": head, "model.embed_tokens.weight": embedding})
    if equal:
        assert set(stored_names(model, weights).values()) == {"model.embed_tokens.weight"}
        return
    with pytest.raises(
        BismoothError,
        match=r"config\.json ties lm_head\.weight to model\.embed_tokens\.weight, but the checkpoint has different "
        r"values for them\. If they are meant to be two tensors, set \"tie_word_embeddings\": false",
    ):
        stored_names(model, weights)


def test_tied_tensors_of_different_shapes(tmp_path: Path) -> None:
    model = random_model("llama", num_hidden_layers=1)
    stored = {"lm_head.weight": np.ones((4, 2), np.float32), "model.embed_tokens.weight": np.ones((2, 4), np.float32)}
    with pytest.raises(BismoothError, match=r"config\.json ties lm_head"):
        stored_names(model, save(tmp_path, **stored))


def test_a_parameter_that_transformers_computes_from_several_tensors(tmp_path: Path) -> None:
    """The experts of a mixture are stored one by one and computed with as one tensor."""
    config = transformers.MixtralConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=8,
    )
    model = transformers.MixtralForCausalLM(config)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    weights = save(tmp_path, **{name: np.ones((8, 8), np.float32)})
    with pytest.raises(
        BismoothError,
        match=rf"tensor {name} must be rearranged to become model\.layers\.0\.mlp\.experts\.gate_up_proj of Mixtral.*; "
        r"its bytes cannot be used as they are\. Load the model with transformers, save it with save_original_format",
    ):
        stored_names(model, weights)


def test_constants_are_named_by_type_and_shape() -> None:
    model = graph("fc")
    for number, array in enumerate([np.zeros(3, np.int64), np.zeros((), np.float32), np.ones(3, np.int64)]):
        value = ir.Value(name=f"val_{number}", const_value=ir.tensor(array))
        model.graph.initializers.add(value)
    stored = ir.Value(name="kept", const_value=ir.tensor(np.zeros(1, np.float32)))
    model.graph.initializers.add(stored)
    name_constants(model, {"kept"})
    assert list(model.graph.initializers) == ["fc", "kept", "const.int64[3]_0", "const.float[]_0", "const.int64[3]_1"]


def test_names_of_nodes_are_unique_and_leave_inputs_and_outputs() -> None:
    model = graph("m", "m/MatMul")
    for node, scope in zip(model.graph, [["m", "matmul"], ["m", "matmul_1"]], strict=True):
        set_scopes(node, scope)
    extra = ir.node("Split", [model.graph.inputs[0]], {"num_outputs": 2}, num_outputs=2)
    model.graph.append(extra)
    name_nodes(model)
    assert [node.name for node in model.graph] == ["m/MatMul_1", "m/MatMul_2", "graph/Split"]
    assert [value.name for value in extra.outputs] == ["graph/Split:0", "graph/Split:1"]
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["x", "out"]
    assert not any(node.metadata_props for node in model.graph)
