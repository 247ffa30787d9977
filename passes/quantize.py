"""A float graph becomes the graphs and the weight file of a quantized artifact.

Written into the output folder, which already holds the float graph's weight files:

``model.onnx``
    Q/DQ graph that computes in float32 (ONNX Runtime on a CPU).
``model.float16.onnx``, ``model.bfloat16.onnx``
    The same for the recipe's 16-bit compute type (TensorRT).
``reference.onnx``
    The float graph, unchanged.
``folded.onnx``
    The float graph with the smoothing factors folded in, as multiplications on its weights.
``quantized.safetensors``
    INT8 weights, scales and 16-bit weights of both Q/DQ graphs.

Weights pass through memory one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from ..export.safetensors_file import SafetensorsWriter, TensorEntry
from ._gs import Graph, Tensor, make_external, read
from .driver import PassRecord, run_passes
from .fold import Edit, Factors, apply_edit, fold_constants, fold_graph, weight_edits
from .foldcheck import TOLERANCE, check_folds
from .graph import Index, load, save
from .linears import Linear, find_head, find_linears
from .precision import SetPrecision, StoredCast, narrow, store, stored_casts
from .qdq import InsertQdq, UseUnsignedActivations, WeightNames, rescale
from .recipe import Recipe
from .sites import Rejected, Site, find_sites
from .smoothing import Activations, Choice, choose_factors
from .spec import ComputeType, LinearSpec, StaticActivation
from .weights import quantize_weight

WEIGHTS = "quantized.safetensors"
Float = NDArray[np.float32]
Progress = Callable[[str, int, int], None]


class Calibration(Activations, Protocol):
    """What calibration knows of the activations, static ranges included."""

    def limit(self, value: str, activation: StaticActivation, divisor: Float | None) -> float:
        """The range ±limit of a value for a static scale, after its channels were divided by ``divisor`` [K]."""
        ...


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized linear: relative error of its weight, ‖W − Ŵ‖ / ‖W‖ after folding, and its size."""

    name: str
    n: int
    k: int
    weight_error: float


@dataclass(frozen=True)
class QuantizeResult:
    """What was done.

    Attributes:
        graphs: role → file name.
        linears: The quantized linears.
        float_linears: Names of those left in float.
        choices: Per fold site, how it was smoothed.
        rejected: Norms and linears that are no fold site, with the reason.
        fold_errors: Per smoothed site the relative error of the fold in float32.
        content_sha256: SHA-256 over the content of all weights that were read.
        passes: What was run on the graphs.
    """

    graphs: dict[str, str]
    linears: tuple[QuantizedLinear, ...]
    float_linears: tuple[str, ...]
    choices: tuple[Choice, ...]
    rejected: tuple[Rejected, ...]
    fold_errors: dict[str, float]
    content_sha256: str
    passes: tuple[PassRecord, ...]


@dataclass(frozen=True)
class FoldConstants:
    """Fold smoothing factors into gammas, betas and biases; weights follow when they are stored.

    Needs: the constants that ``edits`` names. Promises: those constants, and nothing else, are replaced.
    """

    edits: Mapping[str, Edit] = field(compare=False)
    name: ClassVar[str] = "fold"

    def apply(self, graph: Graph) -> None:
        fold_constants(graph, self.edits)


@dataclass
class _Plan:
    """Tensors of the new weight file, in order: what each is made of."""

    folder: Path
    declared: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = field(default_factory=dict[str, Any])
    handles: list[tuple[Tensor, str]] = field(default_factory=list[tuple[Tensor, str]])

    def stored(self, name: str, dtype: np.dtype[Any], shape: Sequence[int]) -> Tensor:
        """An initializer for a tensor of the new file; its place is set when all tensors are known."""
        self.declared.setdefault(name, (dtype, tuple(shape)))
        return make_external(name, dtype, shape, self.folder / WEIGHTS, 0)


def quantize_graph(
    source: Path,
    folder: Path,
    recipe: Recipe,
    calibration: Calibration | None,
    progress: Progress = lambda _step, _done, _total: None,
) -> QuantizeResult:
    """Quantize the float32 graph ``source`` by ``recipe`` into ``folder``, where its weight files are already.

    Args:
        source: ``model.onnx`` of a float artifact.
        folder: Where the new files go.
        recipe: What to do with each linear.
        calibration: Statistics of the activations, or None to smooth by the weights alone.
        progress: Called with a step's name, how much of it is done, and how much there is.

    Raises:
        BismoothError: the recipe does not fit the model, needs statistics that are missing, a weight holds NaN or
            overflows the compute type, or a fold changes the function.
    """
    graph = load(source)
    linears = find_linears(graph)
    specs = _specs(recipe, linears, graph)
    sites, rejected = find_sites(graph, linears)
    by_name = {linear.name: linear for linear in linears}
    reader = _Reader(graph)

    def site_done(_: str) -> None:
        state["done"] += 1
        progress("smooth", state["done"], len(sites))

    state = {"done": 0}
    factors, choices = choose_factors(sites, by_name, specs, reader.weight, calibration, site_done)
    fold_errors = _checked_folds(graph, sites, linears, factors, progress)
    edits = weight_edits(sites, factors)
    graphs = {"reference": "reference.onnx", "float32": "model.onnx"}
    save(graph, folder / graphs["reference"])
    if factors:
        folded = graph.copy()
        fold_graph(folded, edits)
        graphs["folded"] = "folded.onnx"
        save(folded, folder / graphs["folded"])
    if recipe.compute_dtype is not ComputeType.FLOAT32:
        role = f"reference_{recipe.compute_dtype}"
        graphs[role] = f"reference.{recipe.compute_dtype}.onnx"
        plain = graph.copy()
        run_passes(plain, [SetPrecision(recipe.compute_dtype.value)])
        save(plain, folder / graphs[role])
    ranges = _ranges(linears, specs, sites, factors, calibration)
    plan = _Plan(folder)
    qdq, records = _lower(graph, linears, specs, edits, ranges, plan)
    narrowed, casts = None, list[StoredCast]()
    if recipe.compute_dtype is not ComputeType.FLOAT32:
        narrowed = qdq.copy()
        records += run_passes(narrowed, [SetPrecision(recipe.compute_dtype.value)])
        graphs[recipe.compute_dtype.value] = f"model.{recipe.compute_dtype.value}.onnx"
        casts = list(stored_casts(narrowed))
    writer = _WeightFile(plan, casts, linears, specs, edits, ranges, reader, recipe.compute_dtype)
    quantized = writer.write(progress)
    writer.place(qdq)
    records += run_passes(qdq, [UseUnsignedActivations()])
    save(qdq, folder / graphs["float32"])
    if narrowed is not None:
        for cast in casts:
            store(narrowed, cast, writer.initializer(cast))
        writer.place(narrowed)
        narrowed.cleanup()
        save(narrowed, folder / graphs[recipe.compute_dtype.value])
    return QuantizeResult(
        graphs=graphs,
        linears=quantized,
        float_linears=tuple(linear.name for linear in linears if not specs[linear.name].quantized),
        choices=tuple(choices),
        rejected=tuple(rejected),
        fold_errors=fold_errors,
        content_sha256=reader.digest(),
        passes=records,
    )


def _specs(recipe: Recipe, linears: Sequence[Linear], graph: Graph) -> dict[str, LinearSpec]:
    """The specification of each linear; those that share their weight with something else stay float."""
    if not linears:
        raise BismoothError(
            "the graph has no linear layers. Expected products of an activation and a constant weight matrix."
        )
    heads = {linear.name for linear in find_head(linears, graph)}
    return recipe.resolve([linear.name for linear in linears], heads)


def _checked_folds(
    graph: Graph, sites: Sequence[Site], linears: Sequence[Linear], factors: Factors, progress: Progress
) -> dict[str, float]:
    done = 0

    def site_done(_: str) -> None:
        nonlocal done
        done += 1
        progress("check folds", done, len(factors))

    errors = check_folds(graph, sites, factors, site_done)
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise BismoothError(
                f"{name}: folding the smoothing factors here changes the function: expected a relative error of at most "
                f"{TOLERANCE:g}, got {error:.3g}. Leave the site out with a layer rule (smoothing: null), and report it."
            )
    return errors


def _ranges(
    linears: Sequence[Linear],
    specs: Mapping[str, LinearSpec],
    sites: Sequence[Site],
    factors: Factors,
    calibration: Calibration | None,
) -> dict[str, float]:
    """Static ranges by value name, for the values that a statically quantized linear reads."""
    ranges: dict[str, float] = {}
    divisors = _divisors(sites, factors)
    for linear in linears:
        activation = specs[linear.name].activations
        if not isinstance(activation, StaticActivation) or linear.x in ranges:
            continue
        if calibration is None:
            raise BismoothError(
                f"{linear.name}: its recipe has a static activation scale, which comes from calibration. Expected statistics, "
                "got none. Run 'bismooth calibrate' first, or choose a recipe with per-token activations."
            )
        ranges[linear.x] = calibration.limit(linear.x, activation, divisors.get(linear.name))
    return ranges


def _divisors(sites: Sequence[Site], factors: Factors) -> dict[str, Float]:
    """By linear name, what its input channels were divided by."""
    divisors: dict[str, Float] = {}
    for site in sites:
        if site.name not in factors:
            continue
        for consumer in site.consumers:
            s = np.where(consumer.labels < 0, 1.0, factors[site.name][consumer.labels]).astype(np.float32)
            divisors[consumer.linear] = divisors.get(consumer.linear, np.float32(1)) * s
    return divisors


def _lower(
    graph: Graph,
    linears: Sequence[Linear],
    specs: Mapping[str, LinearSpec],
    edits: Mapping[str, Edit],
    ranges: Mapping[str, float],
    plan: _Plan,
) -> tuple[Graph, tuple[PassRecord, ...]]:
    """The float32 Q/DQ graph: the whole lowering, step by step."""
    weights = {linear.weight for linear in linears}
    records = run_passes(
        graph,
        [
            FoldConstants({name: edit for name, edit in edits.items() if name not in weights}),
            StoreFolded([linear for linear in linears if not specs[linear.name].quantized], edits, plan.stored),
            InsertQdq(linears, specs, ranges, plan.stored),
        ],
    )
    return graph, records


@dataclass(frozen=True)
class StoreFolded:
    """Let linears that stay float, and whose weights were folded into, read new weights.

    Needs: float linears. Promises: only weights with an edit are replaced, by float32 [N, K] or [K, N] as they were.
    """

    linears: Sequence[Linear]
    edits: Mapping[str, Edit] = field(compare=False)
    stored: Callable[[str, np.dtype[Any], Sequence[int]], Tensor] = field(compare=False)
    name: ClassVar[str] = "store folded weights"

    def apply(self, graph: Graph) -> None:
        index = Index.of(graph)
        for linear in self.linears:
            if linear.weight not in self.edits:
                continue
            old = index.values[linear.weight]
            shape = (linear.n, linear.k) if linear.layout == "NK" else (linear.k, linear.n)
            new = self.stored(folded_name(linear), np.dtype(np.float32), shape)
            for node in index.users(linear.weight):
                target = node.outputs[0].outputs if node.op == "Cast" else [node]
                source = node.outputs[0] if node.op == "Cast" else old
                for reader in list(target):
                    for place, tensor in enumerate(reader.inputs):
                        if tensor is source:
                            reader.inputs[place] = new
        graph.cleanup()


def folded_name(linear: Linear) -> str:
    """Name of the stored float weight of a linear that smoothing factors were folded into."""
    return f"{linear.name}.weight.folded"


class _Reader:
    """Reads weights one at a time and hashes what it reads."""

    def __init__(self, graph: Graph) -> None:
        self._values = Index.of(graph).values
        self._hashes: dict[str, str] = {}

    def weight(self, linear: Linear) -> Float:
        """W as float32 [N, K]."""
        values = self.raw(linear.weight).astype(np.float32, copy=False)
        return np.ascontiguousarray(values.T) if linear.layout == "KN" else values

    def raw(self, name: str) -> NDArray[Any]:
        values = read(self._values[name])
        if name not in self._hashes:
            self._hashes[name] = hashlib.sha256(
                memoryview(np.ascontiguousarray(values).view(np.uint8).reshape(-1))
            ).hexdigest()
        return values

    def has(self, name: str) -> bool:
        return name in self._values

    def digest(self) -> str:
        """SHA-256 over the hashes of all tensors read so far, by name."""
        lines = [f"{name} {digest}" for name, digest in sorted(self._hashes.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _WeightFile:
    """Computes and writes the new weight file, one tensor in memory at a time."""

    def __init__(
        self,
        plan: _Plan,
        casts: Sequence[StoredCast],
        linears: Sequence[Linear],
        specs: Mapping[str, LinearSpec],
        edits: Mapping[str, Edit],
        ranges: Mapping[str, float],
        reader: _Reader,
        compute: ComputeType,
    ) -> None:
        self._plan, self._specs, self._edits, self._ranges, self._reader = plan, specs, edits, ranges, reader
        self._compute = compute
        self._linears = {linear.name: linear for linear in linears}
        self._casts = {cast.initializer.name: cast for cast in casts}
        self._entries: dict[str, TensorEntry] = {}

    def initializer(self, cast: StoredCast) -> Tensor:
        """The stored 16-bit tensor that takes the place of a cast."""
        name = _narrow_name(cast)
        entry = self._entries[name]
        return make_external(name, cast.dtype, entry.shape, self._plan.folder / WEIGHTS, entry.offset)

    def place(self, graph: Graph) -> None:
        """Point the initializers of the new file at their bytes."""
        index = Index.of(graph)
        for name, entry in self._entries.items():
            if name not in index.values:
                continue
            dtype, shape = self._plan.declared.get(name, (None, ()))
            if dtype is None:
                continue
            new = make_external(name, dtype, shape, self._plan.folder / WEIGHTS, entry.offset)
            old = index.values[name]
            for node in index.users(name):
                for place, tensor in enumerate(node.inputs):
                    if tensor is old:
                        node.inputs[place] = new

    def write(self, progress: Progress) -> tuple[QuantizedLinear, ...]:
        """Write all tensors; returns what became of the quantized linears."""
        declared = [(name, dtype, shape) for name, (dtype, shape) in self._plan.declared.items()]
        declared += [(_narrow_name(c), c.dtype, tuple(int(s) for s in c_shape(c))) for c in self._casts.values()]
        declared.sort(key=lambda item: -int(np.prod(item[2], dtype=np.int64)) * item[1].itemsize)
        done: list[QuantizedLinear] = []
        total = len(self._linears) + len(self._casts)
        with SafetensorsWriter(self._plan.folder / WEIGHTS, declared) as writer:
            self._entries = dict(writer.entries)
            for number, linear in enumerate(self._linears.values()):
                if self._specs[linear.name].quantized:
                    done.append(self._write_quantized(writer, linear))
                elif folded_name(linear) in writer.entries:
                    self._write_folded(writer, linear)
                progress("write weights", number + 1, total)
            for number, cast in enumerate(self._casts.values()):
                self._write_narrow(writer, cast)
                progress("write weights", len(self._linears) + number + 1, total)
        return tuple(done)

    def _folded(self, linear: Linear) -> Float:
        """W after folding, float32 [N, K]."""
        weight = self._reader.weight(linear)
        edit = self._edits.get(linear.weight)
        return weight if edit is None else apply_edit(weight, edit, "NK")

    def _write_quantized(self, writer: SafetensorsWriter, linear: Linear) -> QuantizedLinear:
        spec, names = self._specs[linear.name], WeightNames.of(linear)
        weight_only = spec.activations is None
        storage = _storage(self._compute) if weight_only else None
        quantized = quantize_weight(self._folded(linear), linear.weight, storage)
        writer.write(names.values, np.ascontiguousarray(quantized.values.T))
        limit = self._ranges.get(linear.x) if isinstance(spec.activations, StaticActivation) else None
        scale = quantized.scale if weight_only else rescale(quantized.scale, limit)
        writer.write(names.scale, scale)
        if (cast := self._casts.pop(names.scale, None)) is not None:
            writer.write(_narrow_name(cast), narrow(scale, cast.dtype, names.scale))
        return QuantizedLinear(linear.name, linear.n, linear.k, quantized.error)

    def _write_folded(self, writer: SafetensorsWriter, linear: Linear) -> None:
        weight = self._folded(linear)
        stored = np.ascontiguousarray(weight if linear.layout == "NK" else weight.T)
        writer.write(folded_name(linear), stored)
        if (cast := self._casts.pop(folded_name(linear), None)) is not None:
            writer.write(_narrow_name(cast), narrow(stored, cast.dtype, linear.weight))

    def _write_narrow(self, writer: SafetensorsWriter, cast: StoredCast) -> None:
        name = cast.initializer.name
        values = self._reader.raw(name) if self._reader.has(name) else read(cast.initializer)
        writer.write(_narrow_name(cast), narrow(values, cast.dtype, name))


def c_shape(cast: StoredCast) -> tuple[int, ...]:
    """Shape of a cast initializer."""
    from ._gs import shape_of

    return tuple(int(str(size)) for size in shape_of(cast.initializer) or ())


def _narrow_name(cast: StoredCast) -> str:
    return f"{cast.initializer.name}.{cast.dtype.name}"


def _storage(compute: ComputeType) -> np.dtype[Any] | None:
    import ml_dtypes

    types: dict[ComputeType, np.dtype[Any]] = {
        ComputeType.FLOAT16: np.dtype(np.float16),
        ComputeType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    }
    return types.get(compute)
