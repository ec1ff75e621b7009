"""Unblinds a rating study: a record and a page of shares, agreement and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jumprelu_plugin.records import provenance, whole_folder, write_json
from jumprelu_plugin.studies.comparison import Comparison, compare_groups, comparison_table
from jumprelu_plugin.studies.rating.agreement import (
    Agreement,
    LabelRatings,
    RatedLatent,
    label_ratings,
    rater_agreement,
    rating_groups,
)
from jumprelu_plugin.studies.rating.figures import rating_bars
from jumprelu_plugin.studies.rating.questions import RATINGS_FOLDER, read_key, read_study
from jumprelu_plugin.studies.rating.ratings import RATINGS, Answers, read_answers
from jumprelu_plugin.studies.report import Section, Table, write_report
from jumprelu_plugin.studies.result_file import read_result

RECORD_FILENAME, PAGE_FILENAME = "ratings.json", "ratings.html"
KIND = "rating report"


@dataclass(frozen=True)
class RatingResult:
    """An unblinded study.

    Attributes:
        labels: the ratings of each group.
        agreement: of the raters.
        comparisons: of every two groups.
        progress: for each rater, the number of rated items and of items.
        warnings: what was left out, in sentences.
        latents: for each rated latent, what the key says, its ratings and the raters' texts.
    """

    labels: dict[str, LabelRatings]
    agreement: Agreement
    comparisons: list[Comparison]
    progress: dict[str, tuple[int, int]]
    warnings: list[str]
    latents: list[dict[str, Any]]


def unblind(folder: str | Path, key_path: str | Path) -> RatingResult:
    """Join the ratings in `folder` with the key.

    Lines of a rating file that are not whole are left out and named in the warnings.

    Raises:
        ValueError: the study or the key is not there or not whole, the key is another study's, or
            there is no rating yet.
        ImportError: the `studies` extra is not installed.
    """
    folder = Path(folder)
    study, key = read_study(folder), read_key(key_path)
    if study["study"] != key["study"]:
        raise ValueError(f"{key_path} is the key of another study than {folder}")
    answers = {
        rater: read_answers(folder / RATINGS_FOLDER / f"{rater}.jsonl") for rater in study["raters"]
    }
    found = _rated(key["items"], answers)
    if not found:
        raise ValueError(f"there is no rating in {folder / RATINGS_FOLDER} yet")
    latents = [_latent(each) for each in found]
    by_label: dict[str, list[RatedLatent]] = {}
    for latent in latents:
        by_label.setdefault(latent.label, []).append(latent)
    return RatingResult(
        labels={label: label_ratings(own) for label, own in sorted(by_label.items())},
        agreement=rater_agreement(latents),
        comparisons=compare_groups(rating_groups(dict(sorted(by_label.items())))),
        progress={
            rater: (len(set(answers[rater].rated()) & set(items)), len(items))
            for rater, items in study["raters"].items()
        },
        warnings=_warnings(folder, study, answers),
        latents=found,
    )


def write_rating_report(
    folder: str | Path, key_path: str | Path, output: str | Path
) -> RatingResult:
    """Unblind a study into the folder `output`: ratings.json and ratings.html.

    An earlier report there is replaced.

    Raises:
        ValueError: as `unblind` does, or `output` holds something else.
    """
    result = unblind(folder, key_path)
    key = read_key(key_path)
    with whole_folder(output, replaces=_is_report, kind="rating report") as fresh:
        write_json(
            fresh / RECORD_FILENAME,
            {
                "kind": KIND,
                "result": result,
                "settings": key["settings"],
                "made": key["provenance"],
                "provenance": provenance(),
            },
        )
        write_report(fresh / PAGE_FILENAME, "Latents rated by people", rating_sections(result))
    return result


def read_rating_result(path: str | Path) -> RatingResult:
    """The result that ratings.json holds; raises as `read_result` does."""
    return read_result(path, KIND, RatingResult)


def rating_sections(result: RatingResult) -> list[Section]:
    """The report's sections."""
    ratings = Section(
        "Ratings",
        [
            "Raters judged whether a latent's texts show mostly one concept, without knowing its "
            "SAE. Shares are over latents: one with several ratings counts once.",
            *result.warnings,
        ],
        [rating_bars(result.labels)],
        [shares_table(result)],
    )
    agreement = Section(
        "Agreement of raters", [agreement_text(result.agreement)], tables=[_progress(result)]
    )
    comparison = Section(
        "Ratings compared",
        [
            "Odds that most of a latent's ratings are yes, and the rank of its mean rating. "
            "p-values are two-sided and Holm-corrected over all pairs."
        ],
        tables=[comparison_table(result.comparisons)],
    )
    listed = Section("Rated latents", tables=[_latents_table(result.latents)])
    return [ratings, agreement, *([comparison] if result.comparisons else []), listed]


def shares_table(result: RatingResult) -> Table:
    """One row a group: latents, ratings and the shares of yes, maybe and no."""
    rows = []
    for label, own in result.labels.items():
        shares = [f"{s.share:.0%} [{s.low:.0%}, {s.high:.0%}]" for s in own.shares.values()]
        rows.append([label, str(own.latents), str(own.ratings), *shares,
                     f"{own.weighted_shares['yes']:.0%}"])  # fmt: skip
    return Table(["SAE", "latents", "ratings", *RATINGS, "yes, by density"], rows)


def agreement_text(agreement: Agreement) -> str:
    """Krippendorff's alpha in a sentence."""
    if agreement.alpha_ordinal is None or agreement.alpha_nominal is None:
        return f"Krippendorff's alpha does not exist: {agreement.why_none}."
    return (
        f"Krippendorff's alpha over {agreement.latents} latents with several ratings: "
        f"{agreement.alpha_ordinal:.2f} ordinal, {agreement.alpha_nominal:.2f} nominal. 1 is full "
        "agreement, 0 what chance gives."
    )


def _rated(items: dict[str, Any], answers: dict[str, Answers]) -> list[dict[str, Any]]:
    found = []
    for item, about in sorted(
        items.items(), key=lambda pair: (pair[1]["label"], pair[1]["folder"], pair[1]["latent"])
    ):
        ratings = {r: a.rated()[item] for r, a in answers.items() if item in a.rated()}
        texts = {r: a.by_item[item]["text"] for r, a in answers.items()
                 if a.by_item.get(item, {}).get("text")}  # fmt: skip
        if ratings:
            found.append({**about, "item": item, "ratings": ratings, "texts": texts})
    return found


def _latent(found: dict[str, Any]) -> RatedLatent:
    return RatedLatent(found["label"], found["density"], found["ratings"])


def _warnings(folder: Path, study: dict[str, Any], answers: dict[str, Answers]) -> list[str]:
    warnings = []
    for rater, own in answers.items():
        if own.damaged_lines:
            lines = ", ".join(map(str, own.damaged_lines))
            warnings.append(f"{rater}.jsonl: lines that are not whole were left out: {lines}.")
    known = {f"{rater}.jsonl" for rater in study["raters"]}
    files = folder / RATINGS_FOLDER
    others = sorted(p.name for p in files.glob("*.jsonl") if p.name not in known)
    if others:
        warnings.append(f"Files of no rater of this study were left out: {', '.join(others)}.")
    return warnings


def _progress(result: RatingResult) -> Table:
    rows = [[rater, f"{done} of {total}"] for rater, (done, total) in result.progress.items()]
    return Table(["rater", "rated"], rows)


def _latents_table(latents: Sequence[dict[str, Any]]) -> Table:
    rows = [
        [each["label"], str(each["latent"]), f"{each['density']:.2g}",
         ", ".join(f"{r}: {v}" for r, v in each["ratings"].items()),
         "; ".join(f"{r}: {t}" for r, t in each["texts"].items())]
        for each in latents
    ]  # fmt: skip
    return Table(["SAE", "latent", "density", "ratings", "texts"], rows, prose=True)


def _is_report(folder: Path) -> bool:
    return (folder / RECORD_FILENAME).is_file()
