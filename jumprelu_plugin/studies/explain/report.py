"""The page of an automated study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jumprelu_plugin.studies.comparison import comparison_table
from jumprelu_plugin.studies.explain.figures import correlation_by_density, correlation_violins
from jumprelu_plugin.studies.explain.record import ExplanationResult
from jumprelu_plugin.studies.explain.scoring import ScoredLatent
from jumprelu_plugin.studies.explain.settings import SMOLLM2
from jumprelu_plugin.studies.explain.statistics import SCORES, Mean
from jumprelu_plugin.studies.report import Section, Table, write_report

PAGE_FILENAME = "explanations.html"
_NAMES = {
    "correlation": "simulation: correlation",
    "random_token": "null: random token",
    "shuffled": "null: another latent's explanation",
    "detection_auc": "detection, AUC",
    "detection_accuracy": "detection, balanced accuracy",
    "fuzzing_auc": "fuzzing, AUC",
    "fuzzing_accuracy": "fuzzing, balanced accuracy",
}


def write_explanation_report(output: str | Path, result: ExplanationResult) -> Path:
    """Write explanations.html into the folder `output`."""
    return write_report(
        Path(output) / PAGE_FILENAME,
        "Latents explained by a language model",
        explanation_sections(result),
    )


def explanation_sections(result: ExplanationResult) -> list[Section]:
    """The report's sections."""
    by_label: dict[str, list[ScoredLatent]] = {}
    for each in result.latents:
        by_label.setdefault(each.label, []).append(each)
    text = [
        f"{result.backend['name']} explained each latent from texts and predicted the activations "
        "on other texts from that. A correlation means something only beside its nulls: the same "
        "prediction from a random token and from another latent's explanation."
    ]
    if result.backend["name"] == SMOLLM2:
        text.append(
            "SmolLM2 has 135 million parameters and is a weak explainer and simulator: compare "
            "with the nulls, and take low scores as the model's, not the latents'."
        )
    if result.unfinished:
        text.append(f"This study is not finished: {result.unfinished}.")
    drawn = (
        correlation_violins(by_label, result.explained_above),
        correlation_by_density(by_label),
    )
    scores = Section(
        "Explanations scored",
        text,
        [figure for figure in drawn if figure is not None],
        [scores_table(result), against_table(result)],
    )
    comparison = Section(
        "Explanations compared",
        [_comparison_text(result)],
        tables=[comparison_table(result.comparisons)],
    )
    listed = Section("Explanations", tables=[_explanations_table(result.latents)])
    return [scores, *([comparison] if result.comparisons else []), listed]


def scores_table(result: ExplanationResult) -> Table:
    """One row a score and group: the mean, and that weighted by density."""
    rows = []
    for label, own in result.labels.items():
        for name in SCORES:
            if name in own.means:
                mean = own.means[name]
                rows.append([label, _NAMES[name], _mean(mean), _weighted(mean), str(mean.latents)])
    return Table(["SAE", "score", "mean [95 %]", "by density [95 %]", "latents"], rows)


def against_table(result: ExplanationResult) -> Table:
    """Explanations against their nulls."""
    rows = []
    for label, own in result.labels.items():
        for name, found in own.against.items():
            difference = f"{found.difference:+.3f}{_interval(found.low, found.high)}"
            rows.append([label, _NAMES[name], difference, f"{found.p_paired:.2g}"])
    return Table(["SAE", "against", "difference [95 %]", "p (Wilcoxon, paired)"], rows)


def _comparison_text(result: ExplanationResult) -> str:
    if result.explained_above is None:
        return "Odds of a correlation above 0. p-values are two-sided and Holm-corrected."
    return (
        f"Odds of a correlation above {result.explained_above:.3f}, below which 95 % of the nulls "
        "lie. p-values are two-sided and Holm-corrected over all pairs."
    )


def _explanations_table(latents: Sequence[ScoredLatent]) -> Table:
    rows = [
        [each.label, str(each.latent), f"{each.density:.2g}", each.explanation or "",
         _number(each.correlation), _number(each.shuffled), _number(each.detection_auc)]
        for each in latents
    ]  # fmt: skip
    header = ["SAE", "latent", "density", "explanation", "correlation", "null: shuffled",
              "detection"]  # fmt: skip
    return Table(header, rows, prose=True)


def _mean(mean: Mean) -> str:
    return f"{mean.mean:.3f}{_interval(mean.low, mean.high)}"


def _weighted(mean: Mean) -> str:
    return f"{mean.weighted:.3f}{_interval(mean.weighted_low, mean.weighted_high)}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
