"""The weight file of a quantized artifact: declared while the graphs are made, then computed tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..export.safetensors_file import SafetensorsWriter, TensorEntry
from ._gs import Graph, Tensor, make_external, read, read_pieces, shape_of
from .fold import FOLDED, Edit, apply_edit
from .fold_passes import folded_name
from .fold_underflow import require_kept
from .graph import Index
from .groups import without_walls
from .linears import Linear
from .parallel import ordered_map
from .precision import NARROW_TYPES, StoredCast, narrow_pieces, store
from .progress import Progress
from .qdq import Product, rescale
from .spec import ComputeType, LinearSpec, PerGroup, PerMagnitude, StaticActivation
from .static_ranges import StaticRanges
from .weight_reader import WeightReader
from .weights import QuantizedWeight, in_two_digits, joined, quantize_weight, row_chunks, weight_error

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

    def folded(self, linear: Linear) -> Float:
        """W after folding, float32 [N, K]."""
        weight = self.reader.weight(linear)
        edit = self.edits.get(linear.weight)
        return weight if edit is None else apply_edit(weight, edit, "NK")


def folded_blocks(
    reader: WeightReader, linear: Linear, elements: int | None = None, *, edits: Mapping[str, Edit]
) -> Iterator[Float]:
    """W of a linear with the smoothing factors folded in, some rows at a time: float32 [.., K]."""
    edit, start = edits.get(linear.weight), 0
    for block in reader.blocks(linear, elements):
        stop = start + len(block)
        yield block if edit is None else apply_edit(block, edit.of_rows(slice(start, stop)), "NK")
        start = stop


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file to come. Its tensors can be referred to from graphs before there is anything in it.

    Attributes:
        path: Where it will be.
        declared: Type and shape of its tensors.
        entries: Where each is in the file; empty until :func:`write_weights` has run.
    """

    path: Path
    declared: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = field(default_factory=dict[str, Any])
    entries: dict[str, TensorEntry] = field(default_factory=dict[str, TensorEntry])

    def declare(self, name: str, dtype: np.dtype[Any], shape: Sequence[int]) -> Tensor:
        """An initializer for a tensor of the file; :meth:`place` sets its offset when that is known."""
        self.declared.setdefault(name, (dtype, tuple(shape)))
        return make_external(name, dtype, shape, self.path, 0)

    def place(self, graph: Graph) -> None:
        """Point the graph's initializers that are tensors of the file at their bytes."""
        index = Index.of(graph)
        for name in self.entries.keys() & index.values.keys():
            old, new = index.values[name], self._initializer(name)
            for node in index.users(name):
                for place, tensor in enumerate(node.inputs):
                    if tensor is old:
                        node.inputs[place] = new

    def place_casts(self, graph: Graph, casts: Sequence[StoredCast]) -> None:
        """Put the stored 16-bit tensors in the place of the casts of this graph, and place all others."""
        for cast in casts:
            store(graph, cast, self._initializer(narrow_name(cast)))
        self.place(graph)
        graph.cleanup()

    def _initializer(self, name: str) -> Tensor:
        dtype, shape = self.declared[name]
        return make_external(name, dtype, shape, self.path, self.entries[name].offset)


def narrow_name(cast: StoredCast) -> str:
    """Name of the stored 16-bit copy of an initializer."""
    return f"{cast.initializer.name}.{cast.dtype.name}"


def write_weights(
    file: WeightFile, sources: WeightSources, casts: Sequence[StoredCast], progress: Progress
) -> tuple[QuantizedLinear, ...]:
    """Compute and write all tensors of the file, a few in memory at a time.

    Args:
        file: Tensors of linears are declared; those of ``casts`` are added.
        sources: What they are made from.
        casts: The initializers that the 16-bit graph casts: each is stored in that type as well.
        progress: Called with a step's name, how much of it is done, and how much there is.

    Returns:
        What became of the quantized linears.

    Raises:
        BismoothError: a weight holds NaN or infinity, or does not fit into the 16-bit type, or
            was made too small for it by folding.
    """
    for cast in casts:
        file.declare(narrow_name(cast), cast.dtype, tuple(int(str(dim)) for dim in shape_of(cast.initializer) or ()))
    largest_first = sorted(file.declared.items(), key=lambda item: -prod(item[1][1]) * item[1][0].itemsize)
    with SafetensorsWriter(file.path, [(name, *declared) for name, declared in largest_first]) as writer:
        file.entries.update(writer.entries)
        wanted: dict[str, list[StoredCast]] = {}
        for cast in casts:
            wanted.setdefault(cast.initializer.name, []).append(cast)
        return _Tensors(sources, writer, wanted).write(progress)


@dataclass(frozen=True, eq=False)
class _Tensors:
    """Computes the tensors of the file; ``casts`` loses those whose 16-bit copy is written."""

    sources: WeightSources
    writer: SafetensorsWriter
    casts: dict[str, list[StoredCast]]

    def write(self, progress: Progress) -> tuple[QuantizedLinear, ...]:
        done: list[QuantizedLinear] = []
        linears, total = self.sources.linears, len(self.sources.linears) + len(self.casts)
        quantized = [linear for linear in linears if self.sources.specs[linear.name].quantized]
        for linear, weight in zip(quantized, ordered_map(self._quantize, quantized), strict=True):
            done.append(self._write_quantized(linear, weight))
            progress("write weights", len(done), total)
        for linear in linears:
            if folded_name(linear) in self.writer.entries and not self.sources.specs[linear.name].quantized:
                self._folded(linear)
        progress("write weights", len(linears), total)
        for name, casts in list(self.casts.items()):
            reader = self.sources.reader
            tensor = reader.tensor(name) if name in reader else casts[0].initializer
            self._narrowed(name, lambda tensor=tensor: read_pieces(tensor), name)
            if (edit := self.sources.edits.get(name.removesuffix(FOLDED))) is not None and name.endswith(FOLDED):
                _require_kept(read(tensor), edit, casts, name)
            progress("write weights", total - len(self.casts), total)
        progress("write weights", total, total)
        return tuple(done)

    def _quantize(self, linear: Linear) -> list[QuantizedWeight]:
        """The weight of each of the linear's products, some rows of W at a time."""
        spec = self.sources.specs[linear.name]
        storage = None if spec.has_rescale else NARROW_TYPES.get(self.sources.compute)
        group = spec.groups.size if isinstance(spec.groups, PerGroup) else None
        quantized: list[list[QuantizedWeight]] = []
        first = 0
        for block in folded_blocks(self.sources.reader, linear, edits=self.sources.edits):
            make = partial(quantize_weight, name=linear.weight, storage=storage, group=group, first=first)
            if isinstance(spec.groups, PerMagnitude):
                rest, *walls = without_walls(block, spec.groups.walls)
                pairs = [(part, make(part)) for part in walls]
                two = spec.groups.wall_bits == 16
                digits = (in_two_digits(*pair) if two else pair[1:] for pair in pairs)
                quantized.append([make(rest), *chain.from_iterable(digits)])
            else:
                quantized.append([make(block)])
            first += len(block)
        return [joined(blocks) for blocks in zip(*quantized, strict=True)]

    def _write_quantized(self, linear: Linear, quantized: Sequence[QuantizedWeight]) -> QuantizedLinear:
        spec = self.sources.specs[linear.name]
        products = Product.of(linear, spec.groups)
        for product, part in zip(products, quantized, strict=True):
            limits = self._limits(linear, spec, product)
            self.writer.write(product.values, np.moveaxis(part.values, 0, -1))
            scale = rescale(part.scale, limits) if spec.has_rescale else part.scale
            stored = scale.T.reshape(product.scale_shape)
            self.writer.write(product.scale, stored)
            self._narrowed(product.scale, lambda stored=stored: _rows(stored), linear.weight)
        return QuantizedLinear(
            name=linear.name,
            node=linear.node,
            n=linear.n,
            k=linear.k,
            int8=spec.activations is not None,
            weight_error=weight_error(quantized),
            group=spec.groups.size if isinstance(spec.groups, PerGroup) else None,
            walls=spec.groups.walls if isinstance(spec.groups, PerMagnitude) else (),
            wall_nodes=tuple(product.node for product in products[1:]),
        )

    def _limits(self, linear: Linear, spec: LinearSpec, product: Product) -> Sequence[float] | None:
        """The static ranges of what a product reads: one, or one per group of a size."""
        if not isinstance(spec.activations, StaticActivation):
            return None
        limits = self.sources.ranges[linear.x, spec.groups]
        return limits if isinstance(spec.groups, PerGroup) else [limits[product.group]]

    def _folded(self, linear: Linear) -> None:
        weight = self.sources.folded(linear)
        stored = weight if linear.layout == "NK" else weight.T
        self.writer.write(folded_name(linear), stored)
        casts = self.casts.get(folded_name(linear), ())
        self._narrowed(folded_name(linear), lambda: _rows(stored), linear.weight)
        _require_kept(weight, self.sources.edits[linear.weight], casts, linear.weight)

    def _narrowed(self, name: str, pieces: Callable[[], Iterable[NDArray[Any]]], origin: str) -> None:
        """Write the copies of a tensor that the 16-bit graph asks for; ``origin`` names it in messages."""
        for cast in self.casts.pop(name, ()):
            self.writer.write_pieces(narrow_name(cast), narrow_pieces(pieces(), cast.dtype, origin))


def _rows(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """A tensor of one axis or more, some rows at a time."""
    for part in row_chunks((len(values), values[:1].size)):
        yield values[part]


def _require_kept(folded: NDArray[Any], edit: Edit, casts: Sequence[StoredCast], name: str) -> None:
    for dtype in {cast.dtype for cast in casts}:
        require_kept(folded, edit, dtype, name)
