"""Which latents of a dictionary write in nearly the same direction."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_CHUNK = 1024


@torch.no_grad()
def nearest(
    W_dec: Float[Tensor, "d_sae d_out"], count: int = 5
) -> tuple[Int[Tensor, "d_sae count"], Float[Tensor, "d_sae count"]]:
    """Each latent's nearest others by the cosine of their decoder rows, and the cosines.

    Fewer than `count` for a dictionary of fewer latents. A zero row has cosine 0 with all.
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
