"""A page of findings in one HTML file that needs nothing else: figures, tables, commands, and controls to choose views.

Figures are plain plotly.js figures. In them a colour may be the name of a custom property of ``page.css``, as
``"--bad"``: it then follows the reader's light or dark scheme.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from ..export.errors import BismoothError
from ..export.replacing import replacing

Plain: TypeAlias = Mapping[str, Any]

_HERE = Path(__file__).parent
_MARK = '<meta name="generator" content="bismooth">'


@dataclass(frozen=True)
class Figure:
    """A figure of plotly.js.

    Attributes:
        label: What it shows, in words: for those who do not see it.
        traces: As plotly.js takes them.
        layout: As plotly.js takes it; the page adds type, margins and the colours of its scheme.
    """

    label: str
    traces: Sequence[Plain]
    layout: Plain


@dataclass(frozen=True)
class View:
    """Figures that are shown together, and what to say of them.

    Attributes:
        name: What the control lists.
        figures: Side by side where there is room.
        text: Stands above them.
        group: Heading in the control's list.
    """

    name: str
    figures: Sequence[Figure]
    text: str = ""
    group: str = ""


@dataclass(frozen=True)
class Panel:
    """Views, of which one is shown, and the control that chooses it where there are several.

    Attributes:
        name: Its identifier, unique in the page.
        label: Of the control: what is chosen.
        views: At least one; the first is shown at first.
        height: Of the figures, in pixels.
        opens: Another panel: a click on a point shows the view there that the point's ``customdata`` names.
    """

    name: str
    label: str
    views: Sequence[View]
    height: int = 360
    opens: str | None = None

    @property
    def most_figures(self) -> int:
        """Of any view."""
        return max(len(view.figures) for view in self.views)


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; ``columns`` maps headings to how their numbers are formatted, "" for text."""

    columns: Mapping[str, str]
    rows: Sequence[Sequence[str | int | float]]


@dataclass(frozen=True)
class Command:
    """A command line, and what it does."""

    words: str
    line: str


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph, and what they introduce."""

    title: str
    text: str = ""
    blocks: Sequence[Panel | Table | Command] = ()


@dataclass(frozen=True)
class Page:
    """What a page says.

    Attributes:
        title: The heading.
        verdict: The finding in words, on top.
        good: Whether it is a good one.
        facts: Figures beside it, by name.
        sections: The rest.
    """

    title: str
    verdict: str
    good: bool
    facts: Mapping[str, str]
    sections: Sequence[Section]


def check_page(path: Path) -> None:
    """See, before the work, that a page can be made and may be written to ``path``.

    Raises:
        BismoothError: there is a file that is no page of bismooth.
        ModuleNotFoundError: the extra ``report`` is not installed.
    """
    _libraries()
    if path.is_file() and _MARK.encode() not in path.read_bytes()[:2000]:
        raise BismoothError(
            f"{path}: exists and is not a page of bismooth, so it is not replaced. Choose another place with --html."
        )


def write_page(path: Path, page: Page) -> None:
    """Write the page in one step.

    Raises:
        BismoothError: ``path`` cannot be written.
        ModuleNotFoundError: the extra ``report`` is not installed.
    """
    jinja2, plotly = _libraries()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests |= {"panel": _is(Panel), "table": _is(Table), "command": _is(Command)}
    environment.filters["formatted"] = format
    panels = [block for section in page.sections for block in section.blocks if isinstance(block, Panel)]
    text = environment.get_template("page.html").render(
        page=page,
        mark=_MARK,
        panels=_script({panel.name: asdict(panel) for panel in panels}),
        plotly=plotly.get_plotlyjs(),
    )
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def rounded(values: Iterable[float], digits: int = 4) -> list[float]:
    """Numbers with so many digits, which is what a screen shows: a file of half the size."""
    return [float(f"{value:.{digits}g}") for value in values]


def _libraries() -> tuple[Any, Any]:
    return import_module("jinja2"), import_module("plotly.offline")


def _is(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


def _script(document: Plain) -> str:
    """JSON that can stand in a script element."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
