"""What every test runs under: no network, no terminal width, repeatable examples; and golden files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Before any library reads them: nothing may be downloaded, and text is laid out alike everywhere.
os.environ.update(HF_HUB_OFFLINE="1", NO_COLOR="1", COLUMNS="100", TERM="dumb")
os.environ.pop("FORCE_COLOR", None)

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden("name.txt", text)``: ``text`` must be what ``tests/golden/name.txt`` holds."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
        assert path.is_file(), f"There is no {path}. Run pytest --update-golden once and review what it writes."
        assert text == path.read_text("utf-8")

    return check
