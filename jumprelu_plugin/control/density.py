"""Density control: a multiplier for each latent that keeps it from firing too often.

That latent i fires on at most a share c of the tokens is a constraint, as the target L0 is
(`control.l0`). Its multiplier μ_i ≥ 0 is what a firing of latent i costs beside the 1 that every
firing costs. Each batch's latent density f_i moves it by dual ascent,

    μ_i ← min(1/2, max(0, μ_i + r · min(1, f_i/c - 1))),

so that it ends where the latent just keeps to the limit, or at 1/2: most multipliers stay 0, and a
latent whose firings are worth half more than others' may be dense. One penalty for all latents
above the limit is either too low for a few or too high for the others (docs/ablations.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.step.activity import firings_by_latent

# r. With ten times as much, multipliers follow each batch's noise (docs/ablations.md).
RATE = 0.3
# What the limit may cost. On layer 15 of Gemma 3 270M a largest multiplier of 2 took 11 % more FVU
# than no limit, 1/2 took 4 % and 1/4 took 3 %; with 1/2, 0.4 % of the latents are above 10 % of the
# tokens, with 1/4 0.9 %, and 2.6 % without a limit (docs/ablations.md).
LARGEST = 0.5
TENSOR_NAME = "density_multipliers"


class DensityMultipliers:
    """The multiplier μ_i of each latent's density limit, [d_sae], in units of λ.

    Args:
        max_density: c, a share of the tokens.
    """

    def __init__(self, d_sae: int, max_density: float):
        self.max_density = max_density
        self.multipliers: Float[Tensor, " d_sae"] = torch.zeros(d_sae)

    @torch.no_grad()
    def update(self, feature_acts: Float[Tensor, "batch d_sae"]) -> None:
        """Take in one batch's activations, dense or sparse COO of the active ones."""
        self.update_from(firings_by_latent(feature_acts), len(feature_acts))

    @torch.no_grad()
    def update_from(self, firings: Int[Tensor, " d_sae"], tokens: int) -> None:
        """Take in on how many of a batch's tokens each latent is active."""
        excess = firings / (tokens * self.max_density) - 1
        multipliers = self.multipliers.to(excess.device) + RATE * excess.clamp_max(1.0)
        self.multipliers = multipliers.clamp(0.0, LARGEST)

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs."""
        return {TENSOR_NAME: self.multipliers}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` gave."""
        self.multipliers = tensors[TENSOR_NAME]
