"""The pipeline is right where the answer is known: one-feature latents above two-feature ones."""

from __future__ import annotations

import itertools

import pytest

from jumprelu_plugin.studies.explain.latents import study_latents
from jumprelu_plugin.studies.explain.scores import auc
from jumprelu_plugin.studies.explain.settings import ExplainSettings
from jumprelu_plugin.studies.explain.study import explain_and_score
from tests.studies.explain.known import known_sae, known_text
from tests.studies.explain.perfect import perfect_roles

pytestmark = pytest.mark.usefixtures("one_thread")


def test_scores_rank_single_features_above_mixtures() -> None:
    model, tokens, directions = known_text(features=71, sequences=300, length=31)
    pairs = list(itertools.pairwise(range(30)))
    sae = known_sae(directions, pairs)
    settings = ExplainSettings(latents=100, sequences=300, scored_contexts=12, seed=3)
    latents = study_latents("known", "sae", model, sae, tokens, settings, latents=range(100))
    # What is shown and what is scored have no sequence in common.
    result = explain_and_score(latents, perfect_roles(), settings)
    assert result.unfinished is None and len(result.latents) == 100

    def scores(name: str) -> tuple[list[float], list[float]]:
        found = [(each.latent, getattr(each, name)) for each in result.latents]
        assert all(value is not None for _, value in found)
        return [v for i, v in found if i < 71], [v for i, v in found if i >= 71]

    single, mixed = scores("correlation")
    assert auc(single, mixed) >= 0.95
    # Explanations of single features name their feature.
    named = [each.explanation for each in result.latents if each.latent < 71]
    assert sum(text == f" w{i}" for i, text in enumerate(named)) >= 69
    for null in ("shuffled", "random_token"):
        alone, _ = scores(null)
        assert sum(alone) / len(alone) < 0.1 < 0.6 < sum(single) / len(single)
    assert auc(*scores("detection_accuracy")) >= 0.8
    assert auc(*scores("fuzzing_accuracy")) >= 0.8
    own = result.labels["known"].against["shuffled"]
    assert own.low is not None and own.low > 0.3 and own.p_paired < 1e-6


def test_a_draw_needs_latents_that_fire_in_both_halves() -> None:
    model, tokens, directions = known_text(features=11, sequences=8, length=13)
    sae = known_sae(directions, [(0, 1)])
    sae.threshold.data[4] = 1e6
    settings = ExplainSettings(latents=9, sequences=8)
    drawn = study_latents("known", "sae", model, sae, tokens, settings)
    assert len(drawn) == 9 and all(each.drawn.latent != 4 for each in drawn)
    with pytest.raises(ValueError, match="latent 4 does not fire in both halves"):
        study_latents("known", "sae", model, sae, tokens, settings, latents=[4])
    with pytest.raises(ValueError, match="latent 12: .* 0 to 11"):
        study_latents("known", "sae", model, sae, tokens, settings, latents=[12])
