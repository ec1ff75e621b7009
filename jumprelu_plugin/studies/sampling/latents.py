"""Draws latents evenly over the range of their densities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class SampledLatent:
    """A drawn latent.

    Attributes:
        latent: its index.
        density: fraction of the tokens it fires on.
        stratum: 0 for the rarest latents, rising with density.
    """

    latent: int
    density: float
    stratum: int


def stratified_latents(
    density: Float[Tensor, " d_sae"], count: int, *, strata: int = 4, seed: int = 0
) -> list[SampledLatent]:
    """Draw `count` latents that fire, equally many from each stratum of density.

    The strata are quantiles: with all strata sampled equally, every latent that fires is drawn with
    about the same probability. Where a dictionary has fewer latents that fire, all are drawn.

    Args:
        density: fraction of the tokens each latent fires on; those at 0 are left out.
        count: the number of latents.
        strata: the number of strata.
        seed: of the draw.

    Raises:
        ValueError: no latent fires, or a number is not positive.
    """
    if count < 1 or strata < 1:
        raise ValueError(f"{count} latents in {strata} strata: give positive numbers")
    alive = (density > 0).nonzero().flatten()
    if not len(alive):
        raise ValueError("no latent of the SAE fires in this text: give more text")
    generator = torch.Generator().manual_seed(seed)
    # Latents of equal density come in random order, so that an index decides nothing.
    alive = alive[torch.randperm(len(alive), generator=generator)]
    ordered = alive[density[alive].argsort(stable=True)]
    parts = ordered.tensor_split(min(strata, len(ordered)))
    shares = [count // len(parts) + (i < count % len(parts)) for i in range(len(parts))]
    found = []
    for stratum, (part, share) in enumerate(zip(parts, shares, strict=True)):
        for latent in part[torch.randperm(len(part), generator=generator)[:share]].tolist():
            found.append(SampledLatent(latent, float(density[latent]), stratum))
    return found
