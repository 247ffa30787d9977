"""Every architecture, from a transformers model to an ONNX graph that computes the same."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]: the package has no stubs
import pytest
import torch
import transformers
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto
from safetensors import torch as _safetensors_torch

from bismooth.export import skeleton, trace
from bismooth.export.artifact import Artifact
from bismooth.export.errors import BismoothError
from bismooth.export.model import export_model
from bismooth.export.safetensors_file import read_header, read_tensor
from bismooth.export.source import INDEX
from bismooth.passes.gates import Gates, Hop
from bismooth.tools.verify import verify_artifact
from tests.gguf_models import llama, write_gguf
from tests.models import (
    ARCHITECTURES,
    VOCAB,
    Exported,
    export,
    exported,
    feeds_of,
    make_model,
    positions,
    random_model,
    tokens,
)

ORT: Any = onnxruntime
safetensors_torch: Any = _safetensors_torch
Array = NDArray[Any]
TRACED = {"gemma2": "trace 4 of 5 blocks", "gemma3": "trace 4 of 5 blocks"}
BATCHES = [
    pytest.param(tokens(2, 11), id="no padding"),
    pytest.param(tokens(3, 11, {0: (3, 0), 2: (7, 0)}), id="left padding"),
    pytest.param(tokens(3, 6, {0: (0, 2), 1: (0, 5)}), id="right padding"),
]

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def run(graph: Path, feeds: dict[str, Array]) -> Array:
    """The first output of a graph in ONNX Runtime; caches are empty."""
    session = ORT.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    return session.run(None, feeds_of(session, feeds))[0]


def torch_output(module: Any, feeds: dict[str, Array]) -> Array:
    if "position_ids" in inspect.signature(module.forward).parameters and module.can_generate():
        feeds = feeds | {"position_ids": positions(feeds["attention_mask"])}
    with torch.no_grad():
        return module(**{name: torch.tensor(value) for name, value in feeds.items()})[0].float().numpy()


def assert_equal(actual: Array, expected: Array, mask: Array | None = None, limit: float = 1e-4) -> None:
    """Maximum error ≤ ``limit`` · max|expected| where ``mask`` is 1; finite everywhere."""
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    where = np.ones(actual.shape[:2], bool) if mask is None else mask == 1
    assert np.abs(actual - expected)[where].max() <= limit * np.abs(expected[where]).max()


def assert_computes_the_same(export: Exported, limit: float = 1e-4) -> None:
    feeds = tokens(3, 9, {1: (2, 0)})
    assert_equal(run(export.graph, feeds), torch_output(export.module, feeds), feeds["attention_mask"], limit)


def graph_of(export: Exported) -> GraphProto:
    return onnx.load(str(export.graph), load_external_data=False).graph  # pyright: ignore[reportUnknownMemberType]


def external(graph: GraphProto) -> dict[str, dict[str, str]]:
    """Name → location, offset and length of the initializers that lie outside."""
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }


@every_architecture
@pytest.mark.parametrize("feeds", BATCHES)
def test_onnx_runtime_computes_what_torch_does(name: str, feeds: dict[str, Array]) -> None:
    model = exported(name)
    assert_equal(run(model.graph, feeds), torch_output(model.module, feeds), feeds["attention_mask"])


@every_architecture
def test_blocks_are_traced_twice_and_repeated(name: str) -> None:
    steps = exported(name).steps
    assert steps == ("read the configuration", TRACED.get(name, "trace 2 of 3 blocks"), "link the weights")


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_the_whole_model_traced_is_the_same_graph(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exported(name)
    monkeypatch.setattr(skeleton, "build_skeleton", partial(skeleton.build_skeleton, shorten=False))
    whole = export(model.module, model.source, tmp_path / "whole")
    assert "trace the whole model" in whole.steps
    feeds = tokens(2, 7, {0: (2, 0)})
    assert_equal(run(whole.graph, feeds), run(model.graph, feeds), limit=1e-6)

    def nodes(export: Exported) -> Counter[tuple[str, ...]]:
        parameters = external(graph_of(export))
        return Counter(
            (node.name, *(value for value in node.input if value in parameters)) for node in graph_of(export).node
        )

    assert nodes(model) == nodes(whole)


@every_architecture
def test_names_are_those_of_the_checkpoint_and_its_modules(name: str) -> None:
    model = exported(name)
    graph = graph_of(model)
    checkpoint = read_header(model.source / "model.safetensors")
    places = external(graph)
    assert places.keys() == checkpoint.keys() - {"embeddings.position_ids"}
    for tensor, place in places.items():
        entry = checkpoint[tensor]
        assert place == {"location": "model.safetensors", "offset": str(entry.offset), "length": str(entry.length)}
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    modules = {module for module, _ in model.module.named_modules()} | {"graph"}
    if name == "bert":
        modules = {re.sub("^bert.", "", module) for module in modules} | modules
    strange = [node for node in names if not re.fullmatch(r"(.+)/[A-Z]\w*?(_\d+)?", node)]
    assert not strange
    assert {node.rpartition("/")[0] for node in names} <= modules


@every_architecture
def test_every_value_has_a_shape_with_named_sizes(name: str) -> None:
    graph = graph_of(exported(name))
    known = {value.name: value for value in [*graph.value_info, *graph.input, *graph.output]}
    sizes: set[str] = set()
    for node in graph.node:
        for output in filter(None, node.output):
            shape = known[output].type.tensor_type.shape
            assert all(dim.dim_param or dim.HasField("dim_value") for dim in shape.dim)
            sizes |= {dim.dim_param for dim in shape.dim if dim.dim_param}
    assert {"batch", "sequence"} <= sizes
    shapes = {value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    if name == "bert":
        assert shapes == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
        return
    layers = exported(name).module.config.num_hidden_layers
    caches = [f"{number}.{part}" for number in range(layers) for part in ("key", "value")]
    assert list(shapes.items()) == [
        ("input_ids", ["batch", "sequence"]),
        ("attention_mask", ["batch", "total"]),
        ("position_ids", ["batch", "sequence"]),
        *((f"past_key_values.{cache}", ["batch", "", "past", ""]) for cache in caches),
    ]
    assert [(value.name, [dim.dim_param for dim in value.type.tensor_type.shape.dim]) for value in graph.output] == [
        ("logits", ["batch", "sequence", ""]),
        *((f"present.{cache}", ["batch", "", "total", ""]) for cache in caches),
    ]


def test_the_nodes_of_a_llama() -> None:
    graph = graph_of(exported("llama"))
    counts = Counter(node.op_type for node in graph.node)
    assert counts["Attention"] == 3
    assert counts["RMSNormalization"] == 7
    names = {node.name for node in graph.node}
    assert {"model.layers.2.self_attn.q_proj/MatMul", "lm_head/MatMul", "model.layers.1.self_attn/Attention"} <= names


def test_the_manifest() -> None:
    manifest = exported("gemma3").manifest
    assert (manifest.kind, manifest.architecture) == ("float", "Gemma3ForCausalLM")
    assert manifest.blocks is not None
    assert (manifest.blocks.prefix, manifest.blocks.kinds) == ("model.layers", (0, 1, 0, 1, 0))
    assert manifest.dims == {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": 96,
    }
    assert manifest.source["format"] == "huggingface"
    assert {"python", "torch", "transformers", "onnx"} <= manifest.tools.keys()


def test_tied_embeddings_are_one_tensor() -> None:
    model = exported("llama")
    graph = graph_of(model)
    users = [node.op_type for node in graph.node if "model.embed_tokens.weight" in node.input]
    assert sorted(users) == ["Gather", "Transpose"]
    assert "lm_head.weight" not in external(graph)


def test_tied_embeddings_that_are_stored_twice(tmp_path: Path) -> None:
    module = make_model("llama", tmp_path / "source", num_hidden_layers=1)
    path = tmp_path / "source/model.safetensors"
    state = safetensors_torch.load_file(path)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    safetensors_torch.save_file(state, path, {"format": "pt"})
    model = export(module, tmp_path / "source", tmp_path / "artifact")
    assert "lm_head.weight" not in external(graph_of(model))
    assert_computes_the_same(model)


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    module = random_model("llama", num_hidden_layers=1)
    module.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert (tmp_path / "source" / INDEX).is_file()
    model = export(module, tmp_path / "source", tmp_path / "artifact")
    locations = {place["location"] for place in external(graph_of(model)).values()}
    assert len(locations) >= 2
    assert all((tmp_path / "artifact" / location).samefile(tmp_path / "source" / location) for location in locations)
    assert (tmp_path / "artifact" / INDEX).is_file()
    assert_computes_the_same(model)


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.bfloat16, TensorProto.BFLOAT16), (torch.float16, TensorProto.FLOAT16)]
)
def test_half_precision_checkpoints_keep_their_bytes(tmp_path: Path, dtype: torch.dtype, stored: int) -> None:
    random_model("llama", num_hidden_layers=1).to(dtype).save_pretrained(tmp_path / "source")
    module = cast(Any, transformers).LlamaForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    model = export(module, tmp_path / "source", tmp_path / "artifact")
    graph = graph_of(model)
    assert (tmp_path / "artifact/model.safetensors").samefile(tmp_path / "source/model.safetensors")
    assert {tensor.data_type for tensor in graph.initializer if tensor.name in external(graph)} == {stored}
    casts = {node.input[0]: node.name for node in graph.node if node.op_type == "Cast"}
    assert casts["model.layers.0.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj/Cast"
    assert casts.keys() >= external(graph).keys()
    assert_computes_the_same(model)


def test_a_base_model_checkpoint_has_names_without_the_prefix(tmp_path: Path) -> None:
    module = random_model("gpt2", n_layer=1)
    module.transformer.save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text("utf-8"))
    assert config["architectures"] == ["GPT2Model"]
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "source/config.json").write_text(json.dumps(config), "utf-8")
    model = export(module, tmp_path / "source", tmp_path / "artifact")
    assert "h.0.mlp.c_fc.weight" in external(graph_of(model))
    assert_computes_the_same(model)


def test_blocks_that_depend_on_their_number_are_traced_whole(tmp_path: Path) -> None:
    module = make_model("gpt2", tmp_path / "source", scale_attn_by_inverse_layer_idx=True, n_layer=2)
    model = export(module, tmp_path / "source", tmp_path / "artifact")
    assert "trace the whole model" in model.steps
    assert model.manifest.blocks is not None
    assert model.manifest.blocks.kinds == (0, 1)
    scales = [
        a.f for node in graph_of(model).node for a in node.attribute if (node.op_type, a.name) == ("Attention", "scale")
    ]
    np.testing.assert_allclose(scales, [1 / math.sqrt(8) / number for number in (1, 2)], rtol=1e-6)
    assert_computes_the_same(model)


def test_a_block_that_differs_and_is_not_among_the_first_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in the modules tells: only the run does."""
    from transformers.models.llama import modeling_llama

    attention: Any = modeling_llama.LlamaAttention
    forward: Callable[..., Any] = attention.forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = forward(self, *args, **kwargs)
        return output * (2.0 if self.layer_idx == 3 else 1.0), weights

    monkeypatch.setattr(attention, "forward", changed)
    module = make_model("llama", tmp_path / "source", num_hidden_layers=5)
    model = export(module, tmp_path / "source", tmp_path / "artifact")
    assert model.manifest.blocks is not None
    assert model.manifest.blocks.kinds == (0, 0, 0, 1, 0)
    assert_computes_the_same(model)


def test_a_trace_that_cannot_be_repeated_is_made_again_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_transformer, calls = trace.trace_transformer, 0

    def first_in_vain(*args: Any, **options: Any) -> ir.Model:
        nonlocal calls
        calls += 1
        if calls == 1:
            return ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}), ir_version=10)
        return trace_transformer(*args, **options)

    monkeypatch.setattr(trace, "trace_transformer", first_in_vain)
    module = make_model("opt", tmp_path / "source")
    model = export(module, tmp_path / "source", tmp_path / "artifact")
    reason = "no traced node belongs to model.decoder.layers.0"
    assert f"trace the whole model: its blocks are no copies of each other ({reason})" in model.steps
    assert_computes_the_same(model)


def test_a_gguf_file(tmp_path: Path) -> None:
    write_gguf(llama(), tmp_path / "tiny.gguf")
    (tmp_path / "artifact").mkdir()
    manifest = export_model(tmp_path / "tiny.gguf", tmp_path / "artifact")
    assert manifest.source["format"] == "gguf"
    assert {"config.json", "model.onnx", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "artifact").iterdir()
    }
    module = cast(Any, transformers).AutoModelForCausalLM.from_pretrained(tmp_path / "artifact")
    feeds = tokens(2, 7)
    assert_equal(run(tmp_path / "artifact/model.onnx", feeds), torch_output(module, feeds))


def test_weights_can_be_copied(tmp_path: Path) -> None:
    module = make_model("opt", tmp_path / "source", num_hidden_layers=1)
    copied = export(module, tmp_path / "source", tmp_path / "artifact", weights="copy")
    assert not (tmp_path / "artifact/model.safetensors").samefile(tmp_path / "source/model.safetensors")
    assert copied.steps[0] == "copy the weights"
    onnx.checker.check_model(str(copied.graph))  # pyright: ignore[reportUnknownMemberType]: it refuses hard links
    assert_computes_the_same(copied)


def test_the_bytes_of_a_linked_weight_are_those_of_the_parameter() -> None:
    model = exported("qwen3")
    path = model.folder / "model.safetensors"
    name = "model.layers.2.self_attn.k_proj.weight"
    np.testing.assert_array_equal(read_tensor(path, read_header(path)[name]), model.module.state_dict()[name].numpy())


def test_an_exported_encoder_is_imported_as_it_is(tmp_path: Path) -> None:
    model = exported("bert")
    (tmp_path / "artifact").mkdir()
    manifest = export_model(model.graph, tmp_path / "artifact")
    imported = tmp_path / "artifact" / manifest.graphs["float32"]
    assert imported.read_bytes() == model.graph.read_bytes()
    feeds = tokens(2, 7, {0: (0, 3)})
    np.testing.assert_array_equal(run(imported, feeds), run(model.graph, feeds))


def test_code_of_the_model_runs_when_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    random_model("llama", num_hidden_layers=1).save_pretrained(source)
    (source / "modeling_louder.py").write_text(REMOTE_CODE, "utf-8")
    config = json.loads((source / "config.json").read_text("utf-8"))
    config |= {"model_type": "louder", "architectures": ["Louder"], "auto_map": AUTO_MAP}
    (source / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(BismoothError, match="pass --trust-remote-code"):
        export(None, source, tmp_path / "refused")
    module = cast(Any, transformers).AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    model = export(module, source, tmp_path / "artifact", trust_remote_code=True)
    assert model.manifest.architecture == "Louder"
    assert_computes_the_same(model)
    assert model.manifest.source["remote_code"] is True
    written = {path.name for path in model.folder.iterdir()}
    assert written == {"config.json", "generation_config.json", "model.onnx", "model.safetensors"}
    assert "auto_map" not in json.loads((model.folder / "config.json").read_text("utf-8"))
    artifact = Artifact(model.folder, model.manifest)
    (hop,) = verify_artifact(artifact, np.ones((1, 4), np.int64), Gates(), (Hop.FLOAT,)).hops
    assert hop.skipped == "the model computes with Python code of its own, and an artifact carries none"


AUTO_MAP = {"AutoConfig": "modeling_louder.LouderConfig", "AutoModelForCausalLM": "modeling_louder.Louder"}
REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class LouderConfig(LlamaConfig):
    model_type = "louder"

class Louder(LlamaForCausalLM):
    config_class = LouderConfig

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        output.logits = output.logits * 2
        return output
"""
