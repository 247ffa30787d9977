"""What a lint rule is: a function that finds nodes and says, for each, what goes wrong and what to do instead."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from .lint_view import View

Target = Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]
"""The runtime that a graph is meant for."""
TENSORRT: frozenset[Target] = frozenset({"tensorrt", "tensorrt-rtx"})
ONNXRUNTIME: frozenset[Target] = frozenset({"onnxruntime"})
ANY: frozenset[Target] = TENSORRT | ONNXRUNTIME


class Severity(StrEnum):
    """Whether a finding makes a graph wrong or unusable, or only slower or less accurate than it looks."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: the rule, how bad, the node (or value) and a message with consequence and remedy."""

    rule: str
    severity: Severity
    node: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.node}: {self.message} [{self.rule}]"


Hit = tuple[str, str]
"""A node's name and the message about it."""
Check = Callable[[View], Iterator[Hit]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule and where it applies; its text is the docstring of its function."""

    name: str
    severity: Severity
    targets: frozenset[Target]
    check: Check

    def findings(self, view: View) -> Iterator[Finding]:
        """What the rule finds in a model."""
        for node, message in self.check(view):
            yield Finding(self.name, self.severity, node, message)


RULES: list[Rule] = []
"""All rules, in the order in which they are applied."""


def error(name: str, targets: frozenset[Target] = TENSORRT) -> Callable[[Check], Check]:
    """Register a function as a rule whose findings are errors."""
    return _register(name, Severity.ERROR, targets)


def warning(name: str, targets: frozenset[Target] = TENSORRT) -> Callable[[Check], Check]:
    """Register a function as a rule whose findings are warnings."""
    return _register(name, Severity.WARNING, targets)


def _register(name: str, severity: Severity, targets: frozenset[Target]) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        RULES.append(Rule(name, severity, targets, check))
        return check

    return register
