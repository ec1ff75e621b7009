"""The tables of `jumprelu study explain` in docs/guides/interpretability.md, from its records."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables import RESULTS, Records, read, table

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
        saes: records of the sweeps that trained its SAEs.
    """

    path: Path
    saes: Path

    def l0(self) -> dict[str, float]:
        """Held-out L0 of each architecture's SAE."""
        trained = read(self.saes)
        folders = {latent["label"]: latent["folder"] for latent in self._result["latents"]}
        return {label: _trained(folder, trained)["l0"] for label, folder in folders.items()}

    def table(self) -> str:
        """L0 and mean scores of each architecture, scores with their intervals."""
        result = self._result
        labels: dict[str, Any] = result["labels"]
        l0 = self.l0()
        rows = [("L0", *(f"{l0[label]:.1f}" for label in labels))]
        rows += [
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

    @functools.cached_property
    def _result(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8"))["result"]


def _trained(folder: str, records: Records) -> dict[str, Any]:
    (record,) = (record for record in records if folder.endswith(f"/{record['folder']}"))
    return record


def _interval(score: dict[str, float]) -> str:
    return f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def _above(latents: list[dict[str, Any]], label: str, bar: float) -> str:
    scores = [x["correlation"] for x in latents if x["label"] == label]
    return f"{sum(score is not None and score > bar for score in scores)} of {len(scores)}"


EMBEDDED = Explanations(
    RESULTS / "explanations_four.json", RESULTS / "explanations_four_saes.jsonl"
)
GEMMA = Explanations(RESULTS / "explanations_gemma.json", RESULTS / "explanations_gemma_saes.jsonl")
