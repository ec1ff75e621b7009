"""Bars of the raters' answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jumprelu_plugin.models.extras import require_extra
from jumprelu_plugin.studies.rating.agreement import LabelRatings
from jumprelu_plugin.studies.rating.ratings import RATINGS

_COLORS = {"yes": "#1b7f5c", "maybe": "#d9a520", "no": "#b3412e"}


def rating_bars(labels: Mapping[str, LabelRatings]) -> Any:
    """Three bars a group, with intervals; a matplotlib figure."""
    figure_class = require_extra("matplotlib.figure", "studies").Figure
    figure = figure_class(figsize=(max(5.0, 1.7 * len(labels) + 2), 3.4))
    axes = figure.add_subplot()
    for offset, rating in enumerate(RATINGS):
        shares = [own.shares[rating] for own in labels.values()]
        places = [i + 0.27 * (offset - 1) for i in range(len(labels))]
        axes.bar(
            places,
            [s.share for s in shares],
            width=0.25,
            color=_COLORS[rating],
            label=rating,
            yerr=[
                [max(0.0, s.share - s.low) for s in shares],
                [max(0.0, s.high - s.share) for s in shares],
            ],
            error_kw={"lw": 1, "capsize": 3},
        )
    axes.set_xticks(range(len(labels)), list(labels))
    axes.set(ylim=(0, 1), ylabel="share of latents")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    return figure
