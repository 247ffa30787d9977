"""``chain.json``: what it says, and what is no such file."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bismooth.engines.chain import CHAIN, BuiltPart, Carried, Chain
from bismooth.export.errors import BismoothError

DOCS = Path(__file__).parents[2] / "docs"
HIDDEN = Carried("hidden", "float16", ("batch", "sequence", 8))


def part(number: int, reads: Carried | None, gives: Carried | None, **changes: Any) -> BuiltPart:
    name = f"part-{number:02}"
    fields: dict[str, Any] = {"name": name, "holds": "blocks", "blocks": (number, number + 1), "file": f"{name}.engine"}
    fields |= {"sha256": "00", "reads": reads, "gives": gives, "inputs": ("x",), "outputs": ("y",), "linears": ("fc",)}
    fields |= {"weights_bytes": 1, "estimated_memory_bytes": 2, "peak_rss_bytes": None, "build_seconds": 0.5}
    return BuiltPart(**fields | changes)


def write(folder: Path, document: object) -> Path:
    (folder / CHAIN).write_text(json.dumps(document))
    return folder / CHAIN


def test_what_is_written_is_read(tmp_path: Path) -> None:
    chain = Chain((part(0, None, HIDDEN, blocks=None), part(1, HIDDEN, None)))
    assert Chain.load(write(tmp_path, chain.to_json())) == chain


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((), "it has no parts"),
        ((part(0, None, HIDDEN), part(1, None, None)), "part-01 does not read what part-00 gives"),
        ((part(0, None, None), part(1, None, None)), "part-01 does not read what part-00 gives"),
        ((part(0, None, None, file="../part-00.engine"),), "it names a file outside of its folder: ../part-00"),
    ],
)
def test_parts_that_do_not_fit_together(tmp_path: Path, parts: tuple[BuiltPart, ...], reason: str) -> None:
    path = write(tmp_path, Chain(parts).to_json())
    with pytest.raises(BismoothError, match=rf"chain\.json: not a chain of engines: {reason}.* Build the engine again"):
        Chain.load(path)


HEADER: dict[str, Any] = {"format": "bismooth-chain", "version": 1}
OTHERS: list[Any] = [[], {}, HEADER | {"version": 2, "parts": []}, HEADER | {"parts": [{}]}]


@pytest.mark.parametrize("document", OTHERS)
def test_other_files(tmp_path: Path, document: object) -> None:
    with pytest.raises(BismoothError, match=r"chain\.json: not a chain of engines"):
        Chain.load(write(tmp_path, document))
    with pytest.raises(BismoothError, match=r"not a chain of engines: .*No such file"):
        Chain.load(tmp_path / "absent" / CHAIN)


def test_the_documented_keys_are_those_written() -> None:
    text = (DOCS / "parts.md").read_text("utf-8").split("## chain.json")[1].split("##")[0]
    keys = {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert keys == set(asdict(part(0, None, None)))
