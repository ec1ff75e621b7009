"""Scores, nulls and intervals against numpy, scipy and closed forms."""

from __future__ import annotations

import random

import numpy as np
import pytest

from jumprelu_plugin.analysis.windows import WindowKind
from jumprelu_plugin.studies.explain.latents import StudyLatent
from jumprelu_plugin.studies.explain.scores import (
    auc,
    balanced_accuracy,
    detection_texts,
    fuzzing_texts,
    judged,
    pearson,
    simulation_score,
)
from jumprelu_plugin.studies.explain.scoring import ScoredLatent, score_latents
from jumprelu_plugin.studies.explain.settings import ExplainSettings
from jumprelu_plugin.studies.explain.statistics import (
    compare_labels,
    label_scores,
    mean_with_interval,
    threshold_of_nulls,
)
from jumprelu_plugin.studies.sampling.latents import SampledLatent
from jumprelu_plugin.studies.sampling.texts import TextWindow
from tests.studies.explain.perfect import perfect_roles, some_windows


def test_pearson_is_numpys() -> None:
    draw = np.random.default_rng(3)
    x, y = draw.normal(size=31), draw.normal(size=31)
    assert pearson(list(x), list(2 * x + y)) == pytest.approx(np.corrcoef(x, 2 * x + y)[0, 1])
    assert pearson([1.0, 2.0], [3.0, 3.0]) == 0.0
    assert pearson([2.0, 2.0], [3.0, 4.0]) is None


def test_auc_counts_ties_half() -> None:
    assert auc([0.9, 0.5, 0.5], [0.5, 0.1]) == pytest.approx((2 + 1.5 + 1.5) / 6)
    assert balanced_accuracy([0.9, 0.4, 0.5], [0.5, 0.1]) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert judged([1.0, 0.0], [True, True]) is None


def test_simulation_score_is_over_all_pieces() -> None:
    windows = some_windows()
    true = [a for w in windows for a in w.activations]
    assert simulation_score(windows, [list(w.activations) for w in windows]) == pytest.approx(1)
    guess = [[float(p == " sea") for p in w.pieces] for w in windows]
    flat = [value for each in guess for value in each]
    assert simulation_score(windows, guess) == pytest.approx(np.corrcoef(true, flat)[0, 1])
    assert simulation_score(windows, [*guess[:-1], None]) is None


def test_judged_texts() -> None:
    windows = some_windows()
    texts, right = detection_texts(windows)
    assert texts == [w.text for w in windows]
    assert right == [True, True, False] * 2
    marked, correct = fuzzing_texts(windows, random.Random(5))
    assert correct == [True, False, True, False] and len(marked) == 4
    for text, is_right in zip(marked, correct, strict=True):
        inside = text.split("<<")[1].split(">>")[0]
        assert (inside in (" sea", " lake")) == is_right and text.count("<<") == 1


def latent(number: int, windows: list[TextWindow], label: str = "a") -> StudyLatent:
    return StudyLatent(label, f"/{label}", SampledLatent(number, 0.01, 0), windows, windows)


def test_every_null_is_another_latents_or_a_random_tokens() -> None:
    """With perfect roles the shuffled null is what the other explanation scores."""
    one = some_windows(1)
    other = [
        TextWindow(w.kind, tuple(p.replace(" sea", " hill") for p in w.pieces), w.activations)
        for w in some_windows(2)
    ]
    silent = [TextWindow(WindowKind.SILENT, (" a", " b"), (0.0, 0.0))]
    latents = [latent(3, one), latent(5, other), latent(7, one, "b")]
    latents.append(StudyLatent("b", "/c", SampledLatent(9, 0.01, 0), one, silent))
    settings = ExplainSettings(seed=11)
    (found,) = score_latents(latents, perfect_roles(), settings)
    assert [each.explanation for each in found[:2]] == [" sea", " hill"]
    assert found[0].shuffled == 0.0  # the other's word never occurs, so the prediction is constant
    assert found[0].correlation is not None and found[0].correlation > 0.8
    assert found[2].shuffled is None  # the only latent of its SAE
    assert found[3].correlation is None and found[3].detection_auc is None  # nothing to score on
    (again,) = score_latents(latents, perfect_roles(), settings)
    assert again == found


def scored(values: list[float], label: str = "a", null: float = 0.0) -> list[ScoredLatent]:
    return [
        ScoredLatent(label, f"/{label}", i, 0.01 * (i + 1), 0, "x", v, null - 0.01 * i, null)
        for i, v in enumerate(values)
    ]


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    draw = np.random.default_rng(7)
    covered = 0
    for trial in range(60):
        values = draw.normal(0.4, 0.2, size=41)
        found = mean_with_interval(list(values), [1.0] * 41, seed=trial)
        assert found.low is not None and found.high is not None
        assert found.low < found.mean < found.high
        assert found.weighted == pytest.approx(found.mean)
        covered += found.low <= 0.4 <= found.high
    assert covered >= 51  # 57 expected of 60


def test_means_weighted_by_density() -> None:
    found = mean_with_interval([0.1, 0.7, 0.7], [0.3, 0.1, 0.1])
    assert found.weighted == pytest.approx((0.03 + 0.07 + 0.07) / 0.5)
    assert found.weighted_low is not None and found.weighted_low >= 0.1
    same = mean_with_interval([0.5, 0.5], [1, 2])
    assert (same.low, same.high) == (0.5, 0.5)
    assert mean_with_interval([0.5], [1.0]).low is None


def test_groups_and_nulls() -> None:
    good = scored([0.5, 0.6, 0.55, 0.7, 0.65, 0.62, 0.58, 0.61], "a")
    poor = scored([0.05, -0.1, 0.2, 0.0, 0.1, -0.02, 0.04], "b")
    assert threshold_of_nulls(good + poor) == pytest.approx(
        np.quantile([v for e in good + poor for v in (e.random_token, e.shuffled)], 0.95)
    )
    own = label_scores(good).against["shuffled"]
    assert own.p_paired == pytest.approx(2 / 2**8)  # all eight differences have one sign
    assert own.low is not None and own.low > 0.4
    (found,) = compare_labels({"a": good, "b": poor}, 0.3)
    assert (
        found.odds_ratio is None and found.odds_ratio_interval[1] is None
    )  # 8 of 8 against 0 of 7
    assert found.p_odds == pytest.approx(1 / 6435)  # 15 over 8, one such table
    assert found.pairs == 7 and found.difference > 0.5
    missing = [ScoredLatent("c", "/c", 1, 0.1, 0, None)]
    assert label_scores(missing).unscored == 1 and label_scores(missing).means == {}
