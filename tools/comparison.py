"""What is compared between two programs on the same windows: logits, or the features of an encoder.

The reference's outputs wait in a file, so that memory does not grow with the number of windows.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ..engines.linears import LOGITS
from ..engines.token_feeds import Port
from ..export.artifact import Artifact
from ..export.errors import BismoothError, GateError
from ..export.state import check_left
from .bootstrap import Resampling
from .metrics import LogitComparison, Sqnr

Ids = NDArray[np.int64]
Values = NDArray[np.float32]
Figures = dict[str, Any]
Replicates = dict[str, NDArray[np.float64]]
"""Values of figures on R resamples of the windows [R], by name."""


class Comparison(Protocol):
    """Compares a candidate with a reference, window by window."""

    def update(self, ids: Ids, reference: Values, candidate: Values) -> None:
        """Add one window: ids [S], values [S, V].

        Raises:
            BismoothError: the shapes differ.
            GateError: a value of the candidate is not finite.
        """
        ...

    def figures(self) -> Figures:
        """The figures of all windows so far, under the names that gates use."""
        ...

    def resampled(self, resampling: Resampling) -> Replicates:
        """Figures on resamples of all windows so far, under the names that :meth:`figures` uses."""
        ...


class Logits:
    """Logits, by :class:`.metrics.LogitComparison`."""

    def __init__(self) -> None:
        self._comparison = LogitComparison()

    def update(self, ids: Ids, reference: Values, candidate: Values) -> None:
        self._comparison.update(ids[None], reference[None], candidate[None])

    def figures(self) -> Figures:
        metrics = self._comparison.result()
        return {
            "reference_perplexity": metrics.reference_perplexity,
            "perplexity": metrics.perplexity,
            "perplexity_ratio": metrics.perplexity_ratio,
            "log_perplexity": metrics.log_perplexity,
            "kl": metrics.kl_mean,
            "kl_p99": metrics.kl_p99,
            "top1": metrics.top1,
            "top1_stable": metrics.top1_stable,
            "stable_share": metrics.stable_share,
            "cosine_p5": metrics.cosine_p5,
            "max_error": metrics.max_error,
            "relative_error": metrics.relative_error,
        }

    def resampled(self, resampling: Resampling) -> Replicates:
        tokens = self._comparison.tokens()
        nll, reference = resampling.mean(tokens.nll), resampling.mean(tokens.reference_nll)
        with np.errstate(over="ignore"):
            perplexity, ratio = np.exp(nll), np.exp(nll - reference)
        return {
            "kl": resampling.mean(tokens.kl),
            "kl_p99": resampling.quantile(tokens.kl, 0.99),
            "perplexity": perplexity,
            "perplexity_ratio": ratio,
            "log_perplexity": nll,
            "top1": resampling.mean(tokens.top1),
        }


class Features:
    """Outputs that are no logits: perplexity, KL and top-1 mean nothing there."""

    def __init__(self) -> None:
        self._noise = Sqnr()
        self._cosine: list[NDArray[np.float64]] = []

    def update(self, ids: Ids, reference: Values, candidate: Values) -> None:
        if not np.isfinite(candidate).all():
            raise GateError(
                "the outputs of the candidate hold NaN or infinity. Expected finite numbers. "
                "Check the graph for overflow, or leave the layers at fault in float."
            )
        self._noise.update(reference, candidate)
        r, c = (values.reshape(len(ids), -1).astype(np.float64) for values in (reference, candidate))
        norms = np.linalg.norm(r, axis=1) * np.linalg.norm(c, axis=1)
        self._cosine.append(np.divide((r * c).sum(axis=1), norms, out=np.ones(len(r)), where=norms > 0))

    def figures(self) -> Figures:
        return {
            "cosine_p5": float(np.quantile(np.concatenate(self._cosine), 0.05)),
            "sqnr_db": self._noise.decibels,
            "relative_error": self._noise.relative_error,
        }

    def resampled(self, resampling: Resampling) -> Replicates:
        signal, noise = (resampling.mean(np.array(sums)) for sums in (self._noise.signal, self._noise.noise))
        with np.errstate(divide="ignore"):
            sqnr = 10 * np.log10(np.divide(signal, noise, out=np.full_like(signal, np.inf), where=noise > 0))
        return {"cosine_p5": resampling.quantile(np.stack(self._cosine), 0.05), "sqnr_db": sqnr}


class Track:
    """A comparison that remembers that its candidate gave no numbers, instead of ending the run."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.failure: str | None = None

    def update(self, ids: Ids, reference: Values, candidate: Values) -> None:
        if self.failure is None:
            try:
                self.comparison.update(ids, reference, candidate)
            except GateError as error:
                self.failure = str(error)

    def figures(self) -> Figures:
        return {} if self.failure else self.comparison.figures()


def follow(ids: Ids, outputs: Iterable[Values], *pairs: tuple[Track, WindowFile]) -> None:
    """Hold outputs against those in files, window by window of ids [N, S]; when it is done, no window is in memory."""
    for number, values in enumerate(outputs):
        for track, file in pairs:
            track.update(ids[number], file.read(number), values)


def comparison_of(artifact: Artifact, output: Port) -> Callable[[], Comparison]:
    """What makes comparisons of ``output`` of one of the artifact's graphs."""
    vocabulary = artifact.manifest.dims.get("vocab_size")
    is_logits = output.name == LOGITS or (vocabulary is not None and output.shape[-1:] == (vocabulary,))
    return Logits if is_logits else Features


class WindowFile:
    """Float32 arrays of one shape, one per window, in a file.

    It has no name, and is gone when the process is, unless it is to be kept.

    Args:
        folders: Where the file may lie; the first that has the space.
        count: Number of windows.
        keep: A name in the first folder, for a file that another process goes on with; see :meth:`finish`.
    """

    def __init__(self, folders: Sequence[Path], count: int, keep: str | None = None) -> None:
        self._folders, self._count, self._keep = folders, count, keep
        self._file: IO[bytes] | None = None
        self._shape: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, values: Values) -> None:
        """Write the next window.

        Raises:
            BismoothError: no folder has the space.
        """
        if self._file is None:
            self._file, self._shape = self._open(values.nbytes * self._count), values.shape
        try:
            self._file.write(np.ascontiguousarray(values).data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise self._no_space(values.nbytes * self._count) from error

    def read(self, number: int) -> Values:
        """A window, read from disk."""
        assert self._file is not None
        values = np.empty(self._shape, np.float32)
        self._file.seek(number * values.nbytes)
        self._file.readinto(values.reshape(-1).view(np.uint8).data)  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]
        return values

    def finish(self) -> tuple[int, ...] | None:
        """All windows are written. Returns what :meth:`reopen` takes, or None if the file has no name.

        When this returns, a file with a name is on disk.
        """
        if self._file is None or isinstance(self._file.name, int):
            return None
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._shape

    def reopen(self, shape: Sequence[int]) -> None:
        """Read what another process has finished.

        Raises:
            UnfinishedRunError: the file is missing or cut off.
        """
        path = self._folders[0] / str(self._keep)
        check_left(path, self._count * prod(shape) * np.dtype(np.float32).itemsize)
        self._file, self._shape = path.open("rb"), tuple(shape)

    def _open(self, size: int) -> IO[bytes]:
        for folder in self._folders:
            try:
                if shutil.disk_usage(folder).free > size:
                    if self._keep is not None and folder == self._folders[0]:
                        return (folder / self._keep).open("w+b")
                    return tempfile.TemporaryFile(dir=folder)
            except OSError:  # not writable
                continue
        raise self._no_space(size)

    def _no_space(self, size: int) -> BismoothError:
        return BismoothError(
            f"There is no space for the float graph's outputs. Expected {size / 1e6:,.0f} MB in one of "
            f"{', '.join(map(str, self._folders))}. Free some, set TMPDIR, or ask for fewer --windows."
        )
