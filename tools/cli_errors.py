"""From an exception to an exit status and one message: users see no traceback unless they ask for it."""

from __future__ import annotations

import os
import traceback

import typer

from ..export.errors import BismoothError, GateError
from . import console, entry

TRACEBACK = "BISMOOTH_TRACEBACK"
"""The environment variable that, set to 1, shows the traceback as well."""

GATE, USAGE, INTERNAL = 1, 2, 70

_COMPILE = (
    "gguf",
    "ml_dtypes",
    "onnx",
    "onnx_graphsurgeon",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "torch",
    "transformers",
)
_EXTRAS = {
    **dict.fromkeys(_COMPILE, "compile"),
    **dict.fromkeys(("jinja2", "plotly"), "report"),
    "onnxruntime": "runtime",
    "tensorrt_rtx": "tensorrt-rtx",
    "tensorrt": "tensorrt",
}


class Interrupted(Exception):
    """The command was interrupted, and has shown what there is: nothing more is to be said."""


def report(error: BaseException, command: str | None, as_json: bool) -> int:
    """Show the ``error`` that ended ``command`` and return the exit status."""
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    status, message = explain(error, command)
    message = " ".join([message, *getattr(error, "__notes__", ())])
    if as_json:
        console.show_json({"error": {"status": status, "message": message}})
    else:
        console.show_error(message)
    return status


def explain(error: BaseException, command: str | None) -> tuple[int, str]:
    """Exit status and message for ``error``."""
    match error:
        case GateError():
            return GATE, str(error)
        case BismoothError():
            return USAGE, str(error)
        case typer.TyperException():
            message = " ".join(error.format_message().replace("Value error, ", "").split())
            end = "" if message.endswith((".", "?")) else "."
            return USAGE, f"{message}{end} See '{' '.join(filter(None, ('bismooth', command, '--help')))}'."
        case ModuleNotFoundError(name=str(name)) if name.partition(".")[0] in _EXTRAS:
            package = name.partition(".")[0]
            return USAGE, f'The module {package!r} is not installed. Run: pip install "bismooth[{_EXTRAS[package]}]"'
        case OSError(filename=filename, strerror=str(reason)) if filename is not None:
            return USAGE, f"{filename}: {reason}."
        case OSError(strerror=str(reason)):
            return USAGE, f"{reason}."
        case KeyboardInterrupt() | typer.Abort():
            return entry.interrupted(), entry.MESSAGE
        case _:
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return INTERNAL, f"Internal error, please report it: {what} (rerun with {TRACEBACK}=1 for a traceback)"
