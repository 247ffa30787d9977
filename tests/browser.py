"""A real Chromium, for the pages."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--enable-unsafe-swiftshader",  # WebGL without a GPU
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def browser_available() -> str:
    """Why no browser can be used; nothing if one can."""
    if find_spec("playwright") is None:
        return "playwright is not installed"
    return "" if _chromium() else "there is no chromium on the PATH"


def _chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def chromium(profile: Path, **options: Any) -> Generator[Any]:
    """A browser context of playwright with a new profile; ``options`` as of ``launch_persistent_context``."""
    with import_module("playwright.sync_api").sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=_chromium(), args=_FLAGS, **options
        )
        try:
            yield context
        finally:
            context.close()
