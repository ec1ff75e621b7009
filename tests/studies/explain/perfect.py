"""Roles that make no mistakes, and windows of a latent they can explain."""

from __future__ import annotations

import random
from collections.abc import Sequence

from jumprelu_plugin.analysis.windows import WindowKind
from jumprelu_plugin.studies.explain.roles import JudgeTask, Roles, SimulationTask
from jumprelu_plugin.studies.explain.scores import pearson
from jumprelu_plugin.studies.sampling.texts import TextWindow


class PerfectRoles:
    """Names the word that goes best with the activations shown, and finds it without error."""

    def explain(self, tasks: Sequence[Sequence[TextWindow]]) -> list[str | None]:
        return [self._best_word(task) for task in tasks]

    @staticmethod
    def _best_word(windows: Sequence[TextWindow]) -> str:
        true = [a for w in windows for a in w.activations]
        pieces = [p for w in windows for p in w.pieces]
        active = {p for p, a in zip(pieces, true, strict=True) if a > 0}
        return max(
            sorted(active), key=lambda w: pearson(true, [float(p == w) for p in pieces]) or 0
        )

    def simulate(self, tasks: Sequence[SimulationTask]) -> list[list[float] | None]:
        return [[10.0 * (p.strip() in t.explanation.replace('"', " ").split()) for p in t.pieces]
                for t in tasks]  # fmt: skip

    def judge(self, tasks: Sequence[JudgeTask]) -> list[list[float] | None]:
        def fits(task: JudgeTask, text: str) -> float:
            word = task.explanation.strip()
            if task.marked:
                marked = " ".join(part.split(">>")[0] for part in text.split("<<")[1:])
                return float(word in marked.split())
            return float(word in text.split())

        return [[fits(task, text) for text in task.texts] for task in tasks]


def perfect_roles() -> Roles:
    perfect = PerfectRoles()
    return Roles(perfect, perfect, perfect, {"kind": "test", "name": "perfect"})


def some_windows(seed: int = 0, count: int = 6) -> list[TextWindow]:
    """Windows of a latent that fires on ' sea' and, weaker, on ' lake'."""
    draw = random.Random(seed)
    value = {" sea": 4.0, " lake": 2.0}
    windows = []
    for number in range(count):
        words = draw.sample([" a", " big", " old\n", " house", " of", " many"], 5)
        if number % 3 < 2:
            words.insert(draw.randrange(6), (" sea", " lake")[number % 3])
        kind = (WindowKind.TOP, WindowKind.SAMPLED, WindowKind.SILENT)[number % 3]
        values = tuple(value.get(w, 0.0) for w in words)
        windows.append(TextWindow(kind, tuple(words), values))
    return windows
