"""From a language model to a verified TensorRT INT8 engine.

The stages are functions; each does what the command of that name does and returns a frozen dataclass with ``to_json``.
The commands ``export`` and ``compile`` are ``export_model`` and ``compile_model``: ``bismooth.export`` is a subpackage.

NOTE: importing this module imports nothing else. Names are loaded when they are used first (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engines.bundle import Bundle
    from .engines.sampling import Sampling
    from .export.artifact import Artifact
    from .export.errors import BismoothError, GateError
    from .passes.recipe import Recipe
    from .tools.bench_engines import bench
    from .tools.compare import compare
    from .tools.diagnose import diagnose
    from .tools.generate import generate
    from .tools.package import package
    from .tools.pipeline import compile as compile_model
    from .tools.stages import build, calibrate, export_module, inspect, quantize, verify
    from .tools.stages import export as export_model
    from .tools.standin import standin

    __version__: str

__all__ = [
    "Artifact",
    "BismoothError",
    "Bundle",
    "GateError",
    "Recipe",
    "Sampling",
    "__version__",
    "bench",
    "build",
    "calibrate",
    "compare",
    "compile_model",
    "diagnose",
    "export_model",
    "export_module",
    "generate",
    "inspect",
    "package",
    "quantize",
    "standin",
    "verify",
]

_STAGES = "bismooth.tools.stages"
_HOME = {
    "Artifact": ("bismooth.export.artifact", "Artifact"),
    "BismoothError": ("bismooth.export.errors", "BismoothError"),
    "Bundle": ("bismooth.engines.bundle", "Bundle"),
    "GateError": ("bismooth.export.errors", "GateError"),
    "Recipe": ("bismooth.passes.recipe", "Recipe"),
    "Sampling": ("bismooth.engines.sampling", "Sampling"),
    "bench": ("bismooth.tools.bench_engines", "bench"),
    "build": (_STAGES, "build"),
    "calibrate": (_STAGES, "calibrate"),
    "compare": ("bismooth.tools.compare", "compare"),
    "compile_model": ("bismooth.tools.pipeline", "compile"),
    "diagnose": ("bismooth.tools.diagnose", "diagnose"),
    "export_model": (_STAGES, "export"),
    "export_module": (_STAGES, "export_module"),
    "generate": ("bismooth.tools.generate", "generate"),
    "inspect": (_STAGES, "inspect"),
    "package": ("bismooth.tools.package", "package"),
    "quantize": (_STAGES, "quantize"),
    "standin": ("bismooth.tools.standin", "standin"),
    "verify": (_STAGES, "verify"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value = version(__name__)
    elif name in _HOME:
        module, attribute = _HOME[name]
        value = getattr(import_module(module), attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
