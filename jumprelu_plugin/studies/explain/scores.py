"""Scores of one latent's explanation: simulation, detection and fuzzing."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from jumprelu_plugin.analysis.windows import WindowKind
from jumprelu_plugin.studies.explain.prompts import marked_text
from jumprelu_plugin.studies.sampling.texts import TextWindow


def pearson(true: Sequence[float], predicted: Sequence[float]) -> float | None:
    """Pearson's correlation; 0 where the prediction is constant, None where the truth is.

    A constant prediction says nothing of where the latent fires, so it scores as chance does.
    """
    mean_t, mean_p = math.fsum(true) / len(true), math.fsum(predicted) / len(predicted)
    t, p = [x - mean_t for x in true], [x - mean_p for x in predicted]
    tt, pp = math.fsum(x * x for x in t), math.fsum(x * x for x in p)
    if tt == 0:
        return None
    if pp == 0:
        return 0.0
    return math.fsum(a * b for a, b in zip(t, p, strict=True)) / math.sqrt(tt * pp)


def simulation_score(
    windows: Sequence[TextWindow], simulated: Sequence[Sequence[float] | None]
) -> float | None:
    """Correlation over all pieces of the windows; None where a simulation is missing."""
    if any(each is None for each in simulated):
        return None
    true = [a for window in windows for a in window.activations]
    return pearson(true, [value for each in simulated for value in each or ()])


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive ranks above a negative, ties counted half."""
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def balanced_accuracy(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Mean of the shares of positives at 0.5 or more and of negatives below."""
    right = sum(p >= 0.5 for p in positive) / len(positive)
    return (right + sum(n < 0.5 for n in negative) / len(negative)) / 2


def detection_texts(windows: Sequence[TextWindow]) -> tuple[list[str], list[bool]]:
    """The texts of the windows, and whether the latent fires in each."""
    return [w.text for w in windows], [w.kind != WindowKind.SILENT for w in windows]


def fuzzing_texts(
    windows: Sequence[TextWindow], draw: random.Random
) -> tuple[list[str], list[bool]]:
    """The windows in which the latent fires, every other one marked where it does not.

    The others are marked at the pieces on which it fires. Both kinds have equally many marks as far
    as there are pieces.
    """
    texts, right = [], []
    for window in (w for w in windows if w.kind != WindowKind.SILENT):
        active = [a > 0 for a in window.activations]
        wrong = len(texts) % 2 == 1
        if wrong:
            silent = [i for i, on in enumerate(active) if not on]
            chosen = set(draw.sample(silent, min(sum(active), len(silent))))
            if not chosen:
                continue
            active = [i in chosen for i in range(len(active))]
        texts.append(marked_text(window, active))
        right.append(not wrong)
    return texts, right


def judged(answers: Sequence[float], right: Sequence[bool]) -> tuple[float, float] | None:
    """AUC and balanced accuracy; None where all texts are of one kind."""
    positive = [a for a, r in zip(answers, right, strict=True) if r]
    negative = [a for a, r in zip(answers, right, strict=True) if not r]
    if not positive or not negative:
        return None
    return auc(positive, negative), balanced_accuracy(positive, negative)
