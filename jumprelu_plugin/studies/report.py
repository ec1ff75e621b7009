"""One self-contained page of sections: text, figures and tables, without network or scripts.

A study gives `Section`s; this module does not know what is in them. Panels of figures stand beside
each other on a wide screen and below each other on a narrow one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from jumprelu_plugin.records import write_text
from jumprelu_plugin.studies.figures.panel import Figure, panel_svg, require_matplotlib

_TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; numbers are already written as text.

    Attributes:
        prose: whether cells hold sentences, which are broken into lines, instead of numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a report, shown in this order: title, paragraphs, figures, tables.

    Attributes:
        title: in the page's list of contents.
        paragraphs: plain text.
        figures: what `figures.panel` draws.
        tables: as wide as they need; a narrow screen scrolls them.
    """

    title: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


def write_report(
    path: str | Path, title: str, sections: Sequence[Section], *, subtitle: str = ""
) -> Path:
    """Write a page to `path`, in one atomic step; parents are created. All text is escaped.

    Raises:
        ValueError: there are no sections, or two figures have one name.
        ImportError: there are figures, and matplotlib is not installed.
    """
    if not sections:
        raise ValueError("a report needs at least one section")
    names = [figure.name for section in sections for figure in section.figures]
    if names:
        require_matplotlib()
    if len(set(names)) < len(names):  # the drawings' ids begin with them
        raise ValueError(f"two figures of a report have one name: {', '.join(sorted(names))}")
    environment = Environment(
        loader=PackageLoader("jumprelu_plugin.studies", "."),
        autoescape=True,
        undefined=StrictUndefined,
    )
    shown = [
        {
            "anchor": f"section-{number}",
            "title": section.title,
            "paragraphs": section.paragraphs,
            "figures": [_drawn(figure) for figure in section.figures],
            "tables": section.tables,
        }
        for number, section in enumerate(sections, 1)
    ]
    page = environment.get_template(_TEMPLATE).render(
        title=title, subtitle=subtitle, sections=shown
    )
    return write_text(path, page)


def _drawn(figure: Figure) -> dict[str, object]:
    panels = [
        {"title": panel.title, "svg": Markup(panel_svg(figure, number))}
        for number, panel in enumerate(figure.panels)
    ]
    return {"title": figure.title, "caption": figure.caption, "panels": panels}
