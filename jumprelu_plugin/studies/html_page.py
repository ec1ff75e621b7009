"""A report as one HTML file that loads nothing: paragraphs, tables and figures under headings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from jumprelu_plugin.records import write_text
from jumprelu_plugin.studies.report import Table


@dataclass(frozen=True)
class Section:
    """A part of a report: paragraphs, then figures with captions, then tables.

    Attributes:
        figures: matplotlib figures and their captions.
    """

    title: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[tuple[Any, str]] = ()
    tables: Sequence[Table] = field(default=())


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Write a report to `path` in one atomic step; all text is escaped."""
    environment = Environment(
        loader=PackageLoader("jumprelu_plugin.studies", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("html_page.html.j2")
    drawn = [(s, [(_svg(figure), caption) for figure, caption in s.figures]) for s in sections]
    return write_text(path, page.render(title=title, sections=drawn))


def _svg(figure: Any) -> Markup:
    """A matplotlib figure as SVG markup; its text is drawn, and matplotlib escapes it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])
