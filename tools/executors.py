"""Who does the work of long steps, by the name that users give."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from ..export.errors import BismoothError
from ..passes.executor import LOCAL, Executor


@contextmanager
def open_executor(name: str, files: Iterable[Path]) -> Generator[Executor]:
    """An executor.

    Args:
        name: ``local``, or ``ray`` for the cluster of :func:`..passes.ray_executor.connect`.
        files: what there is already of the files that the tasks will read and write.

    Raises:
        BismoothError: there is none of that name, or as of ``connect``.
    """
    if name == "local":
        yield LOCAL
    elif name == "ray":
        from ..passes.ray_executor import connect

        with connect(files) as executor:
            yield executor
    else:
        raise BismoothError(f"executor {name!r}: there is none of that name. Expected 'local' or 'ray'.")
