"""Histograms of latent densities and thresholds, for one target L0 at every site."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from jumprelu_plugin.studies.figures.groups import (
    Record,
    architectures,
    at_target,
    middle_target,
    places,
    record_look,
    with_field,
)
from jumprelu_plugin.studies.figures.panel import Figure, Panel, plain_log_ticks
from jumprelu_plugin.studies.sweep.measures import DENSITY_EDGES


def densities(records: Iterable[Record]) -> Figure | None:
    """How often latents fire, for each architecture."""
    return _at_middle_target(
        with_field(records, "density_histogram"),
        _densities,
        name="latent_densities",
        title="Latent densities",
        caption="Share of held-out tokens on which a latent fires, latents counted by tenths of a "
        "decade and averaged over seeds. The dotted line is at 10 %.",
    )


def _densities(axes: Any, records: list[Record]) -> None:
    for architecture, own in architectures(records).items():
        counts = np.mean([record["density_histogram"] for record in own], 0)
        own_look = record_look(own[0])
        axes.stairs(
            counts,
            DENSITY_EDGES,
            label=architecture,
            color=own_look["color"],
            linestyle=own_look["linestyle"],
            lw=1.4,
        )
    used = [i for r in records for i, count in enumerate(r["density_histogram"]) if count]
    axes.set_xlim(DENSITY_EDGES[max(0, min(used, default=0) - 2)], 0.05)
    axes.axvline(-1, color="#888888", ls=":", lw=1)
    axes.set_xlabel("log10 density")
    axes.set_ylabel("latents")


def thresholds(records: Iterable[Record]) -> Figure | None:
    """The thresholds of JumpReLU SAEs, which differ from latent to latent."""
    return _at_middle_target(
        [record for record in with_field(records, "threshold_histogram") if _differ(record)],
        _thresholds,
        name="thresholds",
        title="Thresholds",
        caption="Latents by their threshold, in units of the activations. The first seed of each "
        "architecture that is saved with a threshold for each latent.",
    )


def _at_middle_target(
    records: list[Record],
    draw: Callable[[Any, list[Record]], None],
    *,
    name: str,
    title: str,
    caption: str,
) -> Figure | None:
    """A panel for each site, of the records at the middle one of their target L0s."""
    if not records:
        return None
    target = middle_target(records)
    panels = [
        Panel(place, lambda axes, here=here: draw(axes, here))
        for place, here in places(at_target(records, target)).items()
    ]
    return Figure(name, f"{title}, target L0 {target:g}", caption, panels)


def _differ(record: Record) -> bool:
    """Whether latents have thresholds of their own; batchtopk is saved with one for all."""
    return sum(map(bool, record["threshold_histogram"]["counts"])) > 1


def _thresholds(axes: Any, records: list[Record]) -> None:
    for architecture, own in architectures(records).items():
        found = min(own, key=lambda record: record["seed"])["threshold_histogram"]
        axes.stairs(
            found["counts"],
            found["edges"],
            label=architecture,
            color=record_look(own[0])["color"],
            fill=True,
            alpha=0.45,
        )
    if all(record["threshold_histogram"]["edges"][0] > 0 for record in records):
        axes.set_xscale("log")  # architectures differ tenfold, as their latents' scales do
        plain_log_ticks(axes.xaxis)
    axes.set_xlabel("threshold")
    axes.set_ylabel("latents")
