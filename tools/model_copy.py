"""Write a model's files again with some of its tensors changed, one tensor (or a piece of one) in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..export.artifact import Artifact
from ..export.external_data import weight_files
from ..export.safetensors_file import DTYPES, SafetensorsWriter, TensorEntry, read_header, read_tensor
from ..export.source import INDEX
from . import console

_PIECE_BYTES = 1 << 24

Place = tuple[str, int]
"""A stored tensor: the file in the folder, and the offset of its bytes."""


class Change(Protocol):
    """What is done to a stored tensor; its shape stays."""

    def dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """The type of the changed tensor."""
        ...

    def apply(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        """The changed tensor, in that type; ``name`` is for messages."""
        ...


@dataclass(frozen=True, eq=False)
class Target:
    """A tensor to write: a change of a stored one, under its own name or under a new one."""

    change: Change
    name: str | None = None


@dataclass(frozen=True, eq=False)
class _Output:
    entry: TensorEntry
    name: str
    change: Change | None

    @property
    def dtype(self) -> np.dtype[Any]:
        stored = DTYPES[self.entry.dtype]
        return self.change.dtype(stored) if self.change else stored


def write_model(artifact: Artifact, folder: Path, targets: Mapping[Place, Sequence[Target]]) -> None:
    """Copy the model of a float artifact into ``folder`` as safetensors files, with changed tensors.

    A stored tensor without targets is copied. One that all targets rename is not written under its own name, and a
    stored tensor whose name a target takes is left out.
    """
    for name in artifact.manifest.files:
        if Path(name).suffix not in (".onnx", ".safetensors"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.path / name, folder / name)
    files = weight_files(artifact.graph("float32"))
    taken = {target.name for group in targets.values() for target in group}
    plan = {name: list(_outputs(name, path, targets, taken)) for name, path in files.items()}
    total, done = sum(map(len, plan.values())), 0
    with console.progress() as progress:
        for name, outputs in plan.items():
            declared = [(output.name, output.dtype, output.entry.shape) for output in outputs]
            with SafetensorsWriter(folder / name, declared, {"format": "pt"}) as writer:
                for output in outputs:
                    if output.change is None:
                        writer.write_pieces(output.name, _pieces(files[name], output.entry))
                    else:
                        values = read_tensor(files[name], output.entry)
                        writer.write(output.name, output.change.apply(values, output.name))
                    progress("write model", done := done + 1, total)
    if len(files) > 1:
        names = {output.name: name for name, outputs in plan.items() for output in outputs}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}, indent=2) + "\n", "utf-8")


def _outputs(
    file: str, path: Path, targets: Mapping[Place, Sequence[Target]], taken: set[str | None]
) -> Iterator[_Output]:
    for entry in read_header(path).values():
        group = targets.get((file, entry.offset))
        if group is not None:
            yield from (_Output(entry, target.name or entry.name, target.change) for target in group)
        elif entry.name not in taken:
            yield _Output(entry, entry.name, None)


def _pieces(path: Path, entry: TensorEntry) -> Iterator[NDArray[Any]]:
    dtype = DTYPES[entry.dtype]
    step = _PIECE_BYTES // dtype.itemsize * dtype.itemsize
    for start in range(0, entry.length, step):
        count = min(step, entry.length - start) // dtype.itemsize
        yield np.fromfile(path, dtype, count, offset=entry.offset + start)
