"""Encode quantized activations without a sign, for ONNX Runtime's CPU kernels."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ._gs import Graph, make_constant, set_type, shape_of


@dataclass(frozen=True)
class UseUnsignedActivations:
    """Quantize activations to UINT8 around 128 instead of INT8 around 0: the same numbers, another encoding.

    ONNX Runtime's CPU kernels multiply unsigned activations; it re-encodes signed ones itself, but not those that
    several linears share. TensorRT reads UINT8 otherwise, so this is for the CPU's graph alone.

    Needs: the Q/DQ pairs that ``InsertQdq`` makes. Promises: activations are quantized as uint8 with zero point 128.
    """

    name: ClassVar[str] = "unsigned activations"

    def apply(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        zero = make_constant("quantize.zero_unsigned", np.array(128, np.uint8))
        for node in graph.nodes:
            if node.op != "QuantizeLinear":
                continue
            quantized = node.outputs[0]
            set_type(quantized, np.dtype(np.uint8), shape_of(quantized))
            node.inputs[2] = zero
            for reader in list(quantized.outputs):
                reader.inputs.append(zero)  # InsertQdq leaves the zero point of a DequantizeLinear out
