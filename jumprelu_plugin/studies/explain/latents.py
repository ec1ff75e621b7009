"""The latents of a study, with contexts to explain from and held-out contexts to score on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from jumprelu_plugin.analysis.top_activations import collect_top_activations
from jumprelu_plugin.analysis.windows import WindowCounts, collect_windows
from jumprelu_plugin.studies.explain.settings import ExplainSettings
from jumprelu_plugin.studies.sampling.latents import SampledLatent, stratified_latents
from jumprelu_plugin.studies.sampling.texts import TextWindow, text_windows

_BEFORE, _AFTER = 14, 6


@dataclass(frozen=True)
class StudyLatent:
    """A latent with its contexts.

    Attributes:
        label: the group it is compared in.
        folder: of its SAE.
        drawn: its index, density and stratum.
        shown: the windows that the explainer sees.
        held_out: windows of other sequences, on which explanations are scored.
    """

    label: str
    folder: str
    drawn: SampledLatent
    shown: list[TextWindow]
    held_out: list[TextWindow]


def study_latents(
    label: str,
    folder: str,
    model: Any,
    sae: Any,
    tokens: Int[Tensor, "sequences positions"],
    settings: ExplainSettings,
    *,
    latents: Sequence[int] | None = None,
) -> list[StudyLatent]:
    """Draw latents of an SAE and collect their contexts.

    The explainer's contexts come from every other sequence and the scored ones from the rest, so no
    token of one is in the other. Latents that fire in only one half are not drawn.

    Args:
        label, folder: for the record.
        model: a hooked model with its tokenizer.
        sae: the dictionary.
        tokens: held-out text.
        settings: how many latents and contexts.
        latents: the latents, in place of a draw.

    Raises:
        ValueError: no latent fires in both halves, a latent is out of range, or the SAE has no hook
            name or expects scaled inputs.
    """
    _require_in_range(latents or (), sae.cfg.d_sae)
    special = list(model.tokenizer.all_special_ids)
    halves = tokens[0::2], tokens[1::2]
    tops = [collect_top_activations(model, sae, half, special_token_ids=special) for half in halves]
    density = torch.stack([top.latent_density for top in tops])
    both = torch.where((density > 0).all(0), density.mean(0), 0.0)
    drawn = (
        stratified_latents(both, settings.latents, strata=settings.strata, seed=settings.seed)
        if latents is None
        else _named(latents, both)
    )
    third = settings.scored_contexts // 3
    counts = (
        WindowCounts((settings.contexts + 1) // 2, settings.contexts // 2, 0, _BEFORE, _AFTER),
        WindowCounts(third, settings.scored_contexts - 2 * third, third, _BEFORE, _AFTER),
    )
    chosen = [each.latent for each in drawn]
    shown, held_out = (
        text_windows(
            collect_windows(
                model, sae, top, chosen, count, special_token_ids=special, seed=settings.seed + i
            ),
            model.tokenizer,
        )
        for i, (top, count) in enumerate(zip(tops, counts, strict=True))
    )
    return [
        StudyLatent(label, folder, each, a, _without_copies(b, a))
        for each, a, b in zip(drawn, shown, held_out, strict=True)
    ]


def _without_copies(windows: list[TextWindow], shown: list[TextWindow]) -> list[TextWindow]:
    """The windows whose text the explainer has not seen; boilerplate repeats across sequences."""
    texts = {window.text for window in shown}
    return [window for window in windows if window.text not in texts]


def _require_in_range(latents: Sequence[int], d_sae: int) -> None:
    for latent in latents:
        if not 0 <= latent < d_sae:
            raise ValueError(f"latent {latent}: the dictionary has latents 0 to {d_sae - 1}")


def _named(latents: Sequence[int], density: Tensor) -> list[SampledLatent]:
    for latent in latents:
        if density[latent] == 0:
            raise ValueError(
                f"latent {latent} does not fire in both halves of the text: give more --sequences"
            )
    return [SampledLatent(latent, float(density[latent]), 0) for latent in latents]
