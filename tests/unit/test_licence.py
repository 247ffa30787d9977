"""Where the licence of a model is looked for, and what is read there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from bismooth.export.artifact import Artifact
from bismooth.export.errors import BismoothError
from bismooth.tools.licence import Licence, find_licence, licence_of_card
from tests.artifacts import FLOAT


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def artifact_of(source: str | Path, files: dict[str, int], folder: Path) -> Artifact:
    folder.mkdir(exist_ok=True)
    recorded = {name: {"size": size, "mtime_ns": 0} for name, size in files.items()}
    return Artifact(folder, replace(FLOAT, source={"path": str(source), "files": recorded}))


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model\n", "apache-2.0"),
        ("---\ntags: [a]\nlicense: mit\nlanguage: en\n---", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [mit, cc-by-4.0]\n---\n", "mit, cc-by-4.0"),
        ("---\nlicense: []\n---\n", None),
        ("---\nlicense: 5\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("# Model\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_the_header_of_a_model_card(text: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert licence_of_card(tmp_path / "README.md") == licence


def test_a_card_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---\n")
    assert licence_of_card(tmp_path / "README.md") is None


def test_places(source: Path, tmp_path: Path) -> None:
    """The artifact comes first, and what the user states before all."""
    artifact = artifact_of(source, {"model.safetensors": 7}, tmp_path / "art")
    assert find_licence(artifact) == Licence(None, None, ())
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("LICENSE.txt", "NOTICE"):
        (source / name).write_text("text")
    texts = (source / "LICENSE.txt", source / "NOTICE")
    assert find_licence(artifact) == Licence("mit", "README.md", texts)
    assert find_licence(artifact, "apache-2.0") == Licence("apache-2.0", "--licence", texts)
    (artifact.path / "README.md").write_text("---\nlicense: bsd\n---\n")
    (artifact.path / "LICENCE").write_text("text")
    assert find_licence(artifact) == Licence("bsd", "README.md", (artifact.path / "LICENCE",))


def test_a_file_beside_which_the_licence_lies(source: Path, tmp_path: Path) -> None:
    (source / "LICENSE").write_text("text")
    artifact = artifact_of(source / "model.safetensors", {"model.safetensors": 7}, tmp_path / "art")
    assert find_licence(artifact).files == (source / "LICENSE",)


@pytest.mark.parametrize("files", [{"model.safetensors": 8}, {"other.safetensors": 7}, {}])
def test_a_source_that_is_another_by_now(source: Path, tmp_path: Path, files: dict[str, int]) -> None:
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    assert find_licence(artifact_of(source, files, tmp_path / "art")) == Licence(None, None, ())


@pytest.mark.parametrize("path", ["org/model", "/nowhere/model", ""])
def test_a_source_that_is_not_here(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/model").mkdir(parents=True)
    (tmp_path / "org/model/LICENSE").write_text("text")
    assert find_licence(artifact_of(path, {"LICENSE": 4}, tmp_path / "art")) == Licence(None, None, ())


def test_a_gguf_file(source: Path, tmp_path: Path) -> None:
    import gguf

    path = source / "model.gguf"
    for name, licence in (("mit", "mit"), ("none", None)):
        writer = gguf.GGUFWriter(path, "llama")
        if licence:
            writer.add_license(licence)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        artifact = artifact_of(path, {"model.gguf": path.stat().st_size}, tmp_path / name)
        assert find_licence(artifact) == Licence(licence, licence and "model.gguf", ())
    path.write_bytes(b"no GGUF")
    with pytest.raises(BismoothError, match=r"model\.gguf"):
        find_licence(artifact_of(path, {"model.gguf": 7}, tmp_path / "broken"))


@pytest.mark.parametrize("stated", ["", "not a licence!!", "mit\nfoo: bar", " mit"])
def test_what_is_no_identifier_is_refused(source: Path, tmp_path: Path, stated: str) -> None:
    message = f"--licence {stated!r}: Expected an identifier such as apache-2.0 or 'MIT OR Apache-2.0'."
    with pytest.raises(BismoothError, match=re.escape(message)):
        find_licence(artifact_of(source, {}, tmp_path / "art"), stated)


def test_expressions_are_identifiers(source: Path, tmp_path: Path) -> None:
    artifact = artifact_of(source, {}, tmp_path / "art")
    assert find_licence(artifact, "GPL-2.0-only WITH Classpath-exception-2.0 OR MIT").id is not None
