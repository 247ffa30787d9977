"""Artifact folders: what loads, what is refused, and what is never touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from bismooth.export.artifact import MANIFEST, Artifact, FileRecord, place_file, scan_files, write_manifest
from bismooth.export.errors import BismoothError
from bismooth.export.hashing import file_sha256
from tests.artifacts import FLOAT, make, write


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    path.write_bytes(b"weights")
    return path


def test_what_is_written_is_what_is_loaded(tmp_path: Path, weights: Path) -> None:
    path = make(tmp_path / "art", weights=weights)
    loaded = Artifact.load(path, "float")
    assert loaded.path == path
    assert replace(loaded.manifest, files={}) == FLOAT
    assert loaded.graph("float16") == path / "model.float16.onnx"
    status = weights.stat()
    assert loaded.manifest.files == {
        "model.float16.onnx": FileRecord(5),
        "model.onnx": FileRecord(5),
        "model.safetensors": FileRecord(7, linked=True, mtime_ns=status.st_mtime_ns, inode=status.st_ino),
    }


def test_hashes_of_what_was_read(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"12")
    files = scan_files(tmp_path, {"c": "cc", "a": "aa"})
    assert [record.sha256 for record in files.values()] == ["aa", None, "cc"]
    manifest = replace(FLOAT, files=files)
    assert manifest.hashes == {"a": "aa", "c": "cc"}
    digests = [FLOAT.content_sha256, manifest.content_sha256]
    for other in ({"a": "aa", "c": "dd"}, {"a": "aa", "b": "cc"}):
        digests.append(replace(FLOAT, files=scan_files(tmp_path, other)).content_sha256)
    assert digests[0] is None
    assert len(set(digests)) == 4
    assert replace(FLOAT, files=dict(reversed(files.items()))).content_sha256 == manifest.content_sha256


def test_a_graph_that_is_not_there(tmp_path: Path) -> None:
    path = make(tmp_path / "art")
    with pytest.raises(BismoothError, match=r"art: the artifact has no folded graph\. It has: float32, float16\."):
        Artifact.load(path).graph("folded")
    with pytest.raises(BismoothError, match=r"no float32 graph\. It has: none\."):
        Artifact(path, replace(FLOAT, graphs={})).graph("float32")


def test_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    expected = r"not a bismooth artifact: there is no bismooth.json\. Expected a folder written by 'bismooth export'"
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BismoothError, match=expected):
            Artifact.load(path)


def test_an_artifact_of_another_kind(tmp_path: Path) -> None:
    path = make(tmp_path / "art")
    with pytest.raises(BismoothError, match="expected a quantized or engine artifact, got a float one"):
        Artifact.load(path, "quantized", "engine")


Edit = Callable[[dict[str, Any]], Any]
BROKEN: dict[str, tuple[Edit, str]] = {
    "foreign": (lambda m: m.update(format="other"), "it has no format 'bismooth'"),
    "future": (lambda m: m.update(version=9), "it has format version 9, this bismooth reads version 1"),
    "kind": (lambda m: m.update(kind="toy"), "it has kind 'toy', expected one of float, quantized, engine"),
    "missing key": (lambda m: m.pop("files"), "'files'"),
    "type": (lambda m: m.update(stages="export"), "stages is of another type than expected"),
    "size": (lambda m: m["files"]["model.onnx"].update(size="5"), "model.onnx has size '5'"),
    "time": (lambda m: m["files"]["model.onnx"].update(mtime_ns="x"), "model.onnx has mtime_ns 'x'"),
    "inode": (lambda m: m["files"]["model.onnx"].update(inode="x"), "model.onnx has inode 'x'"),
    "linked": (lambda m: m["files"]["model.onnx"].update(linked=1), "model.onnx has linked 1"),
    "sha256": (lambda m: m["files"]["model.onnx"].update(sha256=1), "model.onnx has sha256 1"),
    "source files": (lambda m: m["source"].update(files=["x"]), r"source.files has \['x'\]"),
    "architecture": (lambda m: m.update(architecture=1), "architecture has 1"),
    "dims": (lambda m: m["dims"].update(hidden_size="8"), "dims has '8'"),
    "prefix": (lambda m: m["blocks"].update(prefix=1), "blocks.prefix has 1"),
    "kinds": (lambda m: m["blocks"].update(kinds="01"), "blocks.kinds has '0'"),
    "tools": (lambda m: m["tools"].update(python=3), "tools has 3"),
    "stage": (lambda m: m.update(stages=["export"]), "stages has 'export'"),
    "stage name": (lambda m: m.update(stages=[{}]), "stages.stage has None"),
    "unknown key": (lambda m: m.update(colour="red"), "unexpected keyword argument 'colour'"),
    "files": (lambda m: m["files"].update(x={"bytes": 1}), "unexpected keyword argument 'bytes'"),
    "outside": (lambda m: m["graphs"].update(float32="../model.onnx"), "names a file outside of the folder: ../model"),
    "absolute": (lambda m: m["files"].update({"/etc/passwd": {"size": 1}}), "outside of the folder: /etc/passwd"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_manifest_that_cannot_be_read(tmp_path: Path, case: str) -> None:
    edit, reason = BROKEN[case]
    path = make(tmp_path / "art")
    content = json.loads((path / MANIFEST).read_text("utf-8"))
    edit(content)
    (path / MANIFEST).write_text(json.dumps(content), "utf-8")
    with pytest.raises(
        BismoothError, match=rf"bismooth.json: the manifest cannot be read: .*{reason}.*Make the artifact"
    ):
        Artifact.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00"])
def test_a_manifest_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    path = make(tmp_path / "art")
    (path / MANIFEST).write_text(text, "utf-8")
    with pytest.raises(BismoothError, match="the manifest cannot be read"):
        Artifact.load(path)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    path = make(tmp_path / "art")
    (path / "model.onnx").unlink()
    with pytest.raises(BismoothError, match=r"model.onnx: the manifest lists this file, but it is missing\. Make"):
        Artifact.load(path)


def test_a_file_of_another_size(tmp_path: Path) -> None:
    path = make(tmp_path / "art")
    (path / "model.onnx").write_bytes(b"longer than it was")
    with pytest.raises(BismoothError, match=r"model.onnx: expected 5 bytes, got 18\. The file was changed\. Make"):
        Artifact.load(path)


def edit(path: Path, content: bytes) -> None:
    """Write into a file, whose time then is another one, also on coarse clocks."""
    status = path.stat()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


@pytest.mark.parametrize("content", [b"WEIGHTS", b"weights"])
def test_an_edit_of_the_source_is_seen_through_the_link(tmp_path: Path, weights: Path, content: bytes) -> None:
    path = make(tmp_path / "art", weights=weights)
    edit(weights, content)
    with pytest.raises(
        BismoothError, match=r"a link to the source's weights, which were modified since\. Run 'bismooth"
    ) as raised:
        Artifact.load(path)
    subprocess.run(str(raised.value).rpartition("set it back: ")[2], shell=True, check=True)
    Artifact.load(path)


def test_with_a_hash_the_content_decides(tmp_path: Path, weights: Path) -> None:
    path = make(tmp_path / "art", weights=weights)
    files = scan_files(path, {"model.safetensors": file_sha256(weights)})
    write_manifest(path, replace(FLOAT, files=files))
    edit(weights, b"weights")
    Artifact.load(path)
    edit(weights, b"WEIGHTS")
    with pytest.raises(BismoothError, match=r"link to the source's weights, whose content was changed since\. Run"):
        Artifact.load(path)


def test_a_source_that_is_replaced_or_deleted_does_no_harm(tmp_path: Path, weights: Path) -> None:
    path = make(tmp_path / "art", weights=weights)
    weights.unlink()
    weights.write_bytes(b"other weights")
    Artifact.load(path)


def test_a_copy_of_an_artifact_loads(tmp_path: Path, weights: Path) -> None:
    path = make(tmp_path / "art", weights=weights)
    copy = shutil.copytree(path, tmp_path / "copy", copy_function=shutil.copyfile)
    edit(copy / "model.safetensors", b"weights")
    Artifact.load(copy)
    with (copy / "model.safetensors").open("ab") as file:
        file.write(b" more")
    with pytest.raises(BismoothError, match=r"model.safetensors: expected 7 bytes, got 12"):
        Artifact.load(copy)


def test_a_file_is_linked_where_that_is_possible(tmp_path: Path, weights: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(weights)
    assert place_file(link, tmp_path / "placed") is True
    assert (tmp_path / "placed").samefile(weights)
    assert not (tmp_path / "placed").is_symlink()


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOSYS])
def test_a_file_is_copied_where_links_are_not_possible(
    tmp_path: Path, weights: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert place_file(weights, tmp_path / "placed") is False
    assert (tmp_path / "placed").read_bytes() == b"weights"
    assert weights.stat().st_nlink == 1


def test_a_file_is_copied_on_demand(tmp_path: Path, weights: Path) -> None:
    assert place_file(weights, tmp_path / "placed", copy=True) is False
    assert not (tmp_path / "placed").samefile(weights)


@pytest.mark.parametrize("copy", [True, False])
def test_nothing_is_placed_over_a_file(tmp_path: Path, weights: Path, copy: bool) -> None:
    """It may be a link, and copying would write to what it is a link of."""
    place_file(weights, tmp_path / "placed")
    other = tmp_path / "other"
    other.write_bytes(b"other")
    with pytest.raises(FileExistsError, match="placed already exists"):
        place_file(other, tmp_path / "placed", copy=copy)
    assert weights.read_bytes() == b"weights"


def test_the_manifest_replaces_a_link_and_does_not_write_to_it(tmp_path: Path) -> None:
    other = tmp_path / "precious.json"
    other.write_text("precious", "utf-8")
    folder = tmp_path / "art"
    folder.mkdir()
    os.link(other, folder / MANIFEST)
    write(folder)
    assert other.read_text("utf-8") == "precious"
