"""Each latent's activations around its top activations, and their histogram.

This reads the text of `top_activations` a second time, because the positions of the top activations
are known only after the first pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jumprelu_plugin.analysis.activations import latent_activations, left_out
from jumprelu_plugin.analysis.top_activations import TopActivations


@dataclass(frozen=True)
class LatentContexts:
    """Windows of text around each latent's top activations, with its activation at every token.

    Attributes:
        tokens: token ids, [d_sae, context, window]; undefined where `inside` is False.
        activation: the latent's activations, [d_sae, context, window]; 0 where `inside` is False.
        inside: mask of the tokens in the sequence, [d_sae, context, window]; all False for a
            context that does not exist.
        focus: index of the top activation's token in its window.
        histogram: counts of the positive activations in equal bins from 0 to the largest,
            [d_sae, bin].
    """

    tokens: Int[Tensor, "d_sae context window"]
    activation: Float[Tensor, "d_sae context window"]
    inside: Bool[Tensor, "d_sae context window"]
    focus: int
    histogram: Int[Tensor, "d_sae bin"]


@torch.no_grad()
def collect_contexts(
    model: Any,
    sae: Any,
    top: TopActivations,
    *,
    count: int = 8,
    before: int = 14,
    after: int = 7,
    bins: int = 24,
    batch_size: int = 16,
    special_token_ids: list[int] | None = None,
) -> LatentContexts:
    """Collect the contexts and histograms of all latents in one pass over the text.

    A top activation whose token lies in the window of a higher one is skipped, so that a run of
    active tokens is not shown several times.

    Args:
        model: a hooked model.
        sae: the dictionary; its metadata names the hook.
        top: the latents' top activations.
        count: the most contexts of a latent.
        before, after: tokens in a window before and after the top activation's.
        bins: bins of the histogram.
        batch_size: sequences in a batch.
        special_token_ids: tokens whose activations are not counted, as in
            `collect_top_activations`.

    Raises:
        ValueError: the SAE has no hook name.
    """
    text, length = top.tokens.flatten(), top.tokens.shape[1]
    positions = distinct_positions(top.position, top.activation > 0, length, before, after, count)
    offsets = torch.arange(-before, after + 1)
    columns = (positions % length).unsqueeze(-1) + offsets
    inside = (columns >= 0) & (columns < length) & (positions >= 0).unsqueeze(-1)
    flat = torch.where(inside, positions.unsqueeze(-1) + offsets, 0)

    ignored = left_out(sae, top.tokens, special_token_ids or ())
    largest = top.activation[:, 0].clamp_min(1e-30)
    d_sae = len(largest)
    activation = torch.zeros(flat.shape)
    histogram = torch.zeros(d_sae * bins, dtype=torch.long)
    latents = torch.arange(d_sae)[:, None, None].expand_as(flat)
    for start, acts in latent_activations(model, sae, top.tokens, batch_size):
        acts[ignored[start : start + len(acts)]] = 0.0
        in_batch = inside & (flat >= start) & (flat < start + len(acts))
        activation[in_batch] = acts[flat[in_batch] - start, latents[in_batch]]
        rows, active = acts.nonzero(as_tuple=True)
        fraction = acts[rows, active] / largest[active]
        bin_index = (fraction * bins).long().clamp_max(bins - 1)
        histogram += torch.bincount(active * bins + bin_index, minlength=d_sae * bins)
    return LatentContexts(text[flat], activation, inside, before, histogram.view(d_sae, bins))


def distinct_positions(
    position: Int[Tensor, "latent candidate"],
    allowed: Bool[Tensor, "latent candidate"],
    length: int,
    before: int,
    after: int,
    count: int,
) -> Int[Tensor, "latent count"]:
    """The first `count` allowed candidates outside the windows of those kept earlier; -1 for none.

    Args:
        position: flat positions in the text, the preferred ones first.
        allowed: the candidates that may be kept.
        length: tokens in a sequence.
        before, after: tokens in a window before and after its position.
        count: the most positions of a latent.
    """
    kept = torch.zeros_like(allowed)
    for rank in range(position.shape[1]):
        gap = position[:, rank : rank + 1] - position[:, :rank]
        same_row = (position[:, rank : rank + 1] // length) == (position[:, :rank] // length)
        covered = (kept[:, :rank] & same_row & (gap >= -before) & (gap <= after)).any(1)
        kept[:, rank] = allowed[:, rank] & ~covered
    order = torch.argsort(kept.int(), dim=1, descending=True, stable=True)[:, :count]
    return torch.where(kept.gather(1, order), position.gather(1, order), -1)
