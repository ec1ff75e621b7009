"""The automated study from SAE folders to a record and a report.

The folder of a study holds calls.jsonl, which grows with every reply, and explanations.json and
explanations.html, which are written anew at the end, also of a study that had to stop, unless they
hold more than it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from jumprelu_plugin.models.digest import digest
from jumprelu_plugin.models.extras import require_extra
from jumprelu_plugin.models.language_models import model_digest
from jumprelu_plugin.models.options import ModelOptions
from jumprelu_plugin.records import provenance
from jumprelu_plugin.studies.explain.calls import CALLS_FILENAME, CallLog
from jumprelu_plugin.studies.explain.cost import Estimate, estimate
from jumprelu_plugin.studies.explain.endpoint import StudyStopped, endpoint_roles
from jumprelu_plugin.studies.explain.latents import StudyLatent, study_latents
from jumprelu_plugin.studies.explain.local import local_roles
from jumprelu_plugin.studies.explain.record import (
    RECORD_FILENAME,
    ExplanationResult,
    recorded,
    write_record,
)
from jumprelu_plugin.studies.explain.report import write_explanation_report
from jumprelu_plugin.studies.explain.roles import Roles
from jumprelu_plugin.studies.explain.scoring import ScoredLatent, score_latents
from jumprelu_plugin.studies.explain.settings import BackendSettings, ExplainSettings
from jumprelu_plugin.studies.explain.statistics import (
    compare_labels,
    label_scores,
    threshold_of_nulls,
)
from jumprelu_plugin.studies.sampling.saes import load_study_saes

# What the statistics and the report import of the `studies` extra.
PACKAGES = ("scipy.stats", "statsmodels.stats.multitest", "matplotlib")


def run_explanation_study(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    settings: ExplainSettings | None = None,
    backend: BackendSettings | None = None,
    options: ModelOptions | None = None,
    context_size: int | None = None,
    confirm: Callable[[Estimate], bool] = lambda estimate: True,
    log: Callable[[str], None] = lambda text: None,
) -> ExplanationResult:
    """Explain latents of SAEs, score the explanations, and write `output`.

    Replies that `output` holds from an earlier run are used again: a finished study repeats without
    a request, and one that stopped goes on. One that stops leaves the record and the page of an
    earlier run that came further.

    Args:
        folders: SAE folders, each `folder` or `label=folder`; see `load_study_saes`.
        output: a new folder, or that of an earlier run.
        settings: latents, contexts and scores.
        backend: the language model.
        options: the model and the text of the SAEs.
        context_size: tokens in a sequence.
        confirm: asked before an endpoint's first request, with the estimate.
        log: called with lines of progress.

    Raises:
        ValueError: a setting is out of range, `output` holds something else, `confirm` says no, and
            as `load_study_saes` does.
        ImportError: the `studies` extra or the local model is not installed.
        OSError: a model cannot be had.
    """
    settings, backend = settings or ExplainSettings(), backend or BackendSettings()
    output = Path(output)
    for package in PACKAGES:  # before a language model is asked for hours
        require_extra(package, "studies")
    if output.exists() and (not output.is_dir() or _is_foreign(output)):
        raise ValueError(f"{output} is there and holds no earlier study: give another folder")
    calls = CallLog(output / CALLS_FILENAME)
    roles = load_roles(backend, calls)
    saes = load_study_saes(folders, options, context_size=context_size)
    _, tokens = saes[0].saved.sequences(settings.sequences)
    latents: list[StudyLatent] = []
    for sae in saes:
        log(f"{sae.label}: collecting contexts of {sae.saved.folder}")
        latents += study_latents(
            sae.label, str(sae.saved.folder), sae.saved.model, sae.saved.dictionary, tokens,
            settings,
        )  # fmt: skip
    if backend.base_url is not None:
        cost = estimate(latents, settings, backend)
        log(f"{cost}; budget {backend.token_budget:,} tokens; {len(calls):,} replies are on file")
        if not confirm(cost):
            raise ValueError("not started")
    result = explain_and_score(latents, roles, settings, log=log)
    source = provenance(
        settings.seed, model_digest(saes[0].saved.model), data_digest=digest(tokens)
    )
    earlier = recorded(output)
    if result.unfinished and earlier > (len(result.latents), False):
        log(
            f"{output / RECORD_FILENAME} and its page stay as they are: they hold "
            f"{earlier[0]} latents of an earlier run. The replies of this one are kept"
        )
    else:
        write_record(output, result, settings, backend, source)
        write_explanation_report(output, result)
    return result


def load_roles(backend: BackendSettings, calls: CallLog) -> Roles:
    """The language model of the settings."""
    if backend.base_url is not None:
        return endpoint_roles(backend, calls)
    return local_roles(backend, calls)


def explain_and_score(
    latents: Sequence[StudyLatent],
    roles: Roles,
    settings: ExplainSettings,
    *,
    log: Callable[[str], None] = lambda text: None,
) -> ExplanationResult:
    """Explain and score latents; what is finished when the language model stops is the result."""
    scored: list[ScoredLatent] = []
    unfinished = None

    def progress(done: int, total: int) -> None:
        log(f"{done} of {total} latents scored")

    try:
        for group in score_latents(latents, roles, settings, progress=progress):
            scored += group
    except StudyStopped as stop:
        unfinished = f"{stop}. {len(scored)} of {len(latents)} latents are scored"
    by_label: dict[str, list[ScoredLatent]] = {}
    for each in scored:
        by_label.setdefault(each.label, []).append(each)
    limit = threshold_of_nulls(scored)
    return ExplanationResult(
        backend=dict(roles.about),
        labels={label: label_scores(own, settings.seed) for label, own in by_label.items()},
        explained_above=limit,
        comparisons=compare_labels(by_label, limit),
        latents=scored,
        unfinished=unfinished,
    )


def _is_foreign(folder: Path) -> bool:
    own = (CALLS_FILENAME, RECORD_FILENAME)  # one that stopped before any reply has a record alone
    return any(folder.iterdir()) and not any((folder / name).is_file() for name in own)
