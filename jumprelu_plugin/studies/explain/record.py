"""The result of an automated study, and its record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jumprelu_plugin.records import read_json, write_json
from jumprelu_plugin.studies.comparison import Comparison
from jumprelu_plugin.studies.explain.scoring import ScoredLatent
from jumprelu_plugin.studies.explain.settings import BackendSettings, ExplainSettings
from jumprelu_plugin.studies.explain.statistics import LabelScores
from jumprelu_plugin.studies.result_file import read_result

RECORD_FILENAME = "explanations.json"
KIND = "explanation study"


@dataclass(frozen=True)
class ExplanationResult:
    """A study's results.

    Attributes:
        backend: who explained, simulated and judged.
        labels: the scores of each group.
        explained_above: 95 % of all null correlations are below it; the odds ratios count the
            latents above it. None without nulls.
        comparisons: of every two groups.
        latents: every latent with its explanation and scores.
        unfinished: why the study stopped early; None if it did not.
    """

    backend: dict[str, Any]
    labels: dict[str, LabelScores]
    explained_above: float | None
    comparisons: list[Comparison]
    latents: list[ScoredLatent]
    unfinished: str | None


def write_record(
    output: Path,
    result: ExplanationResult,
    settings: ExplainSettings,
    backend: BackendSettings,
    source: dict[str, Any],
) -> Path:
    """Write explanations.json into the folder `output`."""
    return write_json(
        output / RECORD_FILENAME,
        {
            "kind": KIND,
            "result": result,
            "settings": settings,
            "backend": backend,
            "provenance": source,
        },
    )


def recorded(output: Path) -> tuple[int, bool]:
    """The latents that the record in a folder holds, and whether its study was finished.

    One that cannot be read holds none.
    """
    try:
        result = read_json(output / RECORD_FILENAME)["result"]
        return len(result["latents"]), result["unfinished"] is None
    except (OSError, ValueError, LookupError, TypeError):
        return 0, False


def read_explanation_result(path: str | Path) -> ExplanationResult:
    """The result that explanations.json holds; raises as `read_result` does."""
    return read_result(path, KIND, ExplanationResult)
