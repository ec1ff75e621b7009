"""Compares groups of latents: odds ratios, rank tests and corrected p-values, from scipy.

Needs the `studies` extra.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from jumprelu_plugin.models.extras import require_extra
from jumprelu_plugin.studies.report import Table


@dataclass(frozen=True)
class Comparison:
    """Two groups of latents compared.

    Attributes:
        first, second: the groups' labels.
        difference: mean score of `first` minus that of `second`.
        odds_ratio: odds of a positive latent in `first` over those in `second`: the conditional
            maximum likelihood estimate. None where it is 0/0, of which the interval begins at 0, or
            infinite, of which it begins above 0: JSON has no infinity.
        odds_ratio_interval: its exact 95 % interval; an end is None where it is infinite.
        p_odds: Fisher's exact test, two-sided, Holm-corrected over all pairs.
        p_rank: Mann-Whitney U test of the scores, two-sided, Holm-corrected.
        p_paired: Wilcoxon signed-rank test of scores paired by density, Holm-corrected; None
            without pairs.
        pairs: number of pairs.
    """

    first: str
    second: str
    difference: float
    odds_ratio: float | None
    odds_ratio_interval: tuple[float | None, float | None]
    p_odds: float
    p_rank: float
    p_paired: float | None
    pairs: int


@dataclass(frozen=True)
class Group:
    """The latents of a group.

    Attributes:
        scores: a score for each latent.
        positive: whether each latent counts as positive.
        densities: each latent's density, by which latents of two groups are paired.
    """

    scores: Sequence[float]
    positive: Sequence[bool]
    densities: Sequence[float]


def compare_groups(groups: Mapping[str, Group]) -> list[Comparison]:
    """Compare every two groups; groups without latents are left out.

    Latents of different dictionaries have no natural partners. They are paired by rank of density,
    which both groups were sampled over evenly; where one group has more latents, its ranks are
    thinned evenly.
    """
    labels = [label for label, group in groups.items() if len(group.scores)]
    pairs = list(combinations(labels, 2))
    raw = [_compare(groups[a], groups[b]) for a, b in pairs]
    corrected = {
        name: _holm([each[name] for each in raw]) for name in ("p_odds", "p_rank", "p_paired")
    }
    return [
        Comparison(a, b, **{**values, **{name: corrected[name][i] for name in corrected}})
        for i, ((a, b), values) in enumerate(zip(pairs, raw, strict=True))
    ]


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """One row for every two groups."""
    rows = []
    for each in comparisons:
        rows.append(
            [
                f"{each.first} − {each.second}",
                f"{each.difference:+.3f}",
                _odds_ratio(each),
                f"{each.p_odds:.3g}",
                f"{each.p_rank:.3g}",
                "" if each.p_paired is None else f"{each.p_paired:.3g} ({each.pairs} pairs)",
            ]
        )
    header = ["", "difference of means", "odds ratio", "p (Fisher)", "p (Mann-Whitney)",
              "p (Wilcoxon, paired by density)"]  # fmt: skip
    return Table(header, rows)


def _compare(first: Group, second: Group) -> dict[str, Any]:
    stats = require_extra("scipy.stats", "studies")
    contingency = require_extra("scipy.stats.contingency", "studies")
    table = [[sum(g.positive), len(g.positive) - sum(g.positive)] for g in (first, second)]
    ratio = contingency.odds_ratio(table)
    interval = ratio.confidence_interval(0.95)
    x, y = _paired(first, second)
    differences = [a - b for a, b in zip(x, y, strict=True)]
    same = not any(differences)
    return {
        "difference": math.fsum(first.scores) / len(first.scores)
        - math.fsum(second.scores) / len(second.scores),
        "odds_ratio": _finite(ratio.statistic),
        "odds_ratio_interval": (_finite(interval.low), _finite(interval.high)),
        "p_odds": float(stats.fisher_exact(table).pvalue),
        "p_rank": float(stats.mannwhitneyu(first.scores, second.scores).pvalue),
        "p_paired": 1.0 if same else float(stats.wilcoxon(differences).pvalue),
        "pairs": len(x),
    }


def _paired(first: Group, second: Group) -> tuple[list[float], list[float]]:
    count = min(len(first.scores), len(second.scores))
    return _by_density(first, count), _by_density(second, count)


def _by_density(group: Group, count: int) -> list[float]:
    order = sorted(range(len(group.scores)), key=lambda i: group.densities[i])
    return [group.scores[order[int((i + 0.5) * len(order) / count)]] for i in range(count)]


def _holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction."""
    if not p_values:
        return []
    multitest = require_extra("statsmodels.stats.multitest", "studies")
    return [float(p) for p in multitest.multipletests(p_values, method="holm")[1]]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _odds_ratio(comparison: Comparison) -> str:
    low, high = comparison.odds_ratio_interval
    if comparison.odds_ratio is None and not low:
        return "not defined"
    return f"{_number(comparison.odds_ratio)} [{_number(low)}, {_number(high)}]"


def _number(value: float | None) -> str:
    return "∞" if value is None else f"{value:.2f}"
