"""Violins of correlations beside their nulls, and correlation against latent density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jumprelu_plugin.studies.explain.scoring import ScoredLatent
from jumprelu_plugin.studies.figures.groups import color
from jumprelu_plugin.studies.figures.panel import Figure, Panel, plain_log_ticks

Groups = Mapping[str, Sequence[ScoredLatent]]

_KINDS = {
    "correlation": "From the explanation",
    "shuffled": "Null: from another latent's",
    "random_token": "Null: from a random token",
}
_CORRELATION = "correlation with true activations"


def correlation_violins(by_label: Groups, explained_above: float | None) -> Figure | None:
    """A panel for each kind of explanation, a violin for each group; None without correlations.

    Args:
        by_label: the latents of each group.
        explained_above: where a line is drawn in each panel.
    """
    found = {
        name: {label: values for label, own in by_label.items() if (values := _values(own, name))}
        for name in _KINDS
    }
    every = [v for groups in found.values() for values in groups.values() for v in values]
    if not every:
        return None
    margin = 0.05 * max(max(every) - min(every), 0.1)
    limits = min(0.0, min(every)) - margin, max(0.0, max(every)) + margin
    panels = [
        Panel(title, partial(_violins, found[name], list(by_label), limits, explained_above))
        for name, title in _KINDS.items()
        if found[name]
    ]
    line = "" if explained_above is None else (
        f" 95 % of all nulls lie below the dashed line, at {explained_above:.3f}."
    )  # fmt: skip
    return Figure(
        "explanation_correlations",
        "Activations predicted from explanations",
        "Pearson's correlation on held-out text, a violin over the latents of each SAE with a tick "
        f"at the median. An explanation says something where it does better than its nulls.{line}",
        panels,
    )


def correlation_by_density(by_label: Groups) -> Figure | None:
    """Correlation against latent density, a color a group; None without correlations."""
    points = {
        label: [(e.density, e.correlation) for e in own if e.correlation is not None]
        for label, own in by_label.items()
    }
    if not any(points.values()):
        return None
    return Figure(
        "explanation_density",
        "Correlation against latent density",
        "Each point is a latent; density is the share of tokens on which it fires.",
        [Panel("All latents", partial(_scatter, points))],
    )


def _values(latents: Sequence[ScoredLatent], name: str) -> list[float]:
    return [value for each in latents if (value := getattr(each, name)) is not None]


def _violins(
    found: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    limits: tuple[float, float],
    line: float | None,
    axes: Any,
) -> None:
    for place, label in enumerate(labels):
        values = found.get(label, [])
        if len(set(values)) > 1:  # a density needs two different values
            parts = axes.violinplot(
                [values], [place], orientation="horizontal", widths=0.8, showmedians=True
            )
            for body in parts["bodies"]:
                body.set(facecolor=color(label), alpha=0.7)
            for part in ("cmedians", "cmins", "cmaxes", "cbars"):
                parts[part].set(color="#333", linewidth=1)
        elif values:
            axes.plot(values, [place] * len(values), "|", color=color(label), markersize=12)
    axes.axvline(0, color="#999", lw=0.8)
    if line is not None:
        axes.axvline(line, color="#333", lw=0.8, ls="--")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(*limits)
    axes.set_xlabel(_CORRELATION)


def _scatter(points: Mapping[str, Sequence[tuple[float, float]]], axes: Any) -> None:
    for label, own in points.items():
        axes.scatter(
            [x for x, _ in own], [y for _, y in own], s=16, alpha=0.75, label=label,
            color=color(label),
        )  # fmt: skip
    axes.axhline(0, color="#999", lw=0.8)
    axes.set(xscale="log", xlabel="latent density", ylabel=_CORRELATION)
    plain_log_ticks(axes.xaxis)
