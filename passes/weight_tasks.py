"""The tensors of a quantized artifact's weight file, as the work on one linear or one initializer at a time.

A call reads a weight of the source, some rows at a time, and writes what it makes of it at its place in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.column_writer import ColumnWriter
from ..export.placed_tensors import PlacedTensors, TensorWriter
from .emit import INT8
from .fold import Edit
from .fold_passes import folded_name
from .fold_underflow import require_kept
from .groups import without_walls
from .linears import Linear
from .precision import NARROW_TYPES, narrow_pieces
from .qdq import Product, rescale
from .room import Room
from .spec import ComputeType, LinearSpec, PerGroup, PerMagnitude, StaticActivation
from .static_ranges import StaticRanges
from .weight_reader import WeightReader
from .weights import ROWS, QuantizedWeight, in_two_digits, quantize_weight, weight_error

Float = NDArray[np.float32]


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized linear.

    Attributes:
        name: The module's path.
        node: Name of its ONNX node, the same in the float and in the Q/DQ graph.
        n: Output channels.
        k: Input channels.
        int8: Its activation is quantized as well, so it is to run as an INT8 product.
        weight_error: Relative error of its weight, ‖W − Ŵ‖ / ‖W‖ after folding.
        group: How many consecutive input channels share a scale; None if it is not so.
        walls: By group, the input channels that have scales of their own.
        wall_nodes: Names of the ONNX nodes that multiply them.
    """

    name: str
    node: str
    n: int
    k: int
    int8: bool
    weight_error: float
    group: int | None = None
    walls: tuple[tuple[int, ...], ...] = ()
    wall_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class WeightSources:
    """What the tensors of the file are made from.

    Attributes:
        reader: The source's weights.
        linears: All linears of the graph.
        specs: By linear name.
        edits: The folded smoothing factors, by constant.
        ranges: Static ranges.
        compute: The 16-bit type of the deployed graph, or float32.
    """

    reader: WeightReader
    linears: Sequence[Linear]
    specs: Mapping[str, LinearSpec]
    edits: Mapping[str, Edit]
    ranges: StaticRanges
    compute: ComputeType


def folded_blocks(
    reader: WeightReader, linear: Linear, elements: int | None = None, *, edits: Mapping[str, Edit]
) -> Iterator[Float]:
    """W of a linear with the smoothing factors folded in, some rows at a time: float32 [.., K].

    A block may be changed; the next one overwrites it. Its products are rounded as those of :func:`.fold.apply_edit`.
    """
    edit, start = edits.get(linear.weight, Edit()), 0
    rows, columns = (None if s is None else s.astype(np.float32) for s in (edit.rows, edit.columns))
    for block in reader.blocks(linear, elements):
        stop = start + len(block)
        if rows is not None:
            block *= rows[start:stop, None]
        if columns is not None:
            block *= columns
        yield block
        start = stop


class _OnlyWrites:
    """A task whose result is what it has written."""

    def encode(self, result: None) -> None:
        """As a JSON value."""
        return result

    def decode(self, plain: None) -> None:
        """And back."""
        return plain


@dataclass(frozen=True, eq=False)
class Layout:
    """A file to come: its name, and the name, type and shape of its tensors."""

    name: str
    tensors: Sequence[tuple[str, np.dtype[Any], tuple[int, ...]]]


@dataclass(frozen=True, eq=False)
class LayOut(_OnlyWrites):
    """Make a file that tensors can be written to."""

    folder: Path

    @property
    def step(self) -> str:
        """Name of the step."""
        return "lay out"

    def __call__(self, layout: Layout) -> None:
        """Make it."""
        PlacedTensors.create(self.folder / layout.name, layout.tensors)


@dataclass(frozen=True)
class Output:
    """The file, and which of its tensors are 16-bit copies.

    Attributes:
        tensors: The file.
        copies: By the name of a tensor or an initializer, the types that it is stored in as well.
    """

    tensors: PlacedTensors
    copies: Mapping[str, Sequence[np.dtype[Any]]]

    def with_copies(self, *names: str) -> list[str]:
        """These names, and those of the 16-bit copies."""
        return [*names, *(copy_name(name, dtype) for name in names for dtype in self.copies.get(name, ()))]

    def narrow(
        self, writer: TensorWriter, name: str, pieces: Callable[[], Iterable[NDArray[Any]]], origin: str
    ) -> None:
        """Write the 16-bit copies of a tensor; ``origin`` names it in messages."""
        for dtype in self.copies.get(name, ()):
            writer.write_pieces(copy_name(name, dtype), narrow_pieces(pieces(), dtype, origin))


def copy_name(name: str, dtype: np.dtype[Any]) -> str:
    """Name of the stored 16-bit copy of a tensor."""
    return f"{name}.{dtype.name}"


@dataclass(eq=False)
class _Part:
    """A product's weight as far as it was quantized: its values go to the file, its scales come last."""

    product: Product
    columns: ColumnWriter
    scales: list[Float] = field(default_factory=list[Float])
    lost: float = 0.0
    power: float = 0.0

    @staticmethod
    def of(product: Product, writer: TensorWriter) -> _Part:
        """Nothing yet."""
        return _Part(product, ColumnWriter(writer, product.values, product.values_shape, INT8))

    def add(self, rows: QuantizedWeight) -> None:
        """The next rows."""
        self.columns.add(rows.values.reshape(len(rows.values), -1))
        self.scales.append(rows.scale)
        self.lost += rows.lost
        self.power += rows.power


@dataclass(frozen=True, eq=False)
class QuantizeLinear:
    """Write the INT8 weight of a linear, and its scales."""

    sources: WeightSources
    output: Output

    @property
    def step(self) -> str:
        """Name of the step."""
        return "quantize weights"

    def writes(self, linear: Linear) -> list[str]:
        """Names of the tensors that a call writes."""
        products = Product.of(linear, self.sources.specs[linear.name].groups)
        return [*(product.values for product in products), *self.output.with_copies(*(p.scale for p in products))]

    def __call__(self, linear: Linear) -> QuantizedLinear:
        """What became of the linear.

        Raises:
            BismoothError: its weight holds NaN or infinity, or a scale does not fit into the 16-bit type.
        """
        spec, room, first = self.sources.specs[linear.name], Room(), 0
        products = Product.of(linear, spec.groups)
        with self.output.tensors.writing(self.writes(linear)) as writer:
            parts = [_Part.of(product, writer) for product in products]
            for block in folded_blocks(self.sources.reader, linear, ROWS, edits=self.sources.edits):
                for part, quantized in zip(parts, self._quantize(linear, spec, block, first, room), strict=True):
                    part.add(quantized)
                first += len(block)
            for part in parts:
                part.columns.close()
                self._write_scale(writer, linear, spec, part)
        return QuantizedLinear(
            name=linear.name,
            node=linear.node,
            n=linear.n,
            k=linear.k,
            int8=spec.activations is not None,
            weight_error=weight_error(sum(part.lost for part in parts), sum(part.power for part in parts)),
            group=spec.groups.size if isinstance(spec.groups, PerGroup) else None,
            walls=spec.groups.walls if isinstance(spec.groups, PerMagnitude) else (),
            wall_nodes=tuple(product.node for product in products[1:]),
        )

    def encode(self, result: QuantizedLinear) -> Any:
        """As JSON values."""
        return asdict(result)

    def decode(self, plain: Any) -> QuantizedLinear:
        """And back."""
        walls = tuple(tuple(int(channel) for channel in group) for group in plain["walls"])
        tuples = {"walls": walls, "wall_nodes": tuple(plain["wall_nodes"])}
        return QuantizedLinear(**plain | tuples)

    def _quantize(
        self, linear: Linear, spec: LinearSpec, block: Float, first: int, room: Room
    ) -> list[QuantizedWeight]:
        """Some rows of W, from number ``first`` on, as each of the linear's products has them."""
        storage = None if spec.has_rescale else NARROW_TYPES.get(self.sources.compute)
        group = spec.groups.size if isinstance(spec.groups, PerGroup) else None
        make = partial(quantize_weight, name=linear.weight, storage=storage, group=group, first=first)
        if not isinstance(spec.groups, PerMagnitude):
            return [make(block, room=room)]
        rest, *walls = without_walls(block, spec.groups.walls)
        pairs = [(part, make(part)) for part in walls]
        two = spec.groups.wall_bits == 16
        return [
            make(rest, room=room),
            *chain.from_iterable(in_two_digits(*pair) if two else pair[1:] for pair in pairs),
        ]

    def _write_scale(self, writer: TensorWriter, linear: Linear, spec: LinearSpec, part: _Part) -> None:
        scale, product = np.concatenate(part.scales), part.product
        if spec.has_rescale:
            scale = rescale(scale, self._limits(linear, spec, product))
        stored = scale.T.reshape(product.scale_shape)
        writer.write(product.scale, stored)
        self.output.narrow(writer, product.scale, lambda: [stored], linear.weight)

    def _limits(self, linear: Linear, spec: LinearSpec, product: Product) -> Sequence[float] | None:
        """The static ranges of what a product reads: one, or one per group of a size."""
        if not isinstance(spec.activations, StaticActivation):
            return None
        limits = self.sources.ranges[linear.x, spec.groups]
        return limits if isinstance(spec.groups, PerGroup) else [limits[product.group]]


@dataclass(frozen=True, eq=False)
class StoreFoldedWeight(_OnlyWrites):
    """Write the weight of a linear that stays float, with the smoothing factors folded in."""

    sources: WeightSources
    output: Output

    @property
    def step(self) -> str:
        """Name of the step."""
        return "store folded weights"

    def writes(self, linear: Linear) -> list[str]:
        """Names of the tensors that a call writes."""
        return self.output.with_copies(folded_name(linear))

    def __call__(self, linear: Linear) -> None:
        """Write it.

        Raises:
            BismoothError: it does not fit into the 16-bit type, or folding made it too small for that.
        """
        name, edit = folded_name(linear), self.sources.edits[linear.weight]
        blocks = partial(folded_blocks, self.sources.reader, linear, ROWS, edits=self.sources.edits)
        with self.output.tensors.writing(self.writes(linear)) as writer:
            _write_rows(writer, name, linear, blocks(), np.dtype(np.float32))
            for dtype in self.output.copies.get(name, ()):
                narrowed = narrow_pieces(blocks(), dtype, linear.weight)
                _write_rows(writer, copy_name(name, dtype), linear, narrowed, dtype)
        for dtype in self.output.copies.get(name, ()):
            require_kept(blocks(), (linear.n, linear.k), edit, dtype, linear.weight)


@dataclass(frozen=True)
class Initializer:
    """An initializer of the source, or a constant that folding made."""

    name: str


@dataclass(frozen=True, eq=False)
class CopyNarrow(_OnlyWrites):
    """Write the 16-bit copies of an initializer of the source."""

    reader: WeightReader
    output: Output

    @property
    def step(self) -> str:
        """Name of the step."""
        return "store 16-bit weights"

    def writes(self, initializer: Initializer) -> list[str]:
        """Names of the tensors that a call writes."""
        return self.output.with_copies(initializer.name)[1:]

    def __call__(self, initializer: Initializer) -> None:
        """Write them.

        Raises:
            BismoothError: the initializer holds NaN or infinity, or does not fit into the 16-bit type.
        """
        name = initializer.name
        with self.output.tensors.writing(self.writes(initializer)) as writer:
            self.output.narrow(writer, name, lambda: self.reader.pieces(name), name)


@dataclass(frozen=True, eq=False)
class CopyMade(_OnlyWrites):
    """Write the 16-bit copies of a constant that folding made.

    Attributes:
        constants: By name, the values with the factors in them, and the factors. They are small.
        output: The file.
    """

    constants: Mapping[str, tuple[NDArray[Any], Edit | None]]
    output: Output

    @property
    def step(self) -> str:
        """Name of the step."""
        return "store 16-bit constants"

    def writes(self, constant: Initializer) -> list[str]:
        """Names of the tensors that a call writes."""
        return self.output.with_copies(constant.name)[1:]

    def __call__(self, constant: Initializer) -> None:
        """Write them.

        Raises:
            BismoothError: the constant does not fit into the 16-bit type, or folding made it too small for that.
        """
        name, (values, edit) = constant.name, self.constants[constant.name]
        with self.output.tensors.writing(self.writes(constant)) as writer:
            self.output.narrow(writer, name, lambda: [values], name)
        if edit is not None:
            for dtype in self.output.copies[name]:
                require_kept([values.reshape(1, -1)], (1, values.size), edit, dtype, name)


def _write_rows(
    writer: TensorWriter, name: str, linear: Linear, blocks: Iterable[NDArray[Any]], dtype: np.dtype[Any]
) -> None:
    """Write a weight in the layout that the linear's has, from rows of W [N, K]."""
    if linear.layout == "NK":
        writer.write_pieces(name, blocks)
        return
    columns = ColumnWriter(writer, name, (linear.k, linear.n), dtype)
    for block in blocks:
        columns.add(block)
    columns.close()
