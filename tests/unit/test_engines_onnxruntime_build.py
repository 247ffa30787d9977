"""The folder for ONNX Runtime: what it holds, and what its audit sees."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from bismooth.engines.base import BuildRequest, Logits, Phase, audit_path
from bismooth.engines.companions import place_companions
from bismooth.engines.onnxruntime import Session
from bismooth.engines.onnxruntime_build import OnnxRuntimeBuilder
from bismooth.engines.subgraph import load_graph
from bismooth.export.errors import BismoothError, GateError
from bismooth.passes.quantize import quantize_graph
from bismooth.passes.recipe import Recipe
from bismooth.tools.engine_folder import engine_file
from bismooth.tools.engines import find_builder
from tests.graphs import Builder
from tests.lowered import assert_close
from tests.models import exported, tokens
from tests.quantized import make, save

K, N = 8, 6


def graph(folder: Path, *, quantized: bool = True) -> Path:
    """A linear behind per-tensor Q/DQ, in float32."""
    weight = np.random.default_rng(0).integers(-127, 128, (K, N), np.int8)
    source = "xd" if quantized else "x"
    model = make(
        f"""(float[batch, sequence, {K}] x) => (float[batch, sequence, {N}] y) {{
        xq = QuantizeLinear(x, one, zero)
        xd = DequantizeLinear(xq, one, zero)
        fc_w = DequantizeLinear(w, scale, zero)
        y = MatMul({source}, fc_w) }}""",
        w=weight,
        one=np.float32(1),
        zero=np.int8(0),
        scale=np.float32(2**-14),
    )
    model.graph.node[3].name = "fc/MatMul"
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_folder_and_audit(tmp_path: Path) -> None:
    phases: list[Phase] = []
    engine = tmp_path / "engine" / "model.onnx"
    request = BuildRequest(graph(tmp_path / "art"), engine, meant_int8=frozenset({"fc/MatMul"}), source={"recipe": "r"})
    result = OnnxRuntimeBuilder().build(request, phases.append)
    assert {path.name for path in engine.parent.iterdir()} == {"model.onnx", "model.audit.json"}
    assert result.audit_file == audit_path(engine)
    (linear,) = result.audit.linears
    assert (linear.int8, linear.meant_int8, result.audit.int8_gemms) == (True, True, 1)
    assert result.record.bytes == engine.stat().st_size
    assert len(phases) == 1


def test_a_product_that_is_fused_with_its_activation(tmp_path: Path) -> None:
    model = make(
        "(float[batch, 8] x) => (float[batch, 6] y) { pooled = Gemm(x, w) y = Tanh(pooled) }",
        w=np.ones((8, 6), np.float32),
    )
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    result = OnnxRuntimeBuilder().build(BuildRequest(tmp_path / "model.onnx", tmp_path / "engine" / "model.onnx"))
    (linear,) = result.audit.linears
    assert (linear.node, linear.kernel, linear.int8) == ("pooled/Gemm", "fused pooled/Gemm", False)


def shapes_of(engine: Path) -> dict[str, list[int | str]]:
    outputs = load_graph(engine).graph.output
    return {port.name: [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim] for port in outputs}


@pytest.mark.parametrize(
    ("name", "logits", "kept"),
    [("llama", None, 1), ("llama", "last", 1), ("llama", "all", "sequence"), ("plain", None, "sequence")],
)
def test_positions_with_logits(tmp_path: Path, name: str, logits: Logits | None, kept: int | str) -> None:
    """The last, if there are caches and nothing else is asked for."""
    if name == "plain":
        head = "(float[batch, sequence, 8] x) => (float[batch, sequence, 6] logits) { logits = MatMul(x, w) }"
        source = tmp_path / "source.onnx"
        source.write_bytes(make(head, w=np.ones((8, 6), np.float32)).SerializeToString())
    else:
        source = exported(name).graph
    engine = tmp_path / "engine" / "model.onnx"
    result = OnnxRuntimeBuilder().build(BuildRequest(source, engine, logits=logits))
    assert shapes_of(engine)["logits"][:2] == ["batch", kept]
    assert result.audit.fused_attention == (0 if name == "plain" else 3)


def test_a_quantized_model_with_caches(tmp_path: Path) -> None:
    """Every linear is an INT8 kernel, rescaled in it; attention is found; plain sessions run the folder."""
    folder = tmp_path / "quantized"
    folder.mkdir()
    for file in exported("llama").folder.glob("*.safetensors"):
        (folder / file.name).hardlink_to(file)
    recipe = Recipe.from_dict({"extends": "w8a8-per-channel", "compute_dtype": "float32"}, name="test")
    made = quantize_graph(exported("llama").graph, folder, recipe, None)
    meant = frozenset(linear.node for linear in made.linears)
    engine = tmp_path / "engine" / "model.onnx"
    result = OnnxRuntimeBuilder().build(BuildRequest(folder / "model.onnx", engine, meant_int8=meant))
    assert len(meant) == 21
    assert sum(linear.int8 for linear in result.audit.linears) == result.audit.int8_gemms == 21
    assert result.audit.fused_attention == 3
    ids = tokens(1, 9)["input_ids"]
    with Session(folder / "model.onnx") as whole, Session(engine) as last:
        expected, got = whole.logits(ids), last.logits(ids)
    assert_close(got, expected[:, -1:], 0.02)  # a float that rounds otherwise moves an INT8 value by one


def test_a_fallback_fails_and_writes_nothing(tmp_path: Path) -> None:
    engine = tmp_path / "engine" / "model.onnx"
    source = graph(tmp_path / "art", quantized=False)
    with pytest.raises(GateError, match=r"1 of the 1 linears .* fell back to float"):
        OnnxRuntimeBuilder().build(BuildRequest(source, engine, meant_int8=frozenset({"fc/MatMul"})))
    assert list(engine.parent.iterdir()) == []
    request = BuildRequest(source, engine, meant_int8=frozenset({"fc/MatMul"}), allow_float=True)
    result = OnnxRuntimeBuilder().build(request)
    assert [linear.node for linear in result.audit.fallbacks] == ["fc/MatMul"]


def test_no_weight_is_written_anew(tmp_path: Path) -> None:
    """With a limit on the size of files below that of the weights."""
    b = Builder()
    b.outputs.append(b.linear(b.tokens("x", 256), "fc", 256, 256))
    (tmp_path / "art").mkdir()
    request = BuildRequest(b.save(tmp_path / "art", external=True), tmp_path / "engine" / "model.onnx")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        result = OnnxRuntimeBuilder().build(request)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [linear.node for linear in result.audit.linears] == ["fc/MatMul"]
    assert (tmp_path / "engine/model.safetensors").samefile(tmp_path / "art/model.safetensors")


@pytest.mark.parametrize("name", ["vocab.bin", "tokenizer.data"])
def test_what_text_needs_comes_along_but_no_weights(tmp_path: Path, name: str) -> None:
    text = "(float[batch, 256] x) => (float[batch, 256] y) { y = MatMul(x, w) }"
    path = save(make(text, w=np.ones((256, 256), np.float32)), tmp_path / "art", name)
    files = {"tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "chat_template.jinja"}
    for file in (*files, "statistics.safetensors", "tokenizer.onnx"):
        (path.parent / file).touch()
    (tmp_path / "engine").mkdir()
    place_companions(path, tmp_path / "engine")
    assert {file.name for file in (tmp_path / "engine").iterdir()} == files


def test_a_graph_that_cannot_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(make(f"(float[1, {K}] x) => (float[1, {K}] y) {{ y = Frobnicate(x) }}").SerializeToString())
    with pytest.raises(BismoothError, match=r"ONNX Runtime cannot load the graph: .*Frobnicate"):
        OnnxRuntimeBuilder().build(BuildRequest(path, tmp_path / "engine" / "model.onnx"))


def test_engines_by_name() -> None:
    names = ("tensorrt-rtx", "tensorrt", "onnxruntime", "null")
    assert [find_builder(name).name for name in names] == list(names)
    assert [engine_file(name) for name in names] == ["model.engine", "model.engine", "model.onnx", "model.engine"]
    with pytest.raises(BismoothError, match="engine 'x': Expected one of tensorrt-rtx, tensorrt, onnxruntime, null"):
        find_builder("x")
