"""What a step of an engine costs at least: the bytes that it must read, and its operations.

Weights have the types in which the audited kernels read them. Read are the weights of all linears, once, and the keys
and values of all positions of each row. Activations, scales, norms, the embeddings of single tokens, and whatever is
written are neglected: all that makes a step slower, never faster, than what follows from these figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..engines.audit import Audit, LinearAudit
from ..export.errors import BismoothError

_BYTES = {"Int8": 1, "Half": 2, "BFloat16": 2, "Float": 4}
"""Of an element, by TensorRT's name of its type."""

_DIMS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class StepCost:
    """The cost of one step.

    Attributes:
        weight_bytes: of the weights of all linears.
        cache_bytes: of keys and values.
        int8_operations, float_operations: two per multiply-accumulate; the latter with attention.
    """

    weight_bytes: int
    cache_bytes: int
    int8_operations: int
    float_operations: int

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes

    @property
    def operations(self) -> int:
        return self.int8_operations + self.float_operations

    def to_json(self) -> dict[str, Any]:
        return {
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
            "int8_operations": self.int8_operations,
            "float_operations": self.float_operations,
        }


@dataclass(frozen=True)
class CostModel:
    """The costs of an engine's steps.

    Attributes:
        weight_bytes: of the weights of all linears.
        cache_bytes: of keys and values of one position of one row.
        int8_macs, float_macs: multiply-accumulates per token of the linears, without the head.
        int8_head_macs, float_head_macs: per token whose logits are computed.
        attention_macs: per query and key that it sees.
    """

    weight_bytes: int
    cache_bytes: int
    int8_macs: int
    float_macs: int
    int8_head_macs: int
    float_head_macs: int
    attention_macs: int

    @staticmethod
    def of(audit: Audit, dims: Mapping[str, int], label: str) -> CostModel:
        """The model of an audited engine; ``dims`` are those of its manifest, ``label`` is for messages.

        Raises:
            BismoothError: a dimension is missing, or the type of a weight is not known.
        """
        if missing := [name for name in _DIMS if name not in dims]:
            raise BismoothError(
                f"{label}: the manifest lacks {', '.join(missing)}. Expected the dimensions of a language model. "
                "Export it from a folder with its config.json, or from GGUF."
            )
        layers, heads, kv_heads, size = (dims[name] for name in _DIMS)

        def macs(*, int8: bool, head: bool) -> int:
            return sum(linear.macs for linear in audit.linears if (linear.int8, linear.head) == (int8, head))

        return CostModel(
            sum(linear.macs * _weight_size(linear, label) for linear in audit.linears),
            2 * layers * kv_heads * size * _float_size(audit, label),
            macs(int8=True, head=False),
            macs(int8=False, head=False),
            macs(int8=True, head=True),
            macs(int8=False, head=True),
            2 * layers * heads * size,
        )

    def prefill(self, batch: int, length: int) -> StepCost:
        """Of a prompt of ``length`` tokens in each of ``batch`` rows; logits are those of the last one.

        Attention is causal: length · (length + 1) / 2 pairs of query and key.
        """
        return self._step(batch, length, length * (length + 1) // 2, length)

    def decode(self, batch: int, context: int) -> StepCost:
        """Of one token in each of ``batch`` rows, which sees ``context`` positions, itself included."""
        return self._step(batch, 1, context, context)

    def _step(self, batch: int, tokens: int, pairs: int, positions: int) -> StepCost:
        int8 = tokens * self.int8_macs + self.int8_head_macs
        floats = tokens * self.float_macs + self.float_head_macs + pairs * self.attention_macs
        return StepCost(self.weight_bytes, batch * positions * self.cache_bytes, 2 * batch * int8, 2 * batch * floats)


def _weight_size(linear: LinearAudit, label: str) -> int:
    if linear.weight not in _BYTES:
        raise BismoothError(
            f"{label}: the audit gives {linear.weight or 'no type'} as the weight of {linear.node}. "
            f"Expected one of: {', '.join(_BYTES)}. Build the engine again."
        )
    return _BYTES[linear.weight]


def _float_size(audit: Audit, label: str) -> int:
    """Bytes of an element of keys and values, which have the type that the linears give."""
    sizes = [_BYTES[linear.output] for linear in audit.linears if linear.output in _BYTES]
    if not sizes:
        raise BismoothError(f"{label}: the audit gives no type of any linear's output. Build the engine again.")
    return max(sizes)
