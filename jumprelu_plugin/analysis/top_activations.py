"""Each latent's top activations over a text, and the latents with the clearest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jumprelu_plugin.analysis.activations import latent_activations, left_out
from jumprelu_plugin.models.hooks import require_folded

# Top activations kept for each latent.
TOP = 16


@dataclass(frozen=True)
class TopActivations:
    """The `TOP` highest activations of every latent over a text.

    Attributes:
        tokens: the text, [sequences, positions]; on the CPU, as all other tensors.
        activation: the activations, [d_sae, TOP], descending; 0 if a latent fired less often.
        position: their indices into the flattened `tokens`, [d_sae, TOP].
        latent_density: fraction of the counted tokens each latent fires on, [d_sae].
    """

    tokens: Int[Tensor, "sequences positions"]
    activation: Float[Tensor, "d_sae top"]
    position: Int[Tensor, "d_sae top"]
    latent_density: Float[Tensor, " d_sae"]

    def token_ids(self) -> Int[Tensor, "d_sae top"]:
        """The token id at each position."""
        return self.tokens.flatten()[self.position]

    def followers(self, latent: int, count: int = 5) -> Int[Tensor, " count"]:
        """The tokens that most often follow a latent's top activations, weighted by activation.

        There are fewer than `count` if fewer different tokens follow. A position at the end of a
        sequence is followed by none.
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
        """Token ids around a latent's activation of this rank, and the index of its own token."""
        length = self.tokens.shape[1]
        sequence, column = divmod(int(self.position[latent, rank]), length)
        start, end = max(0, column - before), min(length, column + after + 1)
        return self.tokens[sequence, start:end], column - start


@torch.no_grad()
def collect_top_activations(
    model: Any,
    sae: Any,
    tokens: Int[Tensor, "sequences positions"],
    *,
    batch_size: int = 16,
    special_token_ids: list[int] | None = None,
) -> TopActivations:
    """Run the model over `tokens` and keep each latent's highest activations.

    Args:
        model: a hooked model.
        sae: the dictionary; its metadata names the hook.
        tokens: the text, on any device.
        batch_size: sequences in a batch.
        special_token_ids: tokens whose activations are not counted, beside those that the SAE was
            not trained on (`activations.left_out`).

    Raises:
        ValueError: the SAE has no hook name, its hook does not fire, or it expects scaled inputs.
    """
    require_folded(sae)
    tokens = tokens.cpu()
    ignored = left_out(sae, tokens, special_token_ids or ())
    d_sae = sae.cfg.d_sae
    activation = torch.zeros(d_sae, TOP)
    position = torch.zeros(d_sae, TOP, dtype=torch.long)
    firings = torch.zeros(d_sae, dtype=torch.float64)
    for start, acts in latent_activations(model, sae, tokens, batch_size):
        acts[ignored[start : start + len(acts)]] = 0.0
        firings += (acts > 0).sum(0)
        top = acts.topk(min(TOP, len(acts)), dim=0)
        merged = torch.cat([activation, top.values.T], dim=1)
        positions = torch.cat([position, top.indices.T + start], dim=1)
        activation, order = merged.topk(TOP, dim=1)
        position = positions.gather(1, order)
    n_counted = int((~ignored).sum())
    return TopActivations(tokens, activation, position, (firings / max(n_counted, 1)).float())


def clearest_latents(
    top: TopActivations, count: int = 10, allowed: Bool[Tensor, " d_vocab"] | None = None
) -> list[int]:
    """The latents whose top activations are most nearly all on one informative token.

    The score of a latent is the activation-weighted fraction of its most common token among its top
    activations, times that token's surprisal, -log of its frequency: a latent for "the" is clear
    but says little. Latents with fewer than `TOP` activations and those that fire on more than 5 %
    of tokens are left out. Each token appears once, with the latent that scores highest.

    Args:
        top: the latents' top activations.
        count: the most latents returned.
        allowed: mask of the tokens that may be a latent's most common one, [d_vocab]; all by
            default.
    """
    token_ids = top.token_ids()
    eligible = (top.activation[:, -1] > 0) & (top.latent_density < 0.05)
    same = token_ids.unsqueeze(1) == token_ids.unsqueeze(2)
    weight = top.activation / top.activation.sum(1, keepdim=True).clamp_min(1e-9)
    fraction, most_common = (same * weight.unsqueeze(1)).sum(-1).max(1)
    token = token_ids.gather(1, most_common.unsqueeze(1)).squeeze(1)
    if allowed is not None:
        eligible &= allowed[token]
    counts = torch.bincount(top.tokens.flatten())
    surprisal = -(counts[token].clamp_min(1) / counts.sum()).log()
    order = torch.argsort(fraction * surprisal * eligible, descending=True)
    latents: list[int] = []
    used_tokens: set[int] = set()
    for latent in order.tolist():
        if not eligible[latent] or int(token[latent]) in used_tokens:
            continue
        latents.append(latent)
        used_tokens.add(int(token[latent]))
        if len(latents) == count:
            break
    return latents
