"""Which engine of a bundle runs best on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..export.errors import BismoothError
from .bundle import Bundle, BundledEngine
from .cuda import Device, cuda_available, load_cuda
from .tensorrt_runtime import RUNTIMES, load_module

CPU = "onnxruntime"


@dataclass(frozen=True)
class Choice:
    """An engine, and why it is the one, in a phrase to show: ``onnxruntime on the CPU, since …``."""

    engine: BundledEngine
    reason: str


def choose_engine(bundle: Bundle, name: str | None = None) -> Choice:
    """The engine called ``name``, or the best for this machine: for its GPU if there is one, else for its CPU.

    An engine of TensorRT is taken if it was built for the GPU's compute capability, and the package that runs it is
    installed in the version that built it.

    Raises:
        BismoothError: there is no such engine, or none that runs here; the message says why of each.
    """
    if name is not None:
        return Choice(bundle.engine(name), f"{name}, as asked for")
    engines = [engine for engine in bundle.engines if engine.runtime in RUNTIMES]
    gpu = (cuda_available() or load_cuda().device()) if engines else ""
    why_not: list[str] = []
    for engine in engines:
        found = _on_gpu(engine, gpu)
        if isinstance(found, Choice):
            return found
        why_not.append(f"{engine.name}: {found}")
    for engine in bundle.engines:
        if engine.runtime == CPU:
            return Choice(engine, _on_cpu(engine, why_not))
    raise BismoothError(
        f"{bundle.path}: no engine of this bundle runs here. {'. '.join(why_not)}. Expected a GPU that one was built "
        f"for. Package the artifact with an engine for it, or with {CPU}, which runs on any machine."
    )


def _on_cpu(engine: BundledEngine, why_not: Sequence[str]) -> str:
    return f"{engine.name} on the CPU" + (f" ({'; '.join(why_not)})" if why_not else "")


def _on_gpu(engine: BundledEngine, gpu: Device | str) -> Choice | str:
    """The engine on that GPU, or why it does not run; ``gpu`` may itself be the reason why there is none."""
    if isinstance(gpu, str):
        return gpu
    if gpu.capability not in engine.capabilities:
        built = ", ".join(f"SM{capability}" for capability in engine.capabilities) or "a GPU that is not on record"
        return f"it was built for {built}, and {gpu.name} is SM{gpu.capability}"
    runtime = RUNTIMES[engine.runtime]
    try:
        version: str = load_module(runtime).__version__
    except BismoothError as error:
        return str(error).removesuffix(".")
    if version != engine.version:
        return f"it runs with {runtime.title} {engine.version} alone, and {version} is installed"
    return Choice(engine, f"{engine.name} on {gpu.name} (SM{gpu.capability})")
