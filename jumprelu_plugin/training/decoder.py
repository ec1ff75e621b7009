"""The decoder constraint of the JumpReLU paper: unit rows, and only tangential gradients.

"Jumping Ahead" (arXiv 2407.14435, appendix) keeps every decoder row at unit norm: before Adam, the
part of a row's gradient parallel to the row is removed; after Adam, the row is renormalised.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def remove_parallel_gradient_(
    gradient: Float[Tensor, "d_sae d_out"], W_dec: Float[Tensor, "d_sae d_out"]
) -> None:
    """In place, take from each row of `gradient` its projection on the row of `W_dec` (unit)."""
    parallel = torch.linalg.vecdot(gradient, W_dec)
    gradient.addcmul_(parallel.unsqueeze(1), W_dec, value=-1.0)


@torch.no_grad()
def normalise_rows_(W_dec: Float[Tensor, "d_sae d_out"]) -> None:
    """In place, give every row unit norm; a row of zeros stays zero."""
    norms = torch.linalg.vector_norm(W_dec, dim=1, keepdim=True)
    W_dec.div_(norms.clamp_min(torch.finfo(W_dec.dtype).tiny))
