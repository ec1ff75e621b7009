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
    """Rows of text under a header; numbers are already written as text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of a report, shown in this order: title, text, figures, tables, markup.

    Attributes:
        title: in the page's list of contents.
        text: plain text.
        figures: what `figures.panel` draws.
        tables: as wide as they need; a narrow screen scrolls them.
        html: further markup, which the caller has made safe.
    """

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    html: str = ""


def write_report(
    path: str | Path, title: str, sections: Sequence[Section], *, subtitle: str = ""
) -> Path:
    """Write a page to `path`, in one atomic step; parents are created.

    Raises:
        ValueError: there are no sections.
        ImportError: there are figures, and matplotlib is not installed.
    """
    if not sections:
        raise ValueError("a report needs at least one section")
    if any(section.figures for section in sections):
        require_matplotlib()
    environment = Environment(
        loader=PackageLoader("jumprelu_plugin.studies", "."),
        autoescape=True,
        undefined=StrictUndefined,
    )
    shown = [
        {
            "anchor": f"section-{number}",
            "title": section.title,
            "text": section.text,
            "figures": [_drawn(figure) for figure in section.figures],
            "tables": section.tables,
            "html": Markup(section.html),
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
