"""Bars of the raters' answers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from jumprelu_plugin.studies.figures.groups import color
from jumprelu_plugin.studies.figures.panel import Figure, Panel
from jumprelu_plugin.studies.rating.agreement import LabelRatings
from jumprelu_plugin.studies.rating.ratings import RATINGS


def rating_bars(labels: Mapping[str, LabelRatings]) -> Figure:
    """A panel for each answer, a bar for each group with its interval."""
    return Figure(
        "ratings",
        "Answers to “mostly one concept?”",
        "Shares of latents, with 95 % Wilson intervals.",
        [Panel(rating, partial(_bars, labels, rating)) for rating in RATINGS],
    )


def _bars(labels: Mapping[str, LabelRatings], rating: str, axes: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    shares = [own.shares[rating] for own in labels.values()]
    axes.barh(
        range(len(labels)),
        [share.share for share in shares],
        height=0.65,
        color=[color(label) for label in labels],
        xerr=[
            [max(0.0, share.share - share.low) for share in shares],
            [max(0.0, share.high - share.share) for share in shares],
        ],
        error_kw={"lw": 1, "capsize": 3},
    )
    axes.set_yticks(range(len(labels)), list(labels))
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of latents")
