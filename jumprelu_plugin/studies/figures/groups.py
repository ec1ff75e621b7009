"""Records grouped for figures: by site and architecture, seeds together."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]

# Okabe and Ito's colors, which the color-blind can tell apart.
_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")
_MARKERS = "osD^vPX"
# Of the labels of one architecture: how far the color is on its way to white (or, below 0, to
# black), and the line.
_SHADES = (0.0, 0.5, -0.5, 0.7, -0.75)
_LINES = ("-", "--", ":", "-.")
_ORDER = (
    "jumprelu-plugin",
    "batchtopk",
    "topk",
    "gated",
    "matryoshka_batchtopk",
    "standard",
    "jumprelu",
)


@dataclass(frozen=True)
class Spread:
    """The mean of a number over seeds, and its smallest and largest value."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        values = list(values)
        return cls(statistics.fmean(values), min(values), max(values))


def places(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each site, by a title: the hook, and the model where there are several."""
    records = list(records)
    several = len({record.get("model") for record in records}) > 1
    found: dict[str, list[Record]] = {}
    for record in records:
        site = record["site"]
        title = f"{record.get('model')} {site}" if several else site
        found.setdefault(title, []).append(record)
    return found


def architectures(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each architecture, in the order in which they are drawn."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["architecture"], []).append(record)
    return dict(sorted(found.items(), key=lambda item: (*_place(item[1][0]), item[0])))


def with_field(records: Iterable[Record], name: str) -> list[Record]:
    """Those in which a field is there and not None."""
    return [record for record in records if record.get(name) is not None]


def by_target(records: Iterable[Record], field: str) -> list[tuple[Spread, Spread]]:
    """(L0, field) at every target L0, over seeds."""
    found: dict[float, list[Record]] = {}
    for record in with_field(records, field):
        found.setdefault(record["target_l0"], []).append(record)
    return [
        (Spread.of(r["l0"] for r in group), Spread.of(r[field] for r in group))
        for _, group in sorted(found.items())
    ]


def middle_target(records: Iterable[Record]) -> float:
    """The target L0 in the middle of those there are."""
    targets = sorted({record["target_l0"] for record in records})
    return targets[len(targets) // 2] if len(targets) % 2 else targets[len(targets) // 2 - 1]


def at_target(records: Iterable[Record], target: float) -> list[Record]:
    """The records of a target L0."""
    return [record for record in records if record["target_l0"] == target]


def look(architecture: str, variant: int = 0) -> dict[str, Any]:
    """Color, marker and line of an architecture, the same in all figures.

    Args:
        architecture: its name.
        variant: tells several labels of one architecture apart.
    """
    rank = _rank(architecture)
    return {
        "color": _shaded(_COLORS[rank % len(_COLORS)], _SHADES[variant % len(_SHADES)]),
        "marker": _MARKERS[(rank + variant) % len(_MARKERS)],
        "linestyle": _LINES[variant % len(_LINES)],
    }


def record_look(record: Record) -> dict[str, Any]:
    """The look of a record's label."""
    return look(*_drawn_as(record))


def color(architecture: str) -> str:
    """The color of an architecture."""
    return look(architecture)["color"]


def _shaded(color: str, share: float) -> str:
    target = 255 if share > 0 else 0
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(p + abs(share) * (target - p)):02x}" for p in parts)


def _drawn_as(record: Record) -> tuple[str, int]:
    """The architecture, and the number of the label among its labels."""
    return record.get("drawn_as") or (record["architecture"], 0)


def _place(record: Record) -> tuple[int, str, int]:
    name, variant = _drawn_as(record)
    return _rank(name), name, variant


def _rank(architecture: str) -> int:
    """Of the name before what is in parentheses, with which some records qualify it."""
    name = architecture.split(" (")[0]
    return _ORDER.index(name) if name in _ORDER else len(_ORDER) + sum(map(ord, architecture))
