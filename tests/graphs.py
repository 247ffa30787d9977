"""Small ONNX graphs for tests: a builder, and the blocks that language models are made of."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx.shape_inference
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

from bismooth.passes._gs import Graph
from bismooth.passes.graph import load

Array = NDArray[Any]
Size = int | str

TOKENS: tuple[Size, Size] = ("batch", "sequence")
BATCH, LENGTH = 2, 5


@dataclass
class Builder:
    """Makes a graph node by node; every method returns the name of the value it makes.

    Nodes are named as the exporter names them: ``<module>/<op>``.
    """

    opset: int = 23
    seed: int = 0
    unknown: str | None = None
    """The name to record for dimensions that shape inference cannot name; the exporter knows all names."""
    nodes: list[onnx.NodeProto] = field(default_factory=list[onnx.NodeProto])
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list[onnx.ValueInfoProto])
    outputs: list[str] = field(default_factory=list[str])
    initializers: dict[str, Array] = field(default_factory=dict[str, Array])

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def input(self, name: str, *shape: Size, dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def tokens(self, name: str, channels: int) -> str:
        """An activation [batch, sequence, channels] that enters from outside."""
        return self.input(name, *TOKENS, channels)

    def constant(self, name: str, values: object) -> str:
        self.initializers[name] = np.asarray(values)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(f"ints_{'_'.join(str(value) for value in values)}", np.array(values, np.int64))

    def vector(self, name: str, size: int) -> str:
        return self.constant(name, self.random.uniform(0.5, 1.5, size).astype(np.float32))

    def matrix(self, name: str, *shape: int) -> str:
        return self.constant(name, self.random.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5))

    def op(self, op: str, *inputs: str, at: str = "", **attributes: Any) -> str:
        return self.ops(op, *inputs, at=at, count=1, **attributes)[0]

    def ops(self, op: str, *inputs: str, at: str = "", count: int, **attributes: Any) -> list[str]:
        """A node with several outputs."""
        number = len(self.nodes)
        taken = {node.name for node in self.nodes}
        name = f"{at or 'graph'}/{op}"
        name = f"{name}_{number}" if name in taken else name
        outputs = [f"v{number}_{place}" for place in range(count)]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return outputs

    def linear(self, x: str, module: str, n: int, k: int, *, bias: bool = False, layout: str = "NK") -> str:
        weight = self.matrix(f"{module}.weight", *((n, k) if layout == "NK" else (k, n)))
        return self.product(x, weight, module, n, bias=bias, transpose=layout == "NK")

    def product(self, x: str, weight: str, module: str, n: int, *, bias: bool = False, transpose: bool = True) -> str:
        """A linear on a weight that exists already."""
        operand = self.op("Transpose", weight, at=module, perm=[1, 0]) if transpose else weight
        y = self.op("MatMul", x, operand, at=module)
        return self.op("Add", y, self.vector(f"{module}.bias", n), at=module) if bias else y

    def rms_norm(self, x: str, module: str, size: int) -> str:
        return self.op("RMSNormalization", x, self.vector(f"{module}.weight", size), at=module, axis=-1)

    def layer_norm(self, x: str, module: str, size: int) -> str:
        gamma, beta = self.vector(f"{module}.weight", size), self.vector(f"{module}.bias", size)
        return self.op("LayerNormalization", x, gamma, beta, at=module, axis=-1)

    def silu(self, x: str, at: str) -> str:
        return self.op("Mul", x, self.op("Sigmoid", x, at=at), at=at)

    def heads(self, x: str, heads: int, size: int, at: str = "attn") -> str:
        """[batch, sequence, heads · size] to [batch, heads, sequence, size]."""
        shape = self.ints(0, 0, heads, size)
        return self.op("Transpose", self.op("Reshape", x, shape, at=at), at=at, perm=[0, 2, 1, 3])

    def merged(self, x: str, channels: int, at: str = "attn") -> str:
        """[batch, heads, sequence, size] to [batch, sequence, channels]."""
        return self.op("Reshape", self.op("Transpose", x, at=at, perm=[0, 2, 1, 3]), self.ints(0, 0, channels), at=at)

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "test",
            self.inputs,
            [onnx.ValueInfoProto(name=name) for name in self.outputs],
            [numpy_helper.from_array(values, name) for name, values in self.initializers.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        if self.unknown:
            for info in (*model.graph.value_info, *model.graph.output):
                for dim in info.type.tensor_type.shape.dim:
                    if dim.dim_param.startswith("unk__") or not dim.WhichOneof("value"):
                        dim.dim_param = self.unknown
        cast(Any, onnx.checker).check_model(model, full_check=True)
        return model

    def save(self, folder: Path, *, external: bool = False) -> Path:
        """Write ``model.onnx``; with ``external`` the float initializers go to ``model.safetensors``."""
        model, path = self.model(), folder / "model.onnx"
        if external:
            move_to_safetensors(model, folder / "model.safetensors")
        path.write_bytes(model.SerializeToString())
        return path

    def graph(self, folder: Path) -> Graph:
        return load(self.save(folder))


def move_to_safetensors(model: onnx.ModelProto, file: Path) -> None:
    """Let the float initializers of a model point into a safetensors file, as the exporter does."""
    floats = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    save_file({name: np.ascontiguousarray(values) for name, values in floats.items()}, file)
    header_size = int.from_bytes(file.read_bytes()[:8], "little")
    data = file.read_bytes()[8 + header_size :]
    for tensor in model.graph.initializer:
        if tensor.name in floats:
            raw = floats[tensor.name].tobytes()
            offset = 8 + header_size + data.index(raw)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", file.name), ("offset", offset), ("length", len(raw))):
                tensor.external_data.add(key=key, value=str(value))


def run(path: Path, seed: int = 0) -> list[Array]:
    """Run a model in ONNX Runtime on random activations and ids, batch 2 and sequence 5."""
    ort: Any = onnxruntime
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(seed)
    sizes = {"batch": BATCH, "sequence": LENGTH}
    feeds: dict[str, Array] = {}
    for tensor in session.get_inputs():
        shape = [sizes[dim] if isinstance(dim, str) else int(dim) for dim in tensor.shape]
        if "int64" in tensor.type:
            feeds[tensor.name] = np.ones(shape, np.int64) if "mask" in tensor.name else random.integers(0, 8, shape)
        else:
            feeds[tensor.name] = random.standard_normal(shape, np.float32)
    return session.run(None, feeds)


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a small decoder in the manner of SmolLM2."""

    layers: int = 2
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 8
    ffn: int = 48
    vocab: int = 16


def decoder(shape: DecoderShape | None = None, *, tied: bool = True) -> Builder:
    """A decoder as the exporter writes it: RMSNorm, rotary embedding, native grouped-query Attention, SiLU gate."""
    s = shape or DecoderShape()
    b = Builder(unknown="sequence")
    ids = b.input("input_ids", *TOKENS, dtype=TensorProto.INT64)
    b.input("attention_mask", *TOKENS, dtype=TensorProto.INT64)
    embedding = b.matrix("lm_head.weight" if tied else "model.embed_tokens.weight", s.vocab, s.hidden)
    x = b.op("Gather", embedding, ids, at="model.embed_tokens", axis=0)
    mask, (cos, sin) = _causal_mask(b), _rotary(b, s.head_size)
    for layer in range(s.layers):
        x = _decoder_layer(b, x, f"model.layers.{layer}", s, mask, cos, sin)
    x = b.rms_norm(x, "model.norm", s.hidden)
    head = embedding if tied else b.matrix("lm_head.weight", s.vocab, s.hidden)
    b.outputs.append(b.product(x, head, "lm_head", s.vocab))
    return b


def _causal_mask(b: Builder) -> str:
    length = b.op("Squeeze", b.op("Shape", "attention_mask", at="mask", start=1, end=2), at="mask")
    positions = b.op("Range", b.constant("zero", np.int64(0)), length, b.constant("one", np.int64(1)), at="mask")
    rows, columns = (
        b.op("Unsqueeze", positions, b.ints(1), at="mask"),
        b.op("Unsqueeze", positions, b.ints(0), at="mask"),
    )
    causal = b.op("LessOrEqual", columns, rows, at="mask")
    keep = b.op("Cast", "attention_mask", at="mask", to=TensorProto.BOOL)
    return b.op("And", causal, b.op("Unsqueeze", keep, b.ints(1, 2), at="mask"), at="mask")


def _rotary(b: Builder, size: int) -> tuple[str, str]:
    length = b.op("Squeeze", b.op("Shape", "input_ids", at="rotary", start=1, end=2), at="rotary")
    positions = b.op("Range", b.constant("zero", np.int64(0)), length, b.constant("one", np.int64(1)), at="rotary")
    column = b.op("Unsqueeze", b.op("Cast", positions, at="rotary", to=TensorProto.FLOAT), b.ints(1), at="rotary")
    frequency = b.constant("inv_freq", (100.0 ** -np.linspace(0, 1, size // 2)).astype(np.float32))
    half = b.op("Mul", column, frequency, at="rotary")
    angles = b.op("Concat", half, half, at="rotary", axis=-1)
    return b.op("Cos", angles, at="rotary"), b.op("Sin", angles, at="rotary")


def rotate(b: Builder, x: str, size: int, cos: str, sin: str, at: str) -> str:
    """The rotary embedding of [batch, heads, sequence, size]: channels are added to other channels."""
    half, end = size // 2, np.iinfo(np.int64).max
    left = b.op("Slice", x, b.ints(0), b.ints(half), b.ints(3), b.ints(1), at=at)
    right = b.op("Slice", x, b.ints(half), b.ints(end), b.ints(3), b.ints(1), at=at)
    turned = b.op("Concat", b.op("Neg", right, at=at), left, at=at, axis=-1)
    return b.op("Add", b.op("Mul", x, cos, at=at), b.op("Mul", turned, sin, at=at), at=at)


def _decoder_layer(b: Builder, x: str, at: str, s: DecoderShape, mask: str, cos: str, sin: str) -> str:
    attn, mlp = f"{at}.self_attn", f"{at}.mlp"
    h = b.rms_norm(x, f"{at}.input_layernorm", s.hidden)
    q = b.heads(b.linear(h, f"{attn}.q_proj", s.heads * s.head_size, s.hidden), s.heads, s.head_size, attn)
    k, v = (
        b.heads(b.linear(h, f"{attn}.{name}", s.kv_heads * s.head_size, s.hidden), s.kv_heads, s.head_size, attn)
        for name in ("k_proj", "v_proj")
    )
    q, k = rotate(b, q, s.head_size, cos, sin, attn), rotate(b, k, s.head_size, cos, sin, attn)
    y = b.merged(b.op("Attention", q, k, v, mask, at=attn), s.heads * s.head_size, attn)
    x = b.op("Add", x, b.linear(y, f"{attn}.o_proj", s.hidden, s.heads * s.head_size), at=at)
    h = b.rms_norm(x, f"{at}.post_attention_layernorm", s.hidden)
    gate = b.silu(b.linear(h, f"{mlp}.gate_proj", s.ffn, s.hidden), f"{mlp}.act_fn")
    y = b.op("Mul", gate, b.linear(h, f"{mlp}.up_proj", s.ffn, s.hidden), at=mlp)
    return b.op("Add", x, b.linear(y, f"{mlp}.down_proj", s.hidden, s.ffn), at=at)
