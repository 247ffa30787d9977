"""The weight file of a quantized artifact: declared while the graphs are made, then computed tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..export.hashing import WrittenHash
from ..export.placed_tensors import PlacedTensors
from ..export.replacing import link_or_move, replacing
from ..export.safetensors_file import TensorEntry
from ._gs import Graph, Tensor, make_external, read, shape_of
from .executor import LOCAL, Executor, each
from .fold import FOLDED, Edit
from .fold_passes import folded_name
from .graph import Index
from .linears import Linear
from .precision import StoredCast, store
from .progress import Counter, Progress
from .weight_tasks import (
    CopyMade,
    CopyNarrow,
    Initializer,
    LayOut,
    Layout,
    Output,
    QuantizedLinear,
    QuantizeLinear,
    StoreFoldedWeight,
    WeightSources,
    copy_name,
)


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file to come. Its tensors can be referred to from graphs before there is anything in it.

    Attributes:
        path: Where it will be.
        declared: Type and shape of its tensors.
        entries: Where each is in the file; empty until :func:`write_weights` has run.
        grown: Where it grows, over several runs if need be; None: under a temporary name, in one.
    """

    path: Path
    declared: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = field(default_factory=dict[str, Any])
    entries: dict[str, TensorEntry] = field(default_factory=dict[str, TensorEntry])
    grown: Path | None = None

    def declare(self, name: str, dtype: np.dtype[Any], shape: Sequence[int]) -> Tensor:
        """An initializer for a tensor of the file; :meth:`place` sets its offset when that is known."""
        self.declared.setdefault(name, (dtype, tuple(shape)))
        return make_external(name, dtype, shape, self.path, 0)

    @contextmanager
    def growing(self) -> Generator[Path]:
        """Where it is to be written; at the end it is in place as well.

        There it is a second name of what has grown, or its new one where the file system has no links.
        """
        if self.grown is None:
            with replacing(self.path) as path:
                yield path
            return
        yield self.grown
        link_or_move(self.grown, self.path)

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
            store(graph, cast, self._initializer(copy_name(cast.initializer.name, cast.dtype)))
        self.place(graph)
        graph.cleanup()

    def _initializer(self, name: str) -> Tensor:
        dtype, shape = self.declared[name]
        return make_external(name, dtype, shape, self.path, self.entries[name].offset)


def write_weights(
    file: WeightFile,
    sources: WeightSources,
    casts: Sequence[StoredCast],
    progress: Progress,
    executor: Executor = LOCAL,
) -> tuple[tuple[QuantizedLinear, ...], str]:
    """Compute and write all tensors of the file, a few in memory at a time.

    Args:
        file: Tensors of linears are declared; those of ``casts`` are added.
        sources: What they are made from.
        casts: The initializers that the 16-bit graph casts: each is stored in that type as well.
        progress: Called with a step's name, how much of it is done, and how much there is.
        executor: Does the work.

    Returns:
        What became of the quantized linears, and the SHA-256 of the file.

    Raises:
        BismoothError: a weight holds NaN or infinity, or does not fit into the 16-bit type, or
            was made too small for it by folding.
        ValueError: a tensor is declared that nothing writes.
    """
    for cast in casts:
        name = copy_name(cast.initializer.name, cast.dtype)
        file.declare(name, cast.dtype, tuple(int(str(dim)) for dim in shape_of(cast.initializer) or ()))
    largest_first = sorted(file.declared.items(), key=lambda item: -prod(item[1][1]) * item[1][0].itemsize)
    with file.growing() as path:
        layout = Layout(path.name, [(name, *declared) for name, declared in largest_first])
        for _ in executor.map(LayOut(path.parent), [layout]):
            pass
        tensors = PlacedTensors.open(path, layout.tensors)
        file.entries.update(tensors.entries)
        ends = {name: entry.offset + entry.length for name, entry in tensors.entries.items()}
        with WrittenHash(path, ends) as written:
            done = _Work.of(sources, tensors, casts).run(executor, progress, written.add)
            return done, written.hexdigest()


@dataclass(frozen=True, eq=False)
class _Work:
    """All that is to be written, and by which task.

    Attributes:
        quantize: Writes the weights of ``quantized``.
        fold: Writes those of ``folded``.
        copy: Writes copies of ``copied``, initializers of the source.
        make: Writes copies of ``made``, constants that folding made.
    """

    quantize: QuantizeLinear
    quantized: list[Linear]
    fold: StoreFoldedWeight
    folded: list[Linear]
    copy: CopyNarrow
    copied: list[Initializer]
    make: CopyMade
    made: list[Initializer]

    @staticmethod
    def of(sources: WeightSources, tensors: PlacedTensors, casts: Sequence[StoredCast]) -> _Work:
        copies: dict[str, list[np.dtype[Any]]] = {}
        for cast in casts:
            copies.setdefault(cast.initializer.name, []).append(cast.dtype)
        output = Output(tensors, copies)
        quantized = [linear for linear in sources.linears if sources.specs[linear.name].quantized]
        rest = [linear for linear in sources.linears if not sources.specs[linear.name].quantized]
        others = {
            cast.initializer.name: cast.initializer for cast in casts if cast.initializer.name not in tensors.entries
        }
        made = {name: tensor for name, tensor in others.items() if name not in sources.reader}
        constants = {name: (read(tensor), _edit_of(name, sources.edits)) for name, tensor in made.items()}
        return _Work(
            quantize=QuantizeLinear(sources, output),
            quantized=quantized,
            fold=StoreFoldedWeight(sources, output),
            folded=[linear for linear in rest if folded_name(linear) in tensors.entries],
            copy=CopyNarrow(sources.reader, output),
            copied=[Initializer(name) for name in others if name in sources.reader],
            make=CopyMade(constants, output),
            made=list(map(Initializer, made)),
        )

    def run(
        self, executor: Executor, progress: Progress, on_written: Callable[[Iterable[str]], None]
    ) -> tuple[QuantizedLinear, ...]:
        """Write all, about in the order of the file; ``on_written`` is called with the names of what is there."""
        self._require_all()
        total = len(self.quantized) + len(self.folded) + len(self.copied) + len(self.made)
        count = Counter(progress, "write weights", total)
        for item, _ in each(executor, self.copy, self.copied, count):
            on_written(self.copy.writes(item))
        for linear, _ in each(executor, self.fold, self.folded, count):
            on_written(self.fold.writes(linear))
        done: dict[str, QuantizedLinear] = {}
        for linear, result in each(executor, self.quantize, sorted(self.quantized, key=_size, reverse=True), count):
            done[linear.name] = result
            on_written(self.quantize.writes(linear))
        for constant, _ in each(executor, self.make, self.made, count):
            on_written(self.make.writes(constant))
        return tuple(done[linear.name] for linear in self.quantized)

    def _require_all(self) -> None:
        written = [name for linear in self.quantized for name in self.quantize.writes(linear)]
        written += [name for linear in self.folded for name in self.fold.writes(linear)]
        written += [name for item in self.copied for name in self.copy.writes(item)]
        written += [name for item in self.made for name in self.make.writes(item)]
        if left := self.copy.output.tensors.entries.keys() - set(written):
            raise ValueError(f"{len(left)} declared tensors are not written: {', '.join(sorted(left)[:3])}")


def _edit_of(name: str, edits: Mapping[str, Edit]) -> Edit | None:
    """The factors in a constant that folding made."""
    return edits.get(name.removesuffix(FOLDED)) if name.endswith(FOLDED) else None


def _size(linear: Linear) -> int:
    return linear.n * linear.k
