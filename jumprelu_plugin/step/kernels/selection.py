"""`select` by kernels, in buffers whose size is chosen before the pairs are counted.

The size follows from the number of candidates in earlier steps (`buffers.py`). A step that finds
more is detected before its results are used, and computed again in larger buffers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.step.kernels.compaction import keep_entries, pairs_of
from jumprelu_plugin.step.kernels.pattern import BufferedPattern
from jumprelu_plugin.step.kernels.products import pre_activations
from jumprelu_plugin.step.kernels.screening import screen

# What unused entries hold as z: below every threshold, and finite.
UNUSED_Z = -1e30


@torch.no_grad()
def select_into(
    capacity: int,
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    edge: Float[Tensor, " d_sae"],
    *,
    center: Float[Tensor, " d_in"] | None = None,
) -> tuple[BufferedPattern, Float[Tensor, " capacity"], Int[Tensor, ""]]:
    """The pairs with z = (x - center) @ W_enc + b_enc > edge, and their z; nothing here waits.

    Args:
        capacity: for how many candidates there is room.
        x, W_enc, b_enc, edge, center: as in `select.select`, in float32.

    Returns:
        The selected pairs, sorted by token and then by latent, with unused entries after them; z,
        `UNUSED_Z` at unused entries; and the number of candidates, on the device. If that is more
        than the capacity, pairs are missing.
    """
    batch, d_sae = len(x), W_enc.shape[1]
    weight = W_enc.t().contiguous()
    rows = x.new_empty(capacity, dtype=torch.int32)
    cols = x.new_full((capacity,), d_sae, dtype=torch.int32)  # unused ones are sorted to the end
    token_ends = pairs_of(screen(x, weight, b_enc, edge, center), rows, cols)
    latents, order = torch.sort(cols, stable=True)
    limits = torch.arange(d_sae + 1, device=x.device, dtype=torch.int32)
    latent_ends = torch.searchsorted(latents, limits)

    z, keep, keep_by_latent = pre_activations(
        order, rows, cols, latent_ends[-1], x, weight, center, b_enc, edge
    )
    kept_before, kept_by_latent = _sum_before(keep), _sum_before(keep_by_latent)
    pairs, z, order = keep_entries(
        keep, kept_before, kept_by_latent, rows, cols, z, order,
        batch=batch, d_sae=d_sae, unused_z=UNUSED_Z,
    )  # fmt: skip
    pattern = BufferedPattern(
        pairs=pairs,
        batch=batch,
        d_sae=d_sae,
        latent_order=(order, kept_by_latent[latent_ends]),
        token_ends=kept_before[token_ends.clamp(max=capacity)],
    )
    return pattern, z, token_ends[-1]


def _sum_before(flags: Tensor) -> Int[Tensor, " flags+1"]:
    """How many flags are True before each, and before the end."""
    sums = flags.new_zeros(len(flags) + 1, dtype=torch.int64)
    torch.cumsum(flags, 0, out=sums[1:])
    return sums
