"""Explains and scores latents, in groups small enough that an interruption loses little."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jumprelu_plugin.analysis.windows import WindowKind
from jumprelu_plugin.studies.explain.latents import StudyLatent
from jumprelu_plugin.studies.explain.roles import JudgeTask, Roles, SimulationTask
from jumprelu_plugin.studies.explain.scores import (
    detection_texts,
    fuzzing_texts,
    judged,
    simulation_score,
)
from jumprelu_plugin.studies.explain.settings import ExplainSettings

GROUP = 16


@dataclass(frozen=True)
class ScoredLatent:
    """A latent's explanation and its scores; a score is None where it does not exist.

    Attributes:
        label, folder, latent, density, stratum: which latent.
        explanation: what the explainer wrote.
        correlation: Pearson's correlation of simulated and true activations on held-out text.
        random_token: the same from an explanation that names a random token of the text (null).
        shuffled: the same from the explanation of another latent of the same SAE (null).
        detection_auc, detection_accuracy: of telling texts in which the latent fires from others.
        fuzzing_auc, fuzzing_accuracy: of telling tokens on which it fires from others.
    """

    label: str
    folder: str
    latent: int
    density: float
    stratum: int
    explanation: str | None
    correlation: float | None = None
    random_token: float | None = None
    shuffled: float | None = None
    detection_auc: float | None = None
    detection_accuracy: float | None = None
    fuzzing_auc: float | None = None
    fuzzing_accuracy: float | None = None


def score_latents(
    latents: Sequence[StudyLatent],
    roles: Roles,
    settings: ExplainSettings,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[list[ScoredLatent]]:
    """Explain and score `latents`; yields the results group by group.

    All are explained first, because one null takes another latent's explanation. Every random draw
    depends on the settings and the latent alone, so a repeated study makes the same requests.

    Args:
        latents: of one or several SAEs.
        roles: who explains, simulates and judges.
        settings: which scores.
        progress: called with the number of finished latents and of all.

    Raises:
        StudyStopped: the language model cannot go on.
    """
    # A few at a time, so that an endpoint that is down is noticed early.
    explained = list(
        itertools.chain.from_iterable(
            roles.explainer.explain([latent.shown for latent in group])
            for group in _groups(latents)
        )
    )
    shuffled = _shuffled(latents, explained, settings.seed)
    words = sorted({p for each in latents for w in each.shown for p in w.pieces if p.strip()})
    done = 0
    for group in _groups(list(zip(latents, explained, shuffled, strict=True))):
        yield _score_group(group, roles, settings, words)
        done += len(group)
        progress(done, len(latents))


def _groups(items: Sequence) -> Iterator[Sequence]:
    for start in range(0, len(items), GROUP):
        yield items[start : start + GROUP]


def _shuffled(
    latents: Sequence[StudyLatent], explained: Sequence[str | None], seed: int
) -> list[str | None]:
    """For each latent the explanation of another one of its SAE; None where there is none."""
    found: list[str | None] = [None] * len(latents)
    for folder in dict.fromkeys(latent.folder for latent in latents):
        own = [
            i
            for i, (latent, text) in enumerate(zip(latents, explained, strict=True))
            if latent.folder == folder and text is not None
        ]
        order = random.Random(seed).sample(own, len(own))
        if len(order) > 1:
            for here, other in zip(order, [*order[1:], order[0]], strict=True):
                found[here] = explained[other]
    return found


def _score_group(
    group: Sequence[tuple[StudyLatent, str | None, str | None]],
    roles: Roles,
    settings: ExplainSettings,
    words: Sequence[str],
) -> list[ScoredLatent]:
    """The scores of a group of latents."""
    tasks: dict[tuple[int, str], list[SimulationTask]] = {}
    judgements: dict[tuple[int, str], tuple[JudgeTask, list[bool]]] = {}
    for i, (latent, explanation, other) in enumerate(group):
        fires = any(w.kind != WindowKind.SILENT for w in latent.held_out)
        if explanation is None or not fires:
            continue
        draw = random.Random(f"{settings.seed} {latent.label} {latent.drawn.latent}")
        texts: dict[str, str | None] = {"correlation": explanation}
        if settings.nulls:
            texts |= {
                "random_token": f'the token "{draw.choice(words).strip()}"',
                "shuffled": other,
            }
        for name, text in texts.items():
            if text is not None:
                tasks[i, name] = [SimulationTask(text, w.pieces) for w in latent.held_out]
        if settings.judge:
            for name, (shown, right) in {
                "detection": detection_texts(latent.held_out),
                "fuzzing": fuzzing_texts(latent.held_out, draw),
            }.items():
                task = JudgeTask(explanation, tuple(shown), name == "fuzzing")
                judgements[i, name] = task, right
    simulated = iter(roles.simulator.simulate([t for own in tasks.values() for t in own]))
    answers = roles.judge.judge([task for task, _ in judgements.values()])

    scores: list[dict[str, float | None]] = [{} for _ in group]
    for (i, name), own in tasks.items():
        answer = list(itertools.islice(simulated, len(own)))
        scores[i][name] = simulation_score(group[i][0].held_out, answer)
    for ((i, name), (_, right)), answer in zip(judgements.items(), answers, strict=True):
        found = None if answer is None else judged(answer, right)
        if found is not None:
            scores[i][f"{name}_auc"], scores[i][f"{name}_accuracy"] = found
    return [
        ScoredLatent(
            latent.label, latent.folder, latent.drawn.latent, latent.drawn.density,
            latent.drawn.stratum, explanation, **own,
        )
        for (latent, explanation, _), own in zip(group, scores, strict=True)
    ]  # fmt: skip
