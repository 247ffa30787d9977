"""Lint rules about attention and norms: what TensorRT refuses, or reads differently from what ONNX says."""

from collections.abc import Iterator

from .lint_rule import Hit, error
from .lint_view import BFLOAT16, FLOAT, FLOAT16, View, attribute, label

_NARROW = (FLOAT16, BFLOAT16)


@error("attention-type")
def float32_attention(view: View) -> Iterator[Hit]:
    """TensorRT has no kernel for a float32 Attention node."""
    for node in view.nodes:
        if node.op_type == "Attention" and view.type(node.input[0]) == FLOAT:
            yield (
                label(node),
                "is an Attention node in float32. TensorRT has no kernel for it (SM89). Build from the float16 graph.",
            )


@error("attention-cache")
def attention_outputs(view: View) -> Iterator[Hit]:
    """TensorRT refuses the outputs of Attention that give K and V back."""
    for node in view.nodes:
        if node.op_type == "Attention" and any(node.output[1:]):
            yield (
                label(node),
                "has the output present_key or present_value. TensorRT refuses it. Concatenate old and new K and V "
                "outside of the node.",
            )


@error("attention-causal")
def causal_attention_with_mask(view: View) -> Iterator[Hit]:
    """TensorRT refuses is_causal together with a mask."""
    for node in view.nodes:
        masked = len(node.input) > 3 and bool(node.input[3])
        if node.op_type == "Attention" and masked and attribute(node, "is_causal", 0):
            yield (
                label(node),
                "is causal and has a mask. TensorRT refuses both together. Write the whole mask as the input, with "
                "is_causal=0.",
            )


@error("attention-shared")
def attention_with_shared_keys(view: View) -> Iterator[Hit]:
    """Two chained Attention nodes that read the same K and V make TensorRT-RTX's builder crash."""
    seen: dict[tuple[str, str], str] = {}
    for node in view.nodes:
        if node.op_type != "Attention" or len(node.input) < 3:
            continue
        key = (node.input[1], node.input[2])
        if key in seen:
            yield (
                label(node),
                f"reads the same K and V as {seen[key]}. TensorRT-RTX's builder can crash on it. Give it copies.",
            )
        seen.setdefault(key, label(node))


@error("norm-type")
def norm_types(view: View) -> Iterator[Hit]:
    """A 16-bit norm with float32 gamma: LayerNormalization is refused, RMSNormalization narrows gamma silently."""
    for node in view.nodes:
        if node.op_type not in ("RMSNormalization", "LayerNormalization") or len(node.input) < 2:
            continue
        x, gamma = view.type(node.input[0]), view.type(node.input[1])
        if x in _NARROW and gamma == FLOAT:
            yield (
                label(node),
                "has a 16-bit input and float32 gamma. TensorRT refuses it (LayerNormalization) or narrows gamma and "
                "the result, silently (RMSNormalization). Cast the input to float32 and the result back.",
            )
