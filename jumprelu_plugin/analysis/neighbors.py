"""The latents of a dictionary whose decoder rows are most similar."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_CHUNK = 1024


@torch.no_grad()
def nearest_latents(
    W_dec: Float[Tensor, "d_sae d_out"], count: int = 5
) -> tuple[Int[Tensor, "d_sae count"], Float[Tensor, "d_sae count"]]:
    """Each latent's nearest others by the cosine similarity of decoder rows, and the cosines.

    Both are [d_sae, count], descending, with fewer columns if there are fewer other latents. A row
    of zeros has cosine 0 with every other.
    """
    rows = W_dec.detach().float()
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    count = min(count, len(unit) - 1)
    indices, cosines = [], []
    for start in range(0, len(unit), _CHUNK):
        cosine = unit[start : start + _CHUNK] @ unit.T
        own = torch.arange(len(cosine))
        cosine[own, own + start] = -torch.inf
        top = cosine.topk(count, dim=1)
        indices.append(top.indices)
        cosines.append(top.values)
    return torch.cat(indices), torch.cat(cosines)
