"""Closed-loop frequencies: what a latent's firings have to cost for it not to fire too often.

That latent i fires on at most a share c of the tokens is a constraint, as the L0 asked for is
(`control.l0`), and its multiplier μ_i ≥ 0 is the price of a firing of latent i, beside the 1
that every firing costs. Each batch's frequency f_i moves it,

    μ_i ← max(0, μ_i + r · min(1, f_i/c - 1)),

(dual ascent), so that it ends where the latent just keeps to the ceiling: most prices stay 0, some
rise to 1 or 2, a few to 10. One price for all that are above is either too low for those few or too
high for the others (docs/results.md).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# r. With ten times as much, prices follow each batch's chance (docs/results.md).
RATE = 0.3
TENSOR_NAME = "frequency_prices"


class DensityMultipliers:
    """The price μ_i of each latent's firings, [d_sae], in units of λ.

    Args:
        ceiling: c, a share of the tokens.
    """

    def __init__(self, d_sae: int, ceiling: float):
        self.ceiling = ceiling
        self.prices: Float[Tensor, " d_sae"] = torch.zeros(d_sae)

    @torch.no_grad()
    def update(self, feature_acts: Float[Tensor, "batch d_sae"]) -> None:
        """Take in one batch's activations, dense or sparse COO of the active ones."""
        batch, d_sae = feature_acts.shape
        if feature_acts.is_sparse:
            firings = torch.bincount(feature_acts._indices()[1], minlength=d_sae)
        else:
            firings = (feature_acts > 0).sum(0)
        excess = firings / (batch * self.ceiling) - 1
        prices = self.prices.to(excess.device) + RATE * excess.clamp_max(1.0)
        self.prices = prices.clamp_min(0.0)

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {TENSOR_NAME: self.prices}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.prices = tensors[TENSOR_NAME]
