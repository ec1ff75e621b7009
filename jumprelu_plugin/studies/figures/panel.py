"""Figures of several panels, as PNG, as SVG, and panel by panel for a page.

A panel draws on axes that it is given, so that the same code makes a figure with all its panels in
one image and a page whose panels stand beside or below each other, as wide as the screen allows.
matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jumprelu_plugin.records import whole_files

# Inches. A panel is 400 CSS pixels wide, three beside each other at 1280 and one at 390.
_WIDTH, _HEIGHT, _ROW = 4.17, 3.1, 0.21
_LETTERS = 50  # of a title, in a line
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e0",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # a label may hold dollar signs
    "svg.fonttype": "none",  # text stays text: it can be read, searched and copied
    "figure.dpi": 100,
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above the axes.
        draw: draws on the axes, and sets their labels.
    """

    title: str
    draw: Callable[[Any], None]


@dataclass(frozen=True)
class Figure:
    """Panels that belong together.

    Attributes:
        name: of its files.
        title: what it shows.
        caption: how to read it, in a sentence or two.
        panels: at least one.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]


def save_figures(figures: Sequence[Figure], folder: str | Path) -> list[Path]:
    """Write every figure as NAME.png and NAME.svg, all or none.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder = Path(folder)
    require_matplotlib()
    with whole_files(folder) as unfinished:
        for figure in figures:
            drawn = _composed(figure)
            for suffix in ("png", "svg"):
                _save(drawn, unfinished / f"{figure.name}.{suffix}", figure.name)
    return [folder / f"{f.name}.{suffix}" for f in figures for suffix in ("png", "svg")]


def panel_svg(figure: Figure, number: int) -> str:
    """One panel as an SVG element that takes the width it is given."""
    panel = figure.panels[number]
    with _style(f"{figure.name}-{number}"):
        drawn = _empty(1)
        axes = drawn.subplots()
        _draw(panel, axes)
        _legend(drawn, [axes])
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The page sets the size; the view box keeps the proportions.
    head, rest = svg.split(">", 1)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    return f'{head} role="img">{rest}'


def plain_log_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers: an exponent would be too small to read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = sorted(axis.get_data_interval())
    wide = low > 0 and high / low > 1e3
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def require_matplotlib() -> None:
    """Raise ImportError, with what to install, if matplotlib is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'jumprelu-plugin[plot]'") from error


@contextmanager
def _style(salt: str) -> Iterator[None]:
    import matplotlib

    # The salt makes ids in an SVG the same at every drawing, and different from panel to panel.
    settings: dict[Any, Any] = {**_STYLE, "svg.hashsalt": salt}
    with matplotlib.rc_context(settings):
        yield


def _composed(figure: Figure) -> Any:
    with _style(figure.name):
        columns = min(3, len(figure.panels))
        rows = -(-len(figure.panels) // columns)
        drawn = _empty(rows, columns)
        axes = drawn.subplots(rows, columns, squeeze=False).flatten().tolist()
        for panel, ax in zip(figure.panels, axes, strict=False):
            _draw(panel, ax)
        for unused in axes[len(figure.panels) :]:
            unused.set_axis_off()
        drawn.suptitle(figure.title)
        _legend(drawn, axes[: len(figure.panels)])
    return drawn


def _empty(rows: int, columns: int = 1) -> Any:
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained")


def _draw(panel: Panel, axes: Any) -> None:
    panel.draw(axes)
    axes.set_title("\n".join(textwrap.wrap(panel.title, _LETTERS)))
    axes.set_axisbelow(True)


def _legend(drawn: Any, axes: Sequence[Any]) -> None:
    """The labels of all axes, once each, below them; where there is but one, none."""
    found: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if len(found) < 2:
        return
    width, height = drawn.get_size_inches()
    # Of the font that is used a letter is about 0.068 inches wide, a line with its gaps 0.6.
    columns = max(1, int(width / (0.6 + 0.068 * max(map(len, found)))))
    rows = -(-len(found) // columns)
    drawn.set_size_inches(width, height + _ROW * rows)
    drawn.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


def _save(drawn: Any, path: Path, salt: str) -> None:
    with _style(salt):
        if path.suffix == ".svg":
            drawn.savefig(path, metadata={"Date": None, "Creator": None})
        else:
            drawn.savefig(path, dpi=150)
