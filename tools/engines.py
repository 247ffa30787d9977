"""Engines by name: their builders, the graph that each takes, and the check before a build."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..engines.base import EngineBuilder, Logits, Profile, Span
from ..engines.linears import summarize
from ..engines.null import NullBuilder
from ..engines.onnxruntime_build import OnnxRuntimeBuilder
from ..engines.tensorrt import TENSORRT, TENSORRT_RTX, TensorRTBuilder
from ..engines.tensorrt_runtime import check_capabilities, known_capabilities, load_module, require_package
from ..export.artifact import Artifact
from ..export.errors import BismoothError
from ..export.graph_names import PAST_LENGTH, TOTAL, has_caches
from ..passes.lint import Severity, Target, lint

Sizes = tuple[int, int, int]
"""Minimum, optimum and maximum of a dimension."""

_BUILDERS: dict[str, EngineBuilder] = {
    "tensorrt-rtx": TensorRTBuilder(TENSORRT_RTX),
    "tensorrt": TensorRTBuilder(TENSORRT),
    "onnxruntime": OnnxRuntimeBuilder(),
    "null": NullBuilder(),
}
ENGINES = tuple(_BUILDERS)
CAPACITY = 2048
"""Positions that the caches of an engine hold by default, if the model takes as many."""

_SHOWN = 5
_NO_CAPABILITIES = {
    "tensorrt": "it builds for the GPU of this machine",
    "onnxruntime": "nothing in it depends on a GPU",
}


def find_builder(engine: str) -> EngineBuilder:
    """The builder of an engine; raises :class:`BismoothError` naming those there are."""
    if engine not in _BUILDERS:
        raise BismoothError(f"engine {engine!r}: Expected one of {', '.join(_BUILDERS)}.")
    return _BUILDERS[engine]


def require_engine(engine: str) -> None:
    """Raise :class:`BismoothError` now if the engine is unknown or its package is not installed."""
    builder = find_builder(engine)
    if isinstance(builder, TensorRTBuilder):
        require_package(builder.runtime)


def engine_name(engine: str, capabilities: Sequence[int], split_blocks: int | None = None) -> str:
    """Name of the folder of an engine, or of a chain: ``tensorrt-rtx-sm86-sm89``, ``tensorrt-rtx-sm86-sm89-chain4``."""
    chain = [] if split_blocks is None else [f"chain{split_blocks}"]
    return "-".join([engine, *(f"sm{capability}" for capability in capabilities), *chain])


def gather_sizes(batch: Sizes | None, sequence: Sizes | None, dims: Mapping[str, Sizes] | None) -> dict[str, Sizes]:
    """The sizes that were asked for, by symbolic name of the dimension.

    Raises:
        BismoothError: a dimension has sizes twice.
    """
    short = {name: sizes for name, sizes in (("batch", batch), ("sequence", sequence)) if sizes is not None}
    if twice := sorted(short.keys() & (dims or {}).keys()):
        raise BismoothError(f"--dim {twice[0]}: got sizes in --{twice[0]} too. Expected one of them.")
    return {**short, **(dims or {})}


def check_options(
    engine: str,
    capabilities: Sequence[int],
    sizes: Mapping[str, Sizes],
    capacity: int | None = None,
    logits: Logits | None = None,
) -> None:
    """Refuse what the engine could only ignore, and what it cannot do without.

    Raises:
        BismoothError: an option does not fit the engine.
    """
    if engine == "tensorrt-rtx":
        if not capabilities:
            raise BismoothError(
                "tensorrt-rtx: builds ahead of time for named compute capabilities. "
                "Expected --capability 86 89 …, got none."
            )
        check_capabilities(TENSORRT_RTX, capabilities, known_capabilities(load_module(TENSORRT_RTX)))
    if capabilities and engine in _NO_CAPABILITIES:
        given = " ".join(map(str, capabilities))
        raise BismoothError(
            f"--capability {given}: has no effect on engine {engine}: {_NO_CAPABILITIES[engine]}. Leave it out."
        )
    given = [*_options(sizes), *(["--capacity"] if capacity is not None else [])]
    if given and not has_profile(engine):
        raise BismoothError(
            f"{', '.join(given)}: has no effect on engine {engine}, which takes inputs of any size. Leave it out."
        )
    if logits is not None and engine != "onnxruntime":
        raise BismoothError(
            f"--logits {logits}: has no effect on engine {engine}, whose decoder chooses positions in each run. "
            "Leave it out."
        )


def has_profile(engine: str) -> bool:
    """Whether an engine is built for certain sizes of its inputs."""
    return engine != "onnxruntime"


def find_profile(
    graph: Path, sizes: Mapping[str, Sizes], positions: int | None = None, capacity: int | None = None
) -> Profile:
    """``sizes`` for the dynamic dimensions of ``graph``, and those of the profile's defaults that are not given.

    Args:
        graph: what is built.
        sizes: minimum, optimum and maximum by dimension.
        positions: the longest sequence that the model takes, which bounds the defaults.
        capacity: positions that the caches of a graph hold; :data:`CAPACITY` by default.

    Raises:
        BismoothError: sizes for a dimension that the graph does not have, or none for one that it has; sequences longer
            than the model or the caches take; or a capacity that the model does not take, or without caches.
    """
    inputs = summarize(graph).inputs
    cached = has_caches(inputs)
    dynamic = list(dict.fromkeys(size for shape in inputs.values() for size in shape if isinstance(size, str)))
    choices = [name for name in dynamic if not cached or name not in (PAST_LENGTH, TOTAL)]
    if unknown := [name for name in sizes if name not in choices]:
        raise BismoothError(
            f"{', '.join(_options(unknown))}: the inputs of {graph} have no dynamic dimension {unknown[0]!r}. "
            f"Expected one of: {', '.join(choices) or 'none, all sizes are fixed'}."
        )
    if capacity is not None and not cached:
        raise BismoothError(
            f"--capacity {capacity}: has no effect on {graph}, which has no caches. Leave it out, or export the model "
            "with --kv-cache."
        )
    longest = sizes.get("sequence", (0, 0, 0))[2]
    _check_positions(sizes, longest, positions, capacity)
    if cached and capacity is None:
        capacity = max(longest, min(positions or CAPACITY, CAPACITY))
    spans = _default_spans(min((bound for bound in (positions, capacity) if bound is not None), default=None), cached)
    spans |= {name: Span(*triple) for name, triple in sizes.items()}
    for tensor, shape in inputs.items():
        for axis, size in enumerate(shape):
            if size is None:
                raise BismoothError(
                    f"{graph}: dimension {axis} of input {tensor!r} is dynamic and has no name. Expected one, to give "
                    "it sizes by. Name it in the ONNX file and export it again."
                )
            if size in choices and size not in spans:
                raise BismoothError(
                    f"{graph}: the dynamic dimension {size!r} of input {tensor!r} has no sizes. "
                    f"Expected --dim {size}=MIN:OPT:MAX. The dynamic dimensions are: {', '.join(choices)}."
                )
    return Profile(spans.pop("batch"), spans.pop("sequence"), spans, capacity)


def _check_positions(sizes: Mapping[str, Sizes], longest: int, positions: int | None, capacity: int | None) -> None:
    """Refuse sequences of up to ``longest`` positions, or a capacity, that the model or the caches do not take."""
    asked = {f"--sequence {':'.join(map(str, sizes.get('sequence', ())))}": longest, f"--capacity {capacity}": capacity}
    for option, size in asked.items():
        if positions is not None and size is not None and size > positions:
            raise BismoothError(
                f"{option}: the model has {positions} positions (max_position_embeddings). "
                f"Expected a maximum of {positions} or less."
            )
    if capacity is not None and longest > capacity:
        raise BismoothError(
            f"--capacity {capacity}: --sequence asks for {longest} positions at once. Expected {longest} or more."
        )


def _default_spans(longest: int | None, cached: bool) -> dict[str, Span]:
    """Of batch and sequence. With caches, other lengths than the longest are those of short prompts and last pieces."""
    default = Profile()
    optimum = default.sequence.maximum if cached else default.sequence.optimum
    sizes = (default.sequence.minimum, optimum, default.sequence.maximum)
    return {
        "batch": default.batch,
        "sequence": Span(*(size if longest is None else min(size, longest) for size in sizes)),
    }


def _options(names: Iterable[str]) -> list[str]:
    return [f"--{name}" if name in ("batch", "sequence") else f"--dim {name}" for name in names]


def deployment_graph(artifact: Artifact, engine: str) -> Path:
    """The graph that an engine is made of: 16 bits for TensorRT, float32 for ONNX Runtime's CPU provider."""
    narrow = [role for role in ("float16", "bfloat16") if role in artifact.manifest.graphs]
    return artifact.graph(narrow[0] if narrow and engine != "onnxruntime" else "float32")


def lint_for(graph: Path, engine: str, capabilities: Sequence[int]) -> None:
    """Refuse a graph that the engine would reject or misread.

    Raises:
        BismoothError: lists the linter's errors.
    """
    targets: dict[str, Target] = {"tensorrt-rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
    target = targets.get(engine, "onnxruntime")
    errors = [item for item in lint(graph, target=target, capabilities=capabilities) if item.severity is Severity.ERROR]
    if errors:
        shown = "; ".join(str(item) for item in errors[:_SHOWN])
        more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise BismoothError(f"{graph}: {engine} cannot run this graph as meant: {shown}{more}")
