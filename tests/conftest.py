"""What every test runs under: no network, no terminal width, repeatable examples; what some ask for."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from bismooth.engines.cuda import cuda_available
from tests.browser import browser_available
from tests.cluster import cluster_available, running_cluster

# Before any library reads them: nothing may be downloaded, and text is laid out alike everywhere.
os.environ.update(HF_HUB_OFFLINE="1", NO_COLOR="1", COLUMNS="100", TERM="dumb")
os.environ.pop("FORCE_COLOR", None)

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

GOLDEN = Path(__file__).parent / "golden"

_NEEDS = {"gpu": cuda_available, "browser": browser_available, "cluster": cluster_available}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")
    for marker in _NEEDS:
        words = f"fail, instead of skipping, where no {marker} can be used"
        parser.addoption(f"--require-{marker}", action="store_true", help=words)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu``, ``browser`` or ``cluster`` where none can be used, and say why.

    Of several processes, one runs all tests of a file, and one all that share the cluster.
    """
    for item in items:
        group = "cluster" if item.get_closest_marker("cluster") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    for marker, available in _NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if not marked or not (reason := available()):
            continue
        if config.getoption(f"--require-{marker}"):
            raise pytest.UsageError(f"No {marker} can be used: {reason}.")
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:  # pyright: ignore[reportUnusedFunction]
    """Unfinished runs of tests are not registered among the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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


@pytest.fixture(scope="session")
def session_cluster() -> Generator[Any]:
    """``ray.cluster_utils.Cluster`` on this machine: two nodes of a CPU each, and an idle head."""
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``session_cluster``, at ``RAY_ADDRESS``."""
    monkeypatch.setenv("RAY_ADDRESS", session_cluster.address)
    return session_cluster
