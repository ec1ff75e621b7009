"""Means with bootstrap intervals, explanations against their nulls, and groups compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jumprelu_plugin.models.extras import require_extra
from jumprelu_plugin.studies.comparison import Comparison, Group, compare_groups
from jumprelu_plugin.studies.explain.scoring import ScoredLatent

SCORES = ("correlation", "random_token", "shuffled", "detection_auc", "detection_accuracy",
          "fuzzing_auc", "fuzzing_accuracy")  # fmt: skip
NULLS = ("random_token", "shuffled")
_RESAMPLES = 2000


@dataclass(frozen=True)
class Mean:
    """A mean over latents with its 95 % bootstrap interval.

    Attributes:
        mean: of the latents that have the score.
        low, high: the interval, bias-corrected and accelerated; None for fewer than two latents.
        weighted, weighted_low, weighted_high: each latent weighted by its density, with the
            percentile interval. They say how well what is active is explained.
        latents: number of latents.
    """

    mean: float
    low: float | None
    high: float | None
    weighted: float
    weighted_low: float | None
    weighted_high: float | None
    latents: int


@dataclass(frozen=True)
class AgainstNull:
    """Explanations against a null on the same latents and contexts.

    Attributes:
        difference: mean of correlation minus the null's.
        low, high: its 95 % bootstrap interval; None for fewer than two latents.
        p_paired: Wilcoxon's signed-rank test, two-sided.
        latents: number of latents that have both.
    """

    difference: float
    low: float | None
    high: float | None
    p_paired: float
    latents: int


@dataclass(frozen=True)
class LabelScores:
    """The scores of one group of SAEs.

    Attributes:
        means: by score.
        against: by null.
        unscored: number of latents without a correlation: the explainer or the simulator gave
            nothing that can be read, or the latent's held-out texts all stood among those shown.
    """

    means: dict[str, Mean]
    against: dict[str, AgainstNull]
    unscored: int


def label_scores(latents: Sequence[ScoredLatent], seed: int = 0) -> LabelScores:
    """The means and comparisons with the nulls of one group."""
    means = {}
    for name in SCORES:
        found = [(getattr(each, name), each.density) for each in latents]
        pairs = [(value, density) for value, density in found if value is not None]
        if pairs:
            means[name] = mean_with_interval(*map(list, zip(*pairs, strict=True)), seed=seed)
    against = {}
    for name in NULLS:
        pairs = [
            (each.correlation, getattr(each, name))
            for each in latents
            if each.correlation is not None and getattr(each, name) is not None
        ]
        if pairs:
            against[name] = _against(pairs, seed)
    return LabelScores(means, against, sum(each.correlation is None for each in latents))


def mean_with_interval(values: Sequence[float], weights: Sequence[float], *, seed: int = 0) -> Mean:
    """A mean, plain and weighted, with bootstrap intervals over latents."""
    x, w = np.asarray(values, float), np.asarray(weights, float)
    low, high = _interval((x,), np.mean, "BCa", seed)

    def weighted(x: np.ndarray, w: np.ndarray, axis: int = -1) -> np.ndarray:
        return (x * w).sum(axis) / w.sum(axis)

    weighted_low, weighted_high = _interval((x, w), weighted, "percentile", seed)
    return Mean(
        float(x.mean()), low, high, float(weighted(x, w)), weighted_low, weighted_high, len(x)
    )


def threshold_of_nulls(latents: Sequence[ScoredLatent], quantile: float = 0.95) -> float | None:
    """The quantile of all null correlations, above which a latent counts as explained."""
    found = [getattr(each, name) for each in latents for name in NULLS]
    values = [value for value in found if value is not None]
    return float(np.quantile(values, quantile)) if values else None


def compare_labels(
    by_label: dict[str, list[ScoredLatent]], threshold: float | None
) -> list[Comparison]:
    """Compare the groups' correlations; positive is a correlation above `threshold`, or above 0."""
    limit = 0.0 if threshold is None else threshold
    groups = {}
    for label, latents in by_label.items():
        found = [(each.correlation, each.density) for each in latents]
        pairs = [(value, density) for value, density in found if value is not None]
        groups[label] = Group(
            [value for value, _ in pairs],
            [value > limit for value, _ in pairs],
            [density for _, density in pairs],
        )
    return compare_groups(groups)


def _against(pairs: Sequence[tuple[float, float]], seed: int) -> AgainstNull:
    differences = np.asarray([a - b for a, b in pairs])
    low, high = _interval((differences,), np.mean, "BCa", seed)
    stats = require_extra("scipy.stats", "studies")
    p = float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0
    return AgainstNull(float(differences.mean()), low, high, p, len(pairs))


def _interval(
    data: tuple[np.ndarray, ...], statistic: object, method: str, seed: int
) -> tuple[float | None, float | None]:
    if len(data[0]) < 2:
        return None, None
    if np.ptp(data[0]) == 0:  # scipy gives NaN where all resamples agree
        return float(data[0][0]), float(data[0][0])
    stats = require_extra("scipy.stats", "studies")
    interval = stats.bootstrap(
        data, statistic, paired=len(data) > 1, n_resamples=_RESAMPLES, method=method,
        vectorized=True, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return _finite(interval.low), _finite(interval.high)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
