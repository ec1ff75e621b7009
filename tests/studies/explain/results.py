"""Results of a study by a language model, made up: two SAEs, one of which is explained well."""

from __future__ import annotations

import random

from jumprelu_plugin.studies.explain.record import ExplanationResult
from jumprelu_plugin.studies.explain.scoring import ScoredLatent
from jumprelu_plugin.studies.explain.statistics import (
    compare_labels,
    label_scores,
    threshold_of_nulls,
)


def explanation_result(count: int = 13) -> ExplanationResult:
    draw = random.Random(5)
    by_label = {
        label: [_scored(draw, label, number, quality) for number in range(count)]
        for label, quality in (("jumprelu-plugin", 0.6), ("topk", 0.1))
    }
    latents = [each for own in by_label.values() for each in own]
    limit = threshold_of_nulls(latents)
    return ExplanationResult(
        backend={"kind": "test", "name": "a <model>"},
        labels={label: label_scores(own) for label, own in by_label.items()},
        explained_above=limit,
        comparisons=compare_labels(by_label, limit),
        latents=latents,
        unfinished=None,
    )


def _scored(draw: random.Random, label: str, latent: int, quality: float) -> ScoredLatent:
    return ScoredLatent(
        label=label,
        folder=f"/{label}",
        latent=latent,
        density=0.001 * (latent + 1),
        stratum=0,
        explanation=f"words like <b>sea</b> and lake {latent}" if latent else None,
        correlation=quality + draw.gauss(0, 0.1) if latent else None,
        random_token=draw.gauss(0, 0.1),
        shuffled=draw.gauss(0, 0.1),
        detection_auc=0.5 + quality / 2,
        detection_accuracy=0.5,
        fuzzing_auc=0.5,
        fuzzing_accuracy=0.5,
    )
