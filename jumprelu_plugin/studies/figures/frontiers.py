"""A number against L0 at every site: the frontiers, and dead and dense latents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jumprelu_plugin.studies.figures.groups import (
    Record,
    architectures,
    by_target,
    places,
    record_look,
    with_field,
)
from jumprelu_plugin.studies.figures.panel import Figure, Panel, plain_log_ticks

_SEEDS = "Points are means over seeds at one target L0; bars reach from the least to the greatest."


def delta_lm_loss(records: Iterable[Record]) -> Figure | None:
    """Delta LM loss against L0, a panel for each site."""
    return _against_l0(
        records,
        "delta_lm_loss",
        "delta LM loss (nats)",
        name="frontier_delta_lm_loss",
        title="Delta LM loss against L0",
        caption="Loss of the model with the reconstruction in place, less its loss without; lower "
        f"is better. {_SEEDS}",
        log=True,
    )


def fvu(records: Iterable[Record]) -> Figure | None:
    """FVU against L0, a panel for each site."""
    return _against_l0(
        records,
        "fvu",
        "fraction of variance unexplained",
        name="frontier_fvu",
        title="FVU against L0",
        caption=f"Share of the activations' variance that is lost; lower is better. {_SEEDS}",
        log=True,
    )


def dense_latents(records: Iterable[Record]) -> Figure | None:
    """Share of latents active on more than a tenth of the tokens, against L0."""
    return _against_l0(
        records,
        "share_above_10_percent",
        "share of latents",
        name="dense_latents",
        title="Latents active on more than 10 % of tokens",
        caption=f"Latents that fire so often are hard to interpret. {_SEEDS}",
        percent=True,
    )


def dead_latents(records: Iterable[Record]) -> Figure | None:
    """Share of latents that fire on no held-out token, against L0."""
    return _against_l0(
        records,
        "dead_share",
        "share of latents",
        name="dead_latents",
        title="Latents that fire on no held-out token",
        caption=f"With few held-out tokens, rare latents count as dead too. {_SEEDS}",
        percent=True,
    )


def uniformity(records: Iterable[Record]) -> Figure | None:
    """Uniformity of the active latents' importance, against L0."""
    return _against_l0(
        records,
        "uniformity",
        "exp(entropy) / L0",
        name="uniformity",
        title="Uniformity of the active latents' importance",
        caption="1 where all active latents of a token matter alike to the next-token loss (after "
        f"Gemma Scope, arXiv 2408.05147). {_SEEDS}",
    )


def _against_l0(
    records: Iterable[Record],
    field: str,
    label: str,
    *,
    name: str,
    title: str,
    caption: str,
    log: bool = False,
    percent: bool = False,
) -> Figure | None:
    found = places(with_field(records, field))
    panels = [
        Panel(place, lambda axes, here=here: _curves(axes, here, field, label, log, percent))
        for place, here in found.items()
    ]
    return Figure(name, title, caption, panels) if panels else None


def _curves(
    axes: Any, records: list[Record], field: str, label: str, log: bool, percent: bool
) -> None:
    positive = all(record[field] > 0 for record in records)
    for architecture, own in architectures(records).items():
        points = by_target(own, field)
        xs, ys = [l0.mean for l0, _ in points], [value.mean for _, value in points]
        axes.errorbar(
            xs,
            ys,
            xerr=[[p[0].mean - p[0].low for p in points], [p[0].high - p[0].mean for p in points]],
            yerr=[[p[1].mean - p[1].low for p in points], [p[1].high - p[1].mean for p in points]],
            label=architecture,
            elinewidth=1,
            **record_look(own[0]),
        )
    axes.set_xlabel("L0")
    axes.set_ylabel(label)
    axes.set_xscale("log")
    plain_log_ticks(axes.xaxis)
    if log and positive:
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    if percent:
        from matplotlib.ticker import PercentFormatter

        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.set_ylim(bottom=0)
