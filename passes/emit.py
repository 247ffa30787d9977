"""Make nodes one after the other, with one shared copy of each small constant."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._gs import Dim, Node, Tensor, make_constant, make_node, make_variable

FLOAT = np.dtype(np.float32)
INT8 = np.dtype(np.int8)
INT64 = np.dtype(np.int64)


class Emitter:
    """Collects new nodes, each with one output that is named as the node."""

    def __init__(self) -> None:
        self._constants: dict[str, Tensor] = {}
        self._nodes: list[Node] = []

    def node(
        self,
        op: str,
        name: str,
        inputs: Sequence[Tensor],
        shape: Sequence[Dim],
        *,
        dtype: np.dtype[Any] = FLOAT,
        output: str | None = None,
        **attributes: object,
    ) -> Tensor:
        """A node and its output of this type and shape; ``output`` names that differently."""
        result = make_variable(output or name, dtype, shape)
        self._nodes.append(make_node(op, name, inputs, [result], attributes))
        return result

    def constant(self, name: str, value: object, dtype: np.dtype[Any] = FLOAT) -> Tensor:
        """The constant ``quantize.<name>``: the same name must mean the same value."""
        if name not in self._constants:
            self._constants[name] = make_constant(f"quantize.{name}", np.array(value, dtype))
        return self._constants[name]

    def integers(self, *values: int) -> Tensor:
        """A constant int64 vector."""
        return self.constant("ints_" + "_".join(map(str, values)), values, INT64)

    def take(self) -> list[Node]:
        """The nodes made since the last call, in order."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def rename_last_output(self, tensor: Tensor) -> None:
        """Let the node made last produce ``tensor``, an existing value that has lost its producer."""
        self._nodes[-1].outputs[0] = tensor
