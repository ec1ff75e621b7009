"""The tokens a latent fires on most, in context, and the latents that are clearest by them.

Reads activations with the model's own hook and keeps, for every latent, its strongest tokens. It
explains nothing and calls no other model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jumprelu_plugin.models.hooks import attached, flat_heads, flat_input, require_folded, sae_sites

TOP = 16


@dataclass(frozen=True)
class LatentExamples:
    """The strongest activations of every latent over a text.

    Attributes:
        tokens: the text, [sequences, positions].
        activation: [d_sae, TOP], descending, 0 where a latent fired less often.
        position: flat index of each into `tokens`, [d_sae, TOP].
        firing_frequency: share of counted tokens a latent fires on, [d_sae].
    """

    tokens: Int[Tensor, "sequences positions"]
    activation: Float[Tensor, "d_sae top"]
    position: Int[Tensor, "d_sae top"]
    firing_frequency: Float[Tensor, " d_sae"]

    def token_ids(self) -> Int[Tensor, "d_sae top"]:
        """The token at each example."""
        return self.tokens.flatten()[self.position]

    def followers(self, latent: int, count: int = 5) -> Int[Tensor, " count"]:
        """The tokens that most often come next in its examples, weighted by activation.

        Fewer than `count` where fewer follow; an example at a sequence's end has none.
        """
        length = self.tokens.shape[1]
        inside = (self.position[latent] % length < length - 1) & (self.activation[latent] > 0)
        following = self.tokens.flatten()[self.position[latent][inside] + 1]
        weight = torch.zeros(int(self.tokens.max()) + 1)
        weight.index_add_(0, following, self.activation[latent][inside])
        return weight.topk(min(count, int((weight > 0).sum()))).indices

    def context(
        self, latent: int, rank: int, before: int = 8, after: int = 4
    ) -> tuple[Tensor, int]:
        """Token ids around one example, and the index of the example's token among them."""
        length = self.tokens.shape[1]
        sequence, column = divmod(int(self.position[latent, rank]), length)
        start, end = max(0, column - before), min(length, column + after + 1)
        return self.tokens[sequence, start:end], column - start


@torch.no_grad()
def collect(
    model: Any,
    sae: Any,
    tokens: Int[Tensor, "sequences positions"],
    *,
    batch_size: int = 16,
    special_token_ids: list[int] | None = None,
) -> LatentExamples:
    """Run the model over `tokens` and keep each latent's strongest tokens (special ones aside).

    Raises:
        ValueError: the SAE has no hook name, or still expects scaled inputs.
    """
    hook, _ = sae_sites(sae)
    require_folded(sae)
    special = torch.tensor(special_token_ids or [], dtype=tokens.dtype)
    d_sae = sae.cfg.d_sae
    best = torch.zeros(d_sae, TOP)
    where = torch.zeros(d_sae, TOP, dtype=torch.long)
    fired, counted = torch.zeros(d_sae, dtype=torch.float64), 0
    seen: list[Tensor] = []

    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        seen.clear()
        with attached(model, hook, lambda x: seen.append(flat_heads(x))):
            model(batch, return_type=None)
        with flat_input(sae):
            acts = sae.encode(seen[0].flatten(0, 1).to(sae.dtype)).float().cpu()
        acts[torch.isin(batch.flatten(), special)] = 0.0
        fired += (acts > 0).sum(0)
        counted += int((~torch.isin(batch, special)).sum())
        top = acts.topk(min(TOP, len(acts)), dim=0)
        merged = torch.cat([best, top.values.T], dim=1)
        places = torch.cat([where, top.indices.T + start * tokens.shape[1]], dim=1)
        best, order = merged.topk(TOP, dim=1)
        where = places.gather(1, order)
    return LatentExamples(tokens, best, where, (fired / max(counted, 1)).float())


def clearest(
    examples: LatentExamples, count: int = 10, among: Bool[Tensor, " d_vocab"] | None = None
) -> list[int]:
    """Latents whose strongest tokens are most nearly one telling token, no token appearing twice.

    Clarity is the activation-weighted share of a latent's most common token among its examples,
    times that token's surprise (-log of its frequency): a latent for "the" is clear and tells
    little. Latents with fewer than TOP examples, or that fire on more than 5 % of tokens, are left
    out, and so is a second latent for a token that has one. `among` restricts the telling tokens,
    to whole words, say.
    """
    token_ids = examples.token_ids()
    usable = (examples.activation[:, -1] > 0) & (examples.firing_frequency < 0.05)
    same = token_ids.unsqueeze(1) == token_ids.unsqueeze(2)
    weight = examples.activation / examples.activation.sum(1, keepdim=True).clamp_min(1e-9)
    share = (same * weight.unsqueeze(1)).sum(-1)
    clarity, favourite = share.max(1)
    counts = torch.bincount(examples.tokens.flatten())
    token = token_ids.gather(1, favourite.unsqueeze(1)).squeeze(1)
    if among is not None:
        usable &= among[token]
    surprise = -(counts[token].clamp_min(1) / counts.sum()).log()
    order = torch.argsort(clarity * surprise * usable, descending=True)
    chosen: list[int] = []
    taken: set[int] = set()
    for latent in order.tolist():
        token = int(token_ids[latent, favourite[latent]])
        if not usable[latent] or token in taken:
            continue
        chosen.append(latent)
        taken.add(token)
        if len(chosen) == count:
            break
    return chosen
