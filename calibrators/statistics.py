"""Activation statistics of one model on one set of token windows: a safetensors file, read tensor by tensor.

For each observed value (an activation with K channels, flattened to rows [T, K]) the file has the tensors

==================  ===============  =================================================================================
``NAME/histogram``  int64 [2562]     counts of \\|x\\| on the grid of :mod:`.histogram`; only if they were asked for
``NAME/absmax``     float32 [K]      max \\|x\\| of each channel
``NAME/outliers``   float32 [16, K]  the rows with the largest \\|x\\|, largest first; zeros where there are fewer rows
``NAME/rows``       float32 [R, K]   rows of x at the token numbers ``row_numbers``, int64 [R]
``NAME/gram``       float32 [K, K]   XᵀX over all rows; only if they were asked for
==================  ===============  =================================================================================

and its metadata say what was run on what (:class:`Provenance`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..export.errors import BismoothError
from ..export.replacing import replacing
from ..export.safetensors_file import TensorEntry, read_header, read_tensor
from .histogram import BINS, Histogram
from .observe import OUTLIERS

FORMAT = "bismooth-statistics"
VERSION = "1"
ROW_NUMBERS = "row_numbers"


@dataclass(frozen=True)
class Provenance:
    """What the statistics belong to.

    The hashes are SHA-256; ``tokenizer_sha256`` is empty where the artifact has no tokenizer. ``windows`` and
    ``length`` are the shape of the token ids, ``seed`` chose the sampled rows.
    """

    graph_sha256: str
    tokenizer_sha256: str
    data_sha256: str
    windows: int
    length: int
    seed: int


@dataclass(frozen=True)
class Statistics:
    """A loaded statistics file. Nothing but its header is held: every access reads that one tensor."""

    path: Path
    provenance: Provenance
    entries: Mapping[str, TensorEntry]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The observed values, in the order in which they were asked for."""
        return tuple(name.removesuffix("/absmax") for name in self.entries if name.endswith("/absmax"))

    @property
    def has_histograms(self) -> bool:
        """Whether magnitudes were counted, too."""
        return any(name.endswith("/histogram") for name in self.entries)

    @property
    def has_grams(self) -> bool:
        """Whether XᵀX was taken, too."""
        return any(name.endswith("/gram") for name in self.entries)

    @cached_property
    def row_numbers(self) -> NDArray[np.int64]:
        """Token numbers [R], ascending, of the sampled rows: window · length + position."""
        return self._read(ROW_NUMBERS)

    def absmax(self, name: str) -> NDArray[np.float32]:
        """max |x| per channel, [K]."""
        return self._read(f"{name}/absmax")

    def rows(self, name: str) -> NDArray[np.float32]:
        """The sampled rows, [R, K]."""
        return self._read(f"{name}/rows")

    def outliers(self, name: str) -> NDArray[np.float32]:
        """The rows with the largest |x|, [16, K], largest first; zeros where there are fewer rows."""
        return self._read(f"{name}/outliers")

    def gram(self, name: str) -> NDArray[np.float32]:
        """XᵀX over all rows x of the value, [K, K]: GPTQ's Hessian is 2/T of it (arXiv 2210.17323).

        Raises:
            BismoothError: the file has none.
        """
        if not self.has_grams:
            raise BismoothError(
                f"{self.path}: has no Gram matrices. Expected some. Run 'bismooth calibrate' with --grams."
            )
        return self._read(f"{name}/gram")

    def histogram(self, name: str) -> Histogram:
        """Histogram of |x|.

        Raises:
            BismoothError: the file has none.
        """
        if not self.has_histograms:
            raise BismoothError(
                f"{self.path}: has no histograms. Expected some. Run 'bismooth calibrate' with --histograms."
            )
        return Histogram(self._read(f"{name}/histogram"), float(self.absmax(name).max(initial=0)))

    def save(self, path: Path) -> Statistics:
        """Copy the file to ``path`` in one step; the statistics there."""
        with replacing(path) as temporary:
            shutil.copyfile(self.path, temporary)
        return Statistics.load(path)

    def check_graph(self, graph_sha256: str) -> None:
        """Raise :class:`BismoothError` unless the statistics were taken from the graph file with that hash."""
        if graph_sha256 != self.provenance.graph_sha256:
            raise BismoothError(
                f"{self.path}: the statistics belong to another graph: expected the hash {graph_sha256[:12]}…, "
                f"got {self.provenance.graph_sha256[:12]}…. Run 'bismooth calibrate' on this artifact."
            )

    @staticmethod
    def load(path: Path) -> Statistics:
        """Read and check the header.

        Raises:
            BismoothError: the file does not exist, is damaged, or is no statistics file of this version.
        """
        try:
            entries = read_header(path)
            metadata = _read_metadata(path)
        except OSError as error:
            raise BismoothError(
                f"{path}: cannot be read ({error.strerror}). Expected a statistics file. Run 'bismooth calibrate'."
            ) from error
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
            raise BismoothError(
                f"{path}: expected a file of format {FORMAT} {VERSION}, got {metadata.get('format', 'no format')} "
                f"{metadata.get('version', '')}. Run 'bismooth calibrate' again."
            )
        statistics = Statistics(path, _provenance(path, metadata), entries)
        _check_tensors(statistics)
        return statistics

    def _read(self, key: str) -> NDArray[Any]:
        if key not in self.entries:
            name = key.rpartition("/")[0]
            raise BismoothError(
                f"{self.path}: has no statistics of value '{name}'. It has {len(self.names)} values, first "
                f"{', '.join(self.names[:3])}. Run 'bismooth calibrate' on this artifact."
            )
        return read_tensor(self.path, self.entries[key])


def is_statistics(path: Path) -> bool:
    """Whether a file is a whole statistics file of this version."""
    try:
        Statistics.load(path)
    except BismoothError:
        return False
    return True


def _read_metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return cast(dict[str, str], header.get("__metadata__", {}))


def _provenance(path: Path, metadata: Mapping[str, str]) -> Provenance:
    try:
        return Provenance(
            graph_sha256=metadata["graph_sha256"],
            tokenizer_sha256=metadata["tokenizer_sha256"],
            data_sha256=metadata["data_sha256"],
            windows=int(metadata["windows"]),
            length=int(metadata["length"]),
            seed=int(metadata["seed"]),
        )
    except (KeyError, ValueError) as error:
        raise BismoothError(f"{path}: its metadata are damaged ({error!r}). Run 'bismooth calibrate' again.") from error


def _check_tensors(statistics: Statistics) -> None:
    entries = statistics.entries
    row_count = entries[ROW_NUMBERS].shape if ROW_NUMBERS in entries else (-1,)
    for name in statistics.names:
        channels = entries[f"{name}/absmax"].shape
        expected = {
            "absmax": ("F32", channels),
            "outliers": ("F32", (OUTLIERS, *channels)),
            "rows": ("F32", (*row_count, *channels)),
        }
        if statistics.has_histograms:
            expected["histogram"] = ("I64", (BINS,))
        if statistics.has_grams:
            expected["gram"] = ("F32", (*channels, *channels))
        for kind, want in expected.items():
            entry = entries.get(f"{name}/{kind}")
            got = (entry.dtype, entry.shape) if entry else None
            if got != want:
                raise BismoothError(
                    f"{statistics.path}: {name}/{kind}: expected {want}, got {got}. Run 'bismooth calibrate' again."
                )
