"""One latent explained, for curiosity."""

from __future__ import annotations

from pathlib import Path

from jumprelu_plugin.models.extras import require_extra
from jumprelu_plugin.models.options import ModelOptions
from jumprelu_plugin.studies.explain.calls import CallLog
from jumprelu_plugin.studies.explain.latents import study_latents
from jumprelu_plugin.studies.explain.prompts import MARKED_SHARE, marked_text
from jumprelu_plugin.studies.explain.settings import BackendSettings, ExplainSettings
from jumprelu_plugin.studies.explain.study import explain_and_score, load_roles
from jumprelu_plugin.studies.sampling.saes import load_study_saes


def explain_latent(
    folder: str | Path,
    latent: int,
    *,
    backend: BackendSettings | None = None,
    options: ModelOptions | None = None,
    sequences: int = 256,
    context_size: int | None = None,
) -> tuple[list[str], list[str]]:
    """The contexts of a latent, and its explanation with scores, as lines of text.

    Args:
        folder: of an SAE.
        latent: its index.
        backend: the language model.
        options: the model and the text of the SAE.
        sequences: sequences of text.
        context_size: tokens in a sequence.

    Raises:
        ValueError: the latent does not exist or does not fire in the text, the language model
            stopped, and as `load_study_saes` does.
        ImportError: scipy, `openai` for an endpoint, or the local model is not installed.
        OSError: a model cannot be had.
    """
    settings = ExplainSettings(latents=1, sequences=sequences)
    require_extra("scipy.stats", "studies")
    roles = load_roles(backend or BackendSettings(), CallLog())
    (sae,) = load_study_saes([folder], options, context_size=context_size)
    _, tokens = sae.saved.sequences(sequences)
    (found,) = study_latents(
        sae.label, str(folder), sae.saved.model, sae.saved.dictionary, tokens, settings,
        latents=[latent],
    )  # fmt: skip
    result = explain_and_score([found], roles, settings)
    if result.unfinished:
        raise ValueError(result.unfinished)
    (scored,) = result.latents
    largest = max(max(window.activations) for window in found.shown)
    shown = [
        marked_text(w, [a >= MARKED_SHARE * largest for a in w.activations]).replace("\n", "↵")
        for w in found.shown
    ]
    lines = [
        f"fires on {found.drawn.density:.2%} of the tokens",
        f"explanation by {roles.about['name']}: {scored.explanation or 'none that can be read'}",
        f"correlation {_number(scored.correlation)} (from a random token "
        f"{_number(scored.random_token)}), detection AUC {_number(scored.detection_auc)}, fuzzing "
        f"AUC {_number(scored.fuzzing_auc)}",
    ]
    return shown, lines


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
