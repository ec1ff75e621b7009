"""A latent's activations along its strongest contexts, and how they are distributed.

A second pass over the text that `examples.collect` read, because only that pass tells which places
to look at. It chooses no latents and prints nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jumprelu_plugin.analysis.top_activations import LatentExamples
from jumprelu_plugin.models.hooks import attached, flat_heads, flat_input, sae_sites


@dataclass(frozen=True)
class LatentContexts:
    """Windows of text around each latent's examples, with its activation on every token.

    Attributes:
        tokens: token ids, [d_sae, example, window]; meaningless where `inside` is False.
        activation: the latent's activation on each, 0 outside.
        inside: False beyond the ends of the sequence, and everywhere for an example that is a
            repetition or does not exist (the latent fired less often).
        focus: index of the example's own token in a window.
        histogram: counts of the activations above 0, in equal bins from 0 to the largest,
            [d_sae, bin].
    """

    tokens: Int[Tensor, "d_sae example window"]
    activation: Float[Tensor, "d_sae example window"]
    inside: Bool[Tensor, "d_sae example window"]
    focus: int
    histogram: Int[Tensor, "d_sae bin"]


@torch.no_grad()
def contexts(
    model: Any,
    sae: Any,
    examples: LatentExamples,
    *,
    count: int = 8,
    before: int = 14,
    after: int = 7,
    bins: int = 24,
    batch_size: int = 16,
    special_token_ids: list[int] | None = None,
) -> LatentContexts:
    """Read the windows and histograms of all latents in one pass over the examples' text.

    Of a latent's examples, one whose token already stands in the window of a stronger one is
    passed over: a run of firing tokens would otherwise be shown several times.

    Args:
        count: windows of each latent, at most.
        before, after: tokens of a window to the left and right of the example's.
        special_token_ids: tokens that do not count, as for `collect`.
    """
    length = examples.tokens.shape[1]
    places = _distinct(examples, count, before, after)
    offsets = torch.arange(-before, after + 1)
    columns = (places % length).unsqueeze(-1) + offsets
    inside = (columns >= 0) & (columns < length) & (places >= 0).unsqueeze(-1)
    flat = torch.where(inside, places.unsqueeze(-1) + offsets, 0)
    shown = examples.tokens.flatten()[flat]

    special = torch.tensor(special_token_ids or [], dtype=examples.tokens.dtype)
    largest = examples.activation[:, 0].clamp_min(1e-30)
    d_sae = len(largest)
    activation = torch.zeros(flat.shape)
    histogram = torch.zeros(d_sae * bins, dtype=torch.long)
    latents = torch.arange(d_sae)[:, None, None].expand_as(flat)
    for start, acts in _activations(model, sae, examples.tokens, batch_size):
        acts[torch.isin(examples.tokens.flatten()[start : start + len(acts)], special)] = 0.0
        here = inside & (flat >= start) & (flat < start + len(acts))
        activation[here] = acts[flat[here] - start, latents[here]]
        rows, fired = acts.nonzero(as_tuple=True)
        share = acts[rows, fired] / largest[fired]
        bin_of = (share * bins).long().clamp_max(bins - 1)
        histogram += torch.bincount(fired * bins + bin_of, minlength=d_sae * bins)
    return LatentContexts(shown, activation, inside, before, histogram.view(d_sae, bins))


def _activations(model: Any, sae: Any, tokens: Tensor, batch_size: int) -> Any:
    """Each batch: the flat position it starts at, and its activations [token, d_sae]."""
    hook, _ = sae_sites(sae)
    seen: list[Tensor] = []
    for start in range(0, len(tokens), batch_size):
        seen.clear()
        with attached(model, hook, lambda x: seen.append(flat_heads(x))):
            model(tokens[start : start + batch_size], return_type=None)
        with flat_input(sae):
            acts = sae.encode(seen[0].flatten(0, 1).to(sae.dtype)).float().cpu()
        yield start * tokens.shape[1], acts


def _distinct(
    examples: LatentExamples, count: int, before: int, after: int
) -> Int[Tensor, "d_sae count"]:
    """Flat positions of the strongest examples in windows of their own, −1 for none."""
    length = examples.tokens.shape[1]
    position, fires = examples.position, examples.activation > 0
    kept = torch.zeros_like(fires)
    for rank in range(position.shape[1]):
        gap = position[:, rank : rank + 1] - position[:, :rank]
        same_row = (position[:, rank : rank + 1] // length) == (position[:, :rank] // length)
        covered = (kept[:, :rank] & same_row & (gap >= -before) & (gap <= after)).any(1)
        kept[:, rank] = fires[:, rank] & ~covered
    order = torch.argsort(kept.int(), dim=1, descending=True, stable=True)[:, :count]
    return torch.where(kept.gather(1, order), position.gather(1, order), -1)
