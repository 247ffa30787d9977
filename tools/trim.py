"""Leave out of an engine's folder the weights that its graph does not read.

An artifact shares the files of its source. Of those, a quantized graph reads little more than the embedding: in
SmolLM2-135M 113 of 538 MB.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path, PurePosixPath

from onnx import TensorProto

from ..engines.base import audit_path
from ..engines.publish import publish, read_audit, read_record
from ..export.external_data import Extent, check_locations, external_tensors, find_extent, find_locations, load_model
from ..export.hashing import file_sha256
from ..export.replacing import scratch_folder

_WORTH = 0.1
"""Share of a file that has to be unread: below it, a link that takes no space is worth more."""
_ALIGNMENT = 4096
"""Of tensors in the new file, so that they can be mapped."""
_BLOCK_BYTES = 1 << 24


def trim_weights(engine: Path) -> bool:
    """Put what is read of weight files with much that is not into one new file; whether there were such files.

    The graph and the record beside it are written anew, and the old weight files are removed: the folder must be the
    caller's own.

    Args:
        engine: the ONNX file of an engine for ONNX Runtime.

    Raises:
        BismoothError: a weight file is cut off, or the record is damaged.
    """
    model = load_model(engine)
    files = check_locations(engine, find_locations(model, engine))
    places = [(tensor, find_extent(engine, tensor)) for tensor in external_tensors(model)]
    wasteful = {name: file for name, file in files.items() if _unread(file, name, places) > _WORTH}
    if not wasteful:
        return False
    target = next(path for number in count() if not (path := engine.with_name(f"weights{number or ''}.bin")).exists())
    record, audit = read_record(engine), read_audit(audit_path(engine))
    with scratch_folder(engine) as scratch:
        moved = _copy([extent for _, extent in places if _plain(extent) in wasteful], wasteful, scratch / target.name)
        for tensor, extent in places:
            if extent in moved:
                _move(tensor, Extent(target.name, moved[extent], extent.length))
        staged = scratch / engine.name
        staged.write_bytes(model.SerializeToString())
        kept = [file for name, file in files.items() if name not in wasteful]
        size = sum(file.stat().st_size for file in (staged, scratch / target.name, *kept))
        digest = file_sha256(staged)
        (scratch / target.name).rename(target)
        publish(staged, engine, replace(record, sha256=digest, bytes=size), audit)
    for file in wasteful.values():
        file.unlink()
    return True


def _plain(extent: Extent) -> str:
    return PurePosixPath(extent.location).as_posix()


def _unread(file: Path, name: str, places: Iterable[tuple[TensorProto, Extent]]) -> float:
    """Share of the file's bytes that no tensor has; tensors that overlap otherwise than wholly count twice."""
    size = file.stat().st_size
    read = sum(extent.length for extent in {extent for _, extent in places if _plain(extent) == name})
    return 1 - read / size if size else 0.0


def _copy(extents: Iterable[Extent], files: dict[str, Path], target: Path) -> dict[Extent, int]:
    """Write the bytes of each extent to ``target``, once; where each begins there."""
    moved: dict[Extent, int] = {}
    with target.open("wb") as output:
        for extent in extents:
            if extent in moved:
                continue
            output.write(bytes(-output.tell() % _ALIGNMENT))
            moved[extent] = output.tell()
            with files[_plain(extent)].open("rb") as source:
                source.seek(extent.offset)
                for start in range(0, extent.length, _BLOCK_BYTES):
                    output.write(source.read(min(_BLOCK_BYTES, extent.length - start)))
    return moved


def _move(tensor: TensorProto, to: Extent) -> None:
    del tensor.external_data[:]
    for key, value in asdict(to).items():
        tensor.external_data.add(key=key, value=str(value))
