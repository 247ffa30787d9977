"""Small ONNX graphs written in ONNX's text format, and ways to look at and run them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.parser
import onnx.shape_inference
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from bismooth.engines.onnxruntime import import_onnxruntime
from bismooth.passes._gs import Graph, Node, dtype_of, export_model
from bismooth.passes.graph import load

Array = NDArray[Any]
_checker: Any = onnx.checker
HIDDEN, HEADS, KV_HEADS, SIZE, INNER, VOCAB = 48, 4, 2, 12, 64, 50


def parse(text: str, opset: int = 23, /, **initializers: Array) -> onnx.ModelProto:
    """A model from text such as ``"(float[n, 8] x) => (float[n, 8] y) { y = Relu(x) }"``, right or wrong.

    A node is named after its first output and its operator: ``y/Relu``.
    """
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> graph {text}')
    tensors = [numpy_helper.from_array(np.asarray(values), name) for name, values in initializers.items()]
    model.graph.initializer.extend(tensors)
    for node in model.graph.node:
        node.name = node.name or f"{node.output[0]}/{node.op_type}"
    return model


def make(text: str, opset: int = 23, /, **initializers: Array) -> onnx.ModelProto:
    """A valid model from text, with inferred types."""
    model = parse(text, opset, **initializers)
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def open_graph(model: onnx.ModelProto, folder: Path) -> Graph:
    """The graph of a model, loaded from a file as the commands do."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return load(path)


def externalize(model: onnx.ModelProto, folder: Path, *names: str) -> None:
    """Move initializers into a file of ``folder``, in place."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    with (folder / "weights.bin").open("ab") as file:
        for name in names:
            tensor = tensors[name]
            data = tensor.raw_data
            entries = {"location": "weights.bin", "offset": file.tell(), "length": len(data)}
            file.write(data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))


def run(model: onnx.ModelProto | Graph, feeds: Mapping[str, Array], *values: str) -> list[Array]:
    """Outputs, or the named values, by ONNX Runtime without graph optimizations."""
    onnxruntime = import_onnxruntime()
    proto = onnx.ModelProto()
    proto.CopyFrom(model if isinstance(model, onnx.ModelProto) else export_model(model))
    if values:
        del proto.graph.output[:]
        proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in values)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def check(graph: Graph) -> onnx.ModelProto:
    """The model of a graph whose weights are inside, after ONNX's full check."""
    model = export_model(graph)
    _checker.check_model(model, full_check=True)
    return model


def types(graph: Graph, *ops: str) -> list[str]:
    """The types of the first outputs of the nodes with these operators, in graph order."""
    return [_type(node) for node in graph.nodes if node.op in ops]


def ops(graph: Graph) -> list[str]:
    """The operators, in graph order."""
    return [node.op for node in graph.nodes]


def _type(node: Node) -> str:
    dtype = dtype_of(node.outputs[0])
    return "none" if dtype is None else dtype.name


def tiny_llama(layers: int = 2, seed: int = 0) -> onnx.ModelProto:
    """A random Llama: grouped-query attention, rotary embeddings, SwiGLU, RMS norms, tied head, padding mask."""
    body = "".join(_block(f"l{layer}") for layer in range(layers)).replace("l0_in", "h")
    for layer in range(1, layers):
        body = body.replace(f"l{layer}_in", f"l{layer - 1}_out")
    text = f"""(int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask)
        => (float[batch, sequence, {VOCAB}] logits) {{
        h = Gather(embed_weight, input_ids)
        length = Shape<start = 1, end = 2>(input_ids)
        scalar = Squeeze(length)
        positions = Range(zero, scalar, one)
        column = Unsqueeze(positions, ax1)
        causal = LessOrEqual(positions, column)
        kept = Cast<to = 9>(attention_mask)
        kept4 = Unsqueeze(kept, ax12)
        mask = And(causal, kept4)
        moment = Cast<to = 1>(column)
        angle = Mul(moment, inv_freq)
        angles = Concat<axis = -1>(angle, angle)
        cos = Cos(angles)
        sin = Sin(angles)
        {body}
        normed = RMSNormalization<epsilon = 1e-5>(l{layers - 1}_out, norm_weight)
        head = Transpose<perm = [1, 0]>(embed_weight)
        logits = MatMul(normed, head)
    }}"""
    return make(text, **_llama_constants(layers, seed))


def _block(p: str) -> str:
    linears = {name: _linear(p, name, source) for name, source in _SOURCES.items()}
    return f"""
        {p}_n1 = RMSNormalization<epsilon = 1e-5>({p}_in, {p}_n1_weight)
        {linears["q"]} {linears["k"]} {linears["v"]}
        {p}_q_s = Reshape({p}_q, q_shape)
        {p}_k_s = Reshape({p}_k, kv_shape)
        {p}_v_s = Reshape({p}_v, kv_shape)
        {_rotation(f"{p}_q")} {_rotation(f"{p}_k")}
        {p}_v_h = Transpose<perm = [0, 2, 1, 3]>({p}_v_s)
        {p}_attention = Attention<scale = 0.25>({p}_q_r, {p}_k_r, {p}_v_h, mask)
        {p}_back = Transpose<perm = [0, 2, 1, 3]>({p}_attention)
        {p}_joined = Reshape({p}_back, h_shape)
        {linears["o"]}
        {p}_mid = Add({p}_in, {p}_o)
        {p}_n2 = RMSNormalization<epsilon = 1e-5>({p}_mid, {p}_n2_weight)
        {linears["gate"]} {linears["up"]}
        {p}_sigmoid = Sigmoid({p}_gate)
        {p}_silu = Mul({p}_gate, {p}_sigmoid)
        {p}_product = Mul({p}_silu, {p}_up)
        {linears["down"]}
        {p}_out = Add({p}_mid, {p}_down)"""


def _linear(p: str, name: str, source: str) -> str:
    return f"""
        {p}_{name}_t = Transpose<perm = [1, 0]>({p}_{name}_weight)
        {p}_{name} = MatMul({p}_{source}, {p}_{name}_t)"""


def _rotation(p: str) -> str:
    return f"""
        {p}_h = Transpose<perm = [0, 2, 1, 3]>({p}_s)
        {p}_a = Slice({p}_h, i0, i_half, ax3)
        {p}_b = Slice({p}_h, i_half, i_end, ax3)
        {p}_n = Neg({p}_b)
        {p}_c = Concat<axis = -1>({p}_n, {p}_a)
        {p}_x = Mul({p}_h, cos)
        {p}_y = Mul({p}_c, sin)
        {p}_r = Add({p}_x, {p}_y)"""


_SOURCES = {"q": "n1", "k": "n1", "v": "n1", "o": "joined", "gate": "n2", "up": "n2", "down": "product"}
_WIDTHS = {
    "q": (HIDDEN, HIDDEN),
    "k": (KV_HEADS * SIZE, HIDDEN),
    "v": (KV_HEADS * SIZE, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}


def _llama_constants(layers: int, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> Array:
        return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32)

    values: dict[str, Array] = {
        "zero": np.array(0),
        "one": np.array(1),
        "ax1": np.array([1]),
        "ax12": np.array([1, 2]),
        "ax3": np.array([3]),
        "i0": np.array([0]),
        "i_half": np.array([SIZE // 2]),
        "i_end": np.array([SIZE]),
        "q_shape": np.array([0, 0, HEADS, SIZE]),
        "kv_shape": np.array([0, 0, KV_HEADS, SIZE]),
        "h_shape": np.array([0, 0, HIDDEN]),
        "inv_freq": (10000.0 ** -(np.arange(0, SIZE, 2) / SIZE)).astype(np.float32),
        "embed_weight": 4 * weight(VOCAB, HIDDEN),
        "norm_weight": 1 + weight(HIDDEN),
    }
    for layer in range(layers):
        values |= {f"l{layer}_{name}_weight": weight(*shape) for name, shape in _WIDTHS.items()}
        values |= {f"l{layer}_{name}_weight": 1 + weight(HIDDEN) for name in ("n1", "n2")}
    return values


def tokens(batch: int = 2, sequence: int = 9, padding: int = 3, seed: int = 0) -> dict[str, Array]:
    """Feeds of ``tiny_llama``; the first row has ``padding`` tokens of padding on its left."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, (batch, sequence))
    mask = np.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}
