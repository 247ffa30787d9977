"""Lint rules about types: what an architecture lacks, and what overflows or loses its digits in 16 bits."""

from collections.abc import Iterator

import numpy as np

from .lint_rule import ONNXRUNTIME, Hit, error, warning
from .lint_view import BFLOAT16, FLOAT, FLOAT16, Gemm, T, View, label

_INT4 = (int(T.INT4), int(T.UINT4))
_FP8 = (int(T.FLOAT8E4M3FN), int(T.FLOAT8E5M2), int(T.FLOAT8E4M3FNUZ), int(T.FLOAT8E5M2FNUZ))
_NARROW = (FLOAT16, BFLOAT16)
_NAMES = {FLOAT16: "float16", BFLOAT16: "bfloat16", FLOAT: "float32"}
_LARGEST, _SMALLEST_SCALE = 65504.0, 2.0**-16


@error("sm75-matmul")
def matmul_on_sm75(view: View) -> Iterator[Hit]:
    """SM75 has INT8 GEMMs in float16 graphs only: in float32 and bfloat16 graphs the build fails."""
    if 75 not in view.capabilities:
        return
    for gemm in view.integer_gemms():
        kind = _gemm_type(view, gemm)
        if gemm.node.op_type in ("MatMul", "Gemm") and kind != FLOAT16:
            yield (
                label(gemm.node),
                f"is an INT8 GEMM in {_NAMES.get(kind, 'float')}. The build for SM75 fails. Use the float16 graph.",
            )


@error("sm75-conv")
def convolution_on_sm75(view: View) -> Iterator[Hit]:
    """INT8 convolutions need SM80."""
    yield from _lacking(view, 80, "an INT8 convolution", (g.node.name or label(g.node) for g in _convolutions(view)))


def _convolutions(view: View) -> Iterator[Gemm]:
    return (gemm for gemm in view.integer_gemms() if gemm.node.op_type in ("Conv", "ConvTranspose"))


@error("int4-capability")
def int4_capability(view: View) -> Iterator[Hit]:
    """INT4 weights need SM80."""
    yield from _lacking(view, 80, "INT4", _quantized_as(view, _INT4))


@error("fp8-capability")
def fp8_capability(view: View) -> Iterator[Hit]:
    """FP8 needs SM89; on SM80 it builds and fails at run time unless the capability is listed."""
    yield from _lacking(view, 89, "FP8", _quantized_as(view, _FP8))


@error("fp4-capability")
def fp4_capability(view: View) -> Iterator[Hit]:
    """FP4 needs SM120."""
    yield from _lacking(view, 120, "FP4", _quantized_as(view, (int(T.FLOAT4E2M1),)))


@error("bfloat16-capability")
def bfloat16_capability(view: View) -> Iterator[Hit]:
    """SM75 has no bfloat16: one initializer of that type, even behind a Cast, fails the whole build."""
    stored = [tensor.name for tensor in view.initializers.values() if tensor.data_type == BFLOAT16]
    computed = [label(node) for node in view.nodes if any(view.type(value) == BFLOAT16 for value in node.output)]
    yield from _lacking(view, 80, "bfloat16", [*stored, *computed][:1])


@error("sm75-mixed")
def mixed_sm75(view: View) -> Iterator[Hit]:
    """An engine for SM75 cannot be one for other capabilities as well."""
    if 75 in view.capabilities and len(set(view.capabilities)) > 1:
        yield (
            "graph",
            f"is to be built for SM {', '.join(map(str, view.capabilities))} at once. TensorRT refuses to mix SM75 "
            "with others. Build a separate engine for SM75.",
        )


def _quantized_as(view: View, dtypes: tuple[int, ...]) -> Iterator[str]:
    return (label(quantizer.node) for quantizer in view.quantizers.values() if quantizer.dtype in dtypes)


def _lacking(view: View, least: int, what: str, nodes: Iterator[str] | list[str]) -> Iterator[Hit]:
    below = [capability for capability in view.capabilities if capability < least]
    if below:
        for node in nodes:
            yield (
                node,
                f"is {what}, which SM{below[0]} lacks. The build or the engine fails. Build for SM{least} and up.",
            )


@error("quantize-scale-type")
def quantize_scale_type(view: View) -> Iterator[Hit]:
    """A 16-bit scale of QuantizeLinear must have its input's type."""
    for quantizer in view.quantizers.values():
        node = quantizer.node
        scale, data = view.type(node.input[1]), view.type(node.input[0])
        if node.op_type == "QuantizeLinear" and scale in _NARROW and data and data != scale:
            yield (
                label(node),
                f"has a {_NAMES[scale]} scale for a {_NAMES.get(data, 'different')} input. TensorRT refuses it. Store "
                "the scale in the input's type.",
            )


@error("int8-overflow")
def int8_overflow(view: View) -> Iterator[Hit]:
    """With float16 scales per channel the GEMM writes its int32 sums as float16, which end at 65504."""
    for gemm in view.integer_gemms():
        weight = next((operand for operand in gemm.operands if operand.on_weight and operand.is_per_channel), None)
        if weight is not None and _gemm_type(view, gemm) == FLOAT16:
            yield (
                label(gemm.node),
                f"is an INT8 GEMM in float16 with a scale per channel ({label(weight.node)}). The kernel writes the "
                "bare integer sums as float16 and overflows above 65504. Dequantize with one scalar, 2^-14, and "
                "multiply by the rest in float32 after the MatMul.",
            )


@warning("int8-range")
def int8_range(view: View) -> Iterator[Hit]:
    """With scalar scales the largest possible sum, K · 127² · scales, should stay within float16."""
    for gemm in view.integer_gemms():
        scales = [operand.scale for operand in gemm.operands if operand.scale is not None and operand.scales == 1]
        shape = view.shapes.get(gemm.node.input[1], ())
        terms = shape[-2] if gemm.node.op_type == "MatMul" and len(shape) > 1 else None
        if terms is None or len(scales) < 2 or _gemm_type(view, gemm) != FLOAT16:
            continue
        largest = terms * 127.0**2 * float(np.prod([scale.reshape(-1)[0] for scale in scales], dtype=np.float64))
        if largest > _LARGEST:
            yield (
                label(gemm.node),
                f"can sum up to {largest:.3g}, above 65504. Whether it overflows depends on the data. Use a smaller "
                "scalar scale, 2^-14, and multiply by the rest in float32 after the MatMul.",
            )


@error("rescale-type")
def rescale_in_half(view: View) -> Iterator[Hit]:
    """The product of INT8 sums and scales must be float32: in float16 it overflows before the last factor."""
    for gemm in view.integer_gemms():
        for node, place in view.readers[gemm.node.output[0]]:
            if node.op_type != "Mul" or view.type(node.output[0]) != FLOAT16:
                continue
            factor = node.input[1 - place]
            if factor in view.constants or _is_row_scale(view, factor):
                yield (
                    label(node),
                    "rescales INT8 sums in float16. The scales overflow or lose their digits there. Cast the sum to "
                    "float32, multiply, and cast back: it is one kernel.",
                )


@error("row-scale-type")
def row_scale_in_half(view: View) -> Iterator[Hit]:
    """The scale of a row must be float32: a small row's is subnormal in float16, and x / t is off by whole steps."""
    for quantizer in view.quantizers.values():
        producer = view.producers.get(view.origin(quantizer.node.input[0]))
        if quantizer.on_weight or producer is None or producer.op_type not in ("Div", "Mul"):
            continue
        narrow = view.type(quantizer.node.input[0]) in _NARROW
        if narrow and any(_is_row_scale(view, value) for value in producer.input):
            yield (
                label(quantizer.node),
                f"quantizes rows that were divided in {_NAMES[view.type(quantizer.node.input[0])]}. Small rows are off "
                "by whole steps. Compute the row's maximum, the quotient and QuantizeLinear in float32.",
            )


@warning("quantize-type")
def quantize_in_half(view: View) -> Iterator[Hit]:
    """QuantizeLinear computes x · fl(1/s) in its own type: in 16 bits some values move to the next step."""
    for quantizer in view.quantizers.values():
        node = quantizer.node
        if node.op_type == "QuantizeLinear" and not quantizer.on_weight and view.type(node.input[0]) in _NARROW:
            yield (
                label(node),
                f"quantizes in {_NAMES[view.type(node.input[0])]}. Rounding of 1/scale and of the product moves values "
                "to the next step. Cast the input to float32 first: it is one kernel.",
            )


@warning("half-scale")
def half_scale(view: View) -> Iterator[Hit]:
    """Float16 numbers are 2^-24 apart below 2^-14: rounding a scale under 2^-16 costs as much as rounding to INT8."""
    for quantizer in view.quantizers.values():
        if view.type(quantizer.node.input[1]) != FLOAT16 or quantizer.scale is None:
            continue
        scales = np.abs(quantizer.scale)
        smallest = float(np.min(scales, initial=np.inf, where=scales > 0))
        if quantizer.node.op_type == "QuantizeLinear" and smallest <= _SMALLEST_SCALE:
            yield (
                label(quantizer.node),
                f"has the float16 scale {smallest:.3g}. The kernel multiplies by 1/scale, which overflows float16. "
                "Cast the input to float32, and quantize with a float32 scale.",
            )
        elif smallest < _SMALLEST_SCALE:
            yield (
                label(quantizer.node),
                f"has the float16 scale {smallest:.3g}, of which fewer than 8 bits are left. Use a scalar scale of "
                "2^-14 and multiply by the rest in float32, or scales of 2^-16 and more.",
            )


@warning("half-on-cpu", ONNXRUNTIME)
def half_on_cpu(view: View) -> Iterator[Hit]:
    """ONNX Runtime's CPU computes 16-bit graphs in float32 and does not fuse their Q/DQ nodes: slow, and no INT8."""
    for gemm in view.integer_gemms():
        if _gemm_type(view, gemm) in _NARROW:
            yield (
                label(gemm.node),
                "is an INT8 GEMM in a 16-bit graph. On the CPU ONNX Runtime runs it in float32, unfused. Use the "
                "float32 graph.",
            )
            return


def _gemm_type(view: View, gemm: Gemm) -> int:
    return view.type(gemm.node.output[0]) or view.type(gemm.operands[0].node.output[0])


def _is_row_scale(view: View, value: str) -> bool:
    """Whether a value is computed from a maximum over the last axis, as the scale of a row is."""
    seen: set[str] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        node = view.producers.get(current)
        if current in seen or current in view.constants or node is None:
            continue
        seen.add(current)
        if node.op_type == "ReduceMax":
            return True
        if node.op_type in ("Div", "Mul", "Max", "Cast", "Clip", "Reciprocal"):
            pending.extend(node.input)
    return False
