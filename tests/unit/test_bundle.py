"""What loading a bundle refuses, by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bismooth.engines import bundle as module
from bismooth.engines.bundle import Bundle, BundledEngine
from bismooth.engines.bundle_manifest import MANIFEST, read_manifest, write_manifest
from bismooth.export.errors import BismoothError
from tests.bundles import FILES, engine, forge, make_bundle, manifest, record

WEIGHTS = "engines/onnxruntime/weights.bin"
REMEDY = r"Get the bundle again from where it came, or package the artifact again\."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the smallest files count as large."""
    monkeypatch.setattr(module, "SMALL_BYTES", 8)


def flip(path: Path, place: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_what_a_bundle_says(folder: Path) -> None:
    bundle = Bundle.load(folder)
    assert bundle == Bundle.load(str(folder))
    assert (bundle.name, bundle.tokenizer) == ("tiny-w8a8", folder / "tokenizer.json")
    files = tuple(name for name in FILES if name.startswith("engines/"))
    expected = BundledEngine("onnxruntime", "onnxruntime", "1.31", (), 64, "engines/onnxruntime/model.onnx", files)
    assert bundle.engines == (expected,)
    assert bundle.engine("onnxruntime") == expected
    with pytest.raises(BismoothError, match=r"the bundle has no engine 'onnx'\. Expected one of: onnxruntime\."):
        bundle.engine("onnx")


def test_a_bundle_without_a_tokenizer(tmp_path: Path) -> None:
    files = {name: content for name, content in FILES.items() if name != "tokenizer.json"}
    assert Bundle.load(make_bundle(tmp_path, files)).tokenizer is None


def test_a_copy_is_as_good(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "moved")
    assert Bundle.load(tmp_path / "moved").name == "tiny-w8a8"
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    assert Bundle.load(tmp_path / "link").name == "tiny-w8a8"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("check", ["size", "full"])
def test_one_bit_of_any_file(folder: Path, name: str, check: Any) -> None:
    flip(folder / name)
    got = record((folder / name).read_bytes())["sha256"]
    message = rf"{name}: was changed: expected SHA-256 {record(FILES[name])['sha256']}, got {got}\. {REMEDY}"
    with pytest.raises(BismoothError, match=message):
        Bundle.load(folder, check)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("check", ["size", "full"])
def test_a_file_of_another_size_or_none(folder: Path, name: str, check: Any) -> None:
    size = len(FILES[name])
    (folder / name).write_bytes(FILES[name][:-1])
    with pytest.raises(BismoothError, match=rf"{name}: was changed: expected {size} bytes, got {size - 1}\. {REMEDY}"):
        Bundle.load(folder, check)
    (folder / name).unlink()
    with pytest.raises(BismoothError, match=rf"{name}: is missing\. Expected a file of {size} bytes\. {REMEDY}"):
        Bundle.load(folder, check)
    (folder / name).mkdir()
    with pytest.raises(BismoothError, match=rf"{name}: is missing\. Expected a file"):
        Bundle.load(folder, check)


@pytest.mark.parametrize("name", ["model.py", "engines/onnxruntime/.hidden", "engines/tensorrt/model.engine"])
@pytest.mark.parametrize("check", ["size", "full"])
def test_a_file_that_is_not_on_record(folder: Path, name: str, check: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    message = rf"{name}: is not on record in bundle\.json\. Expected no such file\. Remove it\."
    with pytest.raises(BismoothError, match=message):
        Bundle.load(folder, check)


def test_kernels_that_were_compiled_here(tmp_path: Path) -> None:
    """They are no part of the bundle, and beside another engine they are not on record either."""
    files = {**FILES, "engines/rtx/model.engine": b"plan"}
    entry = engine("tensorrt-rtx", "rtx") | {"files": ["engines/rtx/model.engine"]}
    folder = make_bundle(tmp_path / "bundle", files, engines={"onnxruntime": engine("onnxruntime"), "rtx": entry})
    for name in ("model.sm89.kernels", "model.sm120.kernels", ".model.sm89.kernels.tmp-01234567"):
        (folder / "engines/rtx" / name).touch()
    assert len(Bundle.load(folder).engines) == 2
    (folder / "engines/rtx/model.sm86.kernels").symlink_to(tmp_path / "elsewhere")
    for name in ("rtx/model.sm86.kernels", "rtx/other.sm89.kernels", "onnxruntime/model.sm89.kernels"):
        (folder / "engines" / name).touch()
        with pytest.raises(BismoothError, match=rf"{name}: is not on record in bundle\.json"):
            Bundle.load(folder)
        (folder / "engines" / name).unlink()


def test_a_link_that_is_not_on_record(folder: Path, tmp_path: Path) -> None:
    (folder / "more").symlink_to(tmp_path)
    with pytest.raises(BismoothError, match=r"more: is not on record in bundle\.json"):
        Bundle.load(folder)


def test_links_stay_inside(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        BismoothError, match=rf"{WEIGHTS}: leads out of the bundle, to .*elsewhere\. Expected a file in"
    ):
        Bundle.load(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(FILES[WEIGHTS])
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("engines/onnxruntime/model.audit.json")  # of the same content
    assert Bundle.load(folder).tokenizer


def test_a_folder_that_leads_elsewhere(folder: Path, tmp_path: Path) -> None:
    (folder / "engines").rename(tmp_path / "engines")
    (folder / "engines").symlink_to(tmp_path / "engines")
    with pytest.raises(BismoothError, match="leads out of the bundle"):
        Bundle.load(folder)


def test_links_in_a_circle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("weights.bin")
    with pytest.raises(
        BismoothError, match=rf"{WEIGHTS}: (cannot be read \(.*\)|is missing)\. Expected a file of 22 bytes"
    ):
        Bundle.load(folder)


def test_large_files_are_hashed_while_an_engine_loads(folder: Path, small: None) -> None:
    flip(folder / WEIGHTS)
    with pytest.raises(BismoothError, match=f"{WEIGHTS}: was changed"):
        Bundle.load(folder)
    bundle = Bundle.load(folder, "size")
    loaded = False
    with (
        pytest.raises(BismoothError, match=rf"{WEIGHTS}: was changed: expected SHA-256 .*, got "),
        bundle.hashing(bundle.engine("onnxruntime")) as check,
    ):
        loaded = True
        check()
    assert loaded
    flip(folder / WEIGHTS)
    with bundle.hashing(bundle.engine("onnxruntime")) as check:
        check()


def test_files_of_other_engines_are_not_read_for_one(tmp_path: Path, small: None) -> None:
    files = {**FILES, "engines/rtx/model.engine": b"many kernels", "tokenizer.json": b'{"of": "a large vocabulary"}'}
    engines = {
        "onnxruntime": engine("onnxruntime"),
        "rtx": engine("tensorrt-rtx", "rtx", files=["engines/rtx/model.engine"]),
    }
    bundle = Bundle.load(make_bundle(tmp_path, files, engines=engines), "size")
    flip(tmp_path / "engines/rtx/model.engine")
    with bundle.hashing(bundle.engine("onnxruntime")) as check:
        check()
    with (
        pytest.raises(BismoothError, match=r"engines/rtx/model\.engine: was changed"),
        bundle.hashing(bundle.engine("rtx")) as check,
    ):
        check()
    flip(tmp_path / "engines/rtx/model.engine")
    flip(tmp_path / "tokenizer.json")
    for name in engines:
        with (
            pytest.raises(BismoothError, match=r"tokenizer\.json: was changed"),
            bundle.hashing(bundle.engine(name)) as check,
        ):
            check()


def test_all_problems_and_what_is_read(folder: Path) -> None:
    flip(folder / WEIGHTS)
    (folder / "config.json").unlink()
    (folder / "extra").touch()
    read: list[str] = []
    problems = list(Bundle(folder, read_manifest(folder)).problems("full", read.append))
    assert [problem.removeprefix(f"{folder}/").partition(":")[0] for problem in problems] == [
        "config.json",
        "extra",
        WEIGHTS,
    ]
    assert set(read) == {*FILES} - {"config.json"}


def test_one_bit_of_the_manifest(folder: Path) -> None:
    """Damage to it shows, unless it is in the spaces between values."""
    path = folder / MANIFEST
    whole = path.read_bytes()
    document = json.loads(whole)
    for place in range(0, len(whole), 7):
        flip(path, place)
        try:
            read = read_manifest(folder)
        except BismoothError as error:
            assert str(error).startswith(f"{path}: the manifest cannot be read: ")
        else:
            assert read == document, place
        path.write_bytes(whole)


Edit = Callable[[dict[str, Any]], Any]


def renamed(name: str) -> Edit:
    def edit(document: dict[str, Any]) -> None:
        files = document["files"]
        files[name] = files.pop("config.json")

    return edit


EDITS: list[tuple[Edit, str]] = [
    (renamed("../config.json"), r"it names a file outside of the folder: \.\./config\.json"),
    (renamed("a/../../b"), r"it names a file outside of the folder: a/\.\./\.\./b"),
    (renamed("/etc/passwd"), r"it names a file outside of the folder: /etc/passwd"),
    (renamed("./tokenizer.json"), r"it names a file in an unusual way: '\./tokenizer\.json'"),
    (renamed("engines//model.onnx"), r"it names a file in an unusual way: 'engines//model\.onnx'"),
    (renamed("engines\\model.onnx"), r"it names a file in an unusual way: 'engines"),
    (renamed(MANIFEST), r"it names a file in an unusual way: 'bundle\.json'"),
    (renamed(""), r"it names a file in an unusual way: ''"),
    (renamed("nul\0"), r"it names a file in an unusual way: 'nul"),
    (
        lambda d: d["files"].pop(WEIGHTS),
        rf"engine onnxruntime has the file {WEIGHTS}, which is not among the files",
    ),
    (lambda d: d["licence"].update(files=["LICENSE"]), r"the licence LICENSE is not among the files of the bundle"),
    (lambda d: d.pop("engines"), r"\$: 'engines' is a required property"),
    (lambda d: d.update(engines={}), r"\$\.engines: "),
    (lambda d: d.update(more=1), r"\$: Additional properties are not allowed \('more' was unexpected\)"),
    (lambda d: d["files"]["config.json"].update(size=-1), r"\$\.files\['config\.json'\]\.size: -1 is less than"),
    (lambda d: d["files"]["config.json"].update(size="1"), r"size: '1' is not of type 'integer'"),
    (lambda d: d["files"]["config.json"].update(sha256="00"), r"sha256: '00' does not match"),
    (lambda d: d.update(version=2), r"it has format version 2, this bismooth reads version 1"),
    (lambda d: d.update(format="bismooth"), r"it has no format 'bismooth-bundle'"),
]


@pytest.mark.parametrize(("edit", "message"), EDITS)
def test_a_manifest_that_cannot_be(folder: Path, edit: Edit, message: str) -> None:
    document = json.loads((folder / MANIFEST).read_text("utf-8"))
    edit(document)
    forge(folder, document)
    with pytest.raises(BismoothError, match=rf"bundle\.json: the manifest cannot be read: .*{message}.*{REMEDY}"):
        Bundle.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[]", "it has no format"),
        ("[" * 100_000, "recursion|Expecting value"),
        ('{"format": "bismooth-bundle", "format": "bismooth-bundle"}', "it has 'format' twice"),
        ('{"format": "bismooth-bundle", "version": 1, "files": {"a": 1, "a": 2}}', "it has 'a' twice"),
        ('{"format": "bismooth-bundle", "version": 1}', "it was changed: it says that its SHA-256 is None, and it is"),
        ("\udcff", "can't decode byte"),
    ],
)
def test_a_manifest_that_is_none(folder: Path, text: str, message: str) -> None:
    (folder / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BismoothError, match=rf"bundle\.json: the manifest cannot be read: .*({message})"):
        Bundle.load(folder)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(
        BismoothError, match=r"not a bundle: there is no bundle\.json\. Expected a folder of 'bismooth p"
    ):
        Bundle.load(tmp_path)
    assert not Bundle.is_alone(tmp_path)
    for text in ("", "[]", "{}"):
        (tmp_path / MANIFEST).write_text(text)
        assert not Bundle.is_alone(tmp_path)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    digest = write_manifest(tmp_path, manifest())
    assert read_manifest(tmp_path) == {"format": "bismooth-bundle", "version": 1, **manifest(), "sha256": digest}
    assert Bundle.is_alone(tmp_path)
    (tmp_path / "more").touch()
    assert not Bundle.is_alone(tmp_path)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    with pytest.raises(ValueError, match="'name' is a required property"):
        write_manifest(tmp_path, {key: value for key, value in manifest().items() if key != "name"})


def test_a_replacement_that_was_cut_off_is_undone(folder: Path) -> None:
    folder.rename(folder.parent / f".{folder.name}.previous")
    assert Bundle.load(folder).name == "tiny-w8a8"
