"""The two TensorRT packages that one builder serves, and how they differ."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..export.errors import BismoothError

_TURING = 75


@dataclass(frozen=True)
class Runtime:
    """A TensorRT package.

    Attributes:
        name: what users call it; also the extra of this package that installs it.
        module: its Python module.
        title: its name in messages.
        ahead_of_time: builds without a GPU for a list of compute capabilities; otherwise for the GPU of this machine.
    """

    name: str
    module: str
    title: str
    ahead_of_time: bool


TENSORRT_RTX = Runtime("tensorrt-rtx", "tensorrt_rtx", "TensorRT-RTX", ahead_of_time=True)
TENSORRT = Runtime("tensorrt", "tensorrt", "TensorRT", ahead_of_time=False)
RUNTIMES = {runtime.name: runtime for runtime in (TENSORRT_RTX, TENSORRT)}


def require_package(runtime: Runtime) -> None:
    """Fail early if the package is not installed.

    Raises:
        BismoothError: it is not.
    """
    if importlib.util.find_spec(runtime.module) is None:
        raise BismoothError(
            f"{runtime.name}: the Python package '{runtime.module}' is not installed. Install it with: "
            f"pip install 'bismooth[{runtime.name}]'"
        )


def load_module(runtime: Runtime) -> Any:
    """The runtime's Python module.

    Raises:
        BismoothError: it is not installed, or its libraries cannot be loaded.
    """
    require_package(runtime)
    try:
        return importlib.import_module(runtime.module)
    except (ImportError, OSError) as error:
        raise BismoothError(
            f"{runtime.name}: the Python package '{runtime.module}' is installed but cannot be loaded: {error}. "
            f"Reinstall it with: pip install --force-reinstall 'bismooth[{runtime.name}]'"
        ) from error


def known_capabilities(trt: Any) -> tuple[int, ...]:
    """What the module of an ahead-of-time runtime can build for."""
    names: list[str] = list(trt.ComputeCapability.__members__)
    return tuple(int(name[2:]) for name in names if re.fullmatch(r"SM\d+", name))


def check_capabilities(runtime: Runtime, requested: Sequence[int], known: Iterable[int]) -> tuple[int, ...]:
    """The compute capabilities to build for, without repetitions.

    Args:
        runtime: the package.
        requested: what the user asks for.
        known: what the installed version can build for.

    Raises:
        BismoothError: none for an ahead-of-time build, any for another, an unknown one, or 75 together with others.
    """
    if not runtime.ahead_of_time:
        if requested:
            raise BismoothError(
                f"{runtime.name}: expected no compute capabilities, got {_join(requested)}. "
                f"It builds for the GPU of this machine; leave them out, or build with {TENSORRT_RTX.name}."
            )
        return ()
    names = _join(sorted(known))
    if not requested:
        raise BismoothError(
            f"{runtime.name}: no compute capability was given. It builds ahead of time, so name the GPUs to build for. "
            f"Expected some of: {names}."
        )
    for capability in requested:
        if capability not in known:
            raise BismoothError(f"{runtime.name}: unknown compute capability {capability}. Expected one of: {names}.")
    unique = tuple(dict.fromkeys(requested))
    if _TURING in unique and len(unique) > 1:
        others = _join(capability for capability in unique if capability != _TURING)
        raise BismoothError(
            f"{runtime.name}: compute capability 75 cannot share an engine with others, got 75 and {others}. "
            "Build one engine for 75 and one for the others."
        )
    return unique


def _join(capabilities: Iterable[int]) -> str:
    return ", ".join(map(str, capabilities))
