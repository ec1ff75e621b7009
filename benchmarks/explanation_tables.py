"""The tables of `jumprelu study explain` in docs/guides/interpretability.md, from its records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables import table

RESULTS = Path(__file__).parent / "results"
SCORES = {
    "correlation": "correlation",
    "random_token": "null: random token",
    "shuffled": "null: another latent's explanation",
    "detection_auc": "detection, AUC",
    "fuzzing_auc": "fuzzing, AUC",
}


@dataclass(frozen=True)
class Explanations:
    """One study of several architectures.

    Attributes:
        path: its record.
    """

    path: Path

    def table(self) -> str:
        """Mean scores of each architecture with their intervals."""
        result = json.loads(self.path.read_text(encoding="utf-8"))["result"]
        labels: dict[str, Any] = result["labels"]
        rows = [
            (title, *(_interval(found["means"][score]) for found in labels.values()))
            for score, title in SCORES.items()
        ]
        bar = result["explained_above"]
        rows.append(
            (
                f"above 95 % of the nulls ({bar:.3f})",
                *(_above(result["latents"], label, bar) for label in labels),
            )
        )
        return table(("", *labels), rows)


def _interval(score: dict[str, float]) -> str:
    return f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def _above(latents: list[dict[str, Any]], label: str, bar: float) -> str:
    scores = [x["correlation"] for x in latents if x["label"] == label]
    return f"{sum(score is not None and score > bar for score in scores)} of {len(scores)}"


EMBEDDED = Explanations(RESULTS / "explanations_four.json")
GEMMA = Explanations(RESULTS / "explanations_gemma.json")
