"""The stages behind the command line, as fakes that only record how they were called."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

import bismooth.tools
from bismooth.tools import cli

COMMANDS = [
    "export",
    "calibrate",
    "quantize",
    "build",
    "verify",
    "compare",
    "inspect",
    "compile",
    "diagnose",
    "standin",
    "generate",
    "bench",
    "package",
    "cache",
]
INTERRUPTED = (
    "Interrupted. Nothing is half-written. Run the command again; 'compile', 'calibrate', 'quantize' and 'verify' go "
    "on from here"
)
USAGE = {
    "export": "export model -o art",
    "calibrate": "calibrate art --data a.txt",
    "quantize": "quantize art -o art2",
    "build": "build art --engine onnxruntime",
    "verify": "verify art --data a.txt",
    "compare": "compare art art2 --data a.txt",
    "inspect": "inspect art",
    "diagnose": "diagnose model",
    "standin": "standin model -o bad",
    "generate": "generate engine --prompt text",
    "bench": "bench engine --gpu L4",
    "package": "package art -o bundle",
    "cache": "cache --clear art",
    "compile": "compile model --engine onnxruntime --data a.txt -o art",
}


@dataclass(frozen=True)
class Done:
    document: Mapping[str, Any]
    interrupted: bool = False

    def to_json(self) -> Mapping[str, Any]:
        return self.document


@dataclass
class Stages:
    """Stands in for the modules of ``bismooth.tools`` that the commands call."""

    outcome: Mapping[str, Any] | BaseException = field(default_factory=lambda: {"size_bytes": 2_000_000})
    name: str = ""
    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict[str, Any])

    def __getattr__(self, name: str) -> Any:
        def stage(*positional: Any, **named: Any) -> Done:
            self.name, self.positional, self.named = name, positional, named
            if isinstance(self.outcome, BaseException):
                raise self.outcome
            return Done(self.outcome)

        return stage


def fake_stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    """Put it in their place."""
    fake = Stages()
    names = (
        "stages",
        "pipeline",
        "compare",
        "diagnose",
        "standin",
        "generate",
        "chat",
        "bench_engines",
        "package",
        "cache",
    )
    for module in names:
        monkeypatch.setitem(sys.modules, f"bismooth.tools.{module}", fake)
        monkeypatch.setattr(bismooth.tools, module, fake, raising=False)
    return fake


def run(line: str) -> int:
    """The exit status of a command line."""
    return cli.main(line.split())
