"""Violins of correlations beside their nulls, and correlation against latent density."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jumprelu_plugin.models.extras import require_extra
from jumprelu_plugin.studies.explain.scoring import ScoredLatent

_KINDS = {
    "correlation": ("explanation", "#d95f02"),
    "shuffled": ("another latent's explanation", "#8a8f98"),
    "random_token": ("random token", "#c9ccd1"),
}


def correlation_violins(by_label: Mapping[str, Sequence[ScoredLatent]]) -> Any:
    """A violin a group and kind of explanation, with medians; a matplotlib figure."""
    figure = _figure(max(5.5, 2.1 * len(by_label) + 2), 3.8)
    axes = figure.add_subplot()
    for offset, (name, (label, color)) in enumerate(_KINDS.items()):
        found = [
            [v for each in own if (v := getattr(each, name)) is not None]
            for own in by_label.values()
        ]
        places = [i + 0.28 * (offset - 1) for i in range(len(by_label))]
        drawn = [(p, v) for p, v in zip(places, found, strict=True) if len(v) > 1]
        if not drawn:
            continue
        parts = axes.violinplot(
            [v for _, v in drawn], [p for p, _ in drawn], widths=0.26, showmedians=True
        )
        for body in parts["bodies"]:
            body.set(facecolor=color, alpha=0.75)
        for part in ("cmedians", "cmins", "cmaxes", "cbars"):
            parts[part].set(color="#333", linewidth=1)
        axes.plot([], [], color=color, lw=6, label=label)
    axes.axhline(0, color="#999", lw=0.8)
    axes.set_xticks(range(len(by_label)), list(by_label))
    axes.set_ylabel("correlation of simulated\nand true activations")
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}
    axes.legend(frameon=False, fontsize=8, **above)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def density_scatter(by_label: Mapping[str, Sequence[ScoredLatent]]) -> Any:
    """Correlation against latent density, a color a group; a matplotlib figure."""
    figure = _figure(6.0, 3.6)
    axes = figure.add_subplot()
    for label, own in by_label.items():
        points = [(e.density, e.correlation) for e in own if e.correlation is not None]
        axes.scatter([d for d, _ in points], [c for _, c in points], s=14, alpha=0.7, label=label)
    axes.set(xscale="log", xlabel="latent density", ylabel="correlation")
    axes.axhline(0, color="#999", lw=0.8)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _figure(width: float, height: float) -> Any:
    return require_extra("matplotlib.figure", "studies").Figure(figsize=(width, height))
