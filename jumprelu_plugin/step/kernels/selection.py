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
from jumprelu_plugin.step.kernels.products import sampled_product
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
    every = torch.arange(capacity, device=x.device)
    # Unused entries name tokens and latents in turn: sums that add zeros to all of them by atomic
    # operations would queue at a single one.
    unused_pairs = torch.stack((every % batch, every % d_sae))

    pairs = unused_pairs.clone()
    token_ends = pairs_of(screen(x, weight, b_enc, edge, center), pairs)
    used = every < token_ends[-1]
    rows, cols = pairs[0], pairs[1]
    latents, order = torch.sort(torch.where(used, cols, d_sae).int(), stable=True)
    limits = torch.arange(d_sae + 1, device=x.device, dtype=torch.int32)
    latent_ends = torch.searchsorted(latents, limits)

    z = sampled_product(order, rows, cols, latent_ends[-1], x, weight, center)
    z += b_enc[cols]
    keep = (z > edge[cols]) & used
    kept_before = _sum_before(keep)
    kept_by_latent = _sum_before(keep[order])
    new_pairs, new_order, new_z = unused_pairs, every.clone(), torch.full_like(z, UNUSED_Z)
    keep_entries(keep, kept_before, kept_by_latent, pairs, z, order, new_pairs, new_z, new_order)
    pattern = BufferedPattern(
        pairs=new_pairs,
        batch=batch,
        d_sae=d_sae,
        latent_order=(new_order, kept_by_latent[latent_ends]),
        token_ends=kept_before[token_ends.clamp(max=capacity)],
    )
    return pattern, new_z, token_ends[-1]


def _sum_before(flags: Tensor) -> Int[Tensor, " flags+1"]:
    """How many flags are True before each, and before the end."""
    sums = flags.new_zeros(len(flags) + 1, dtype=torch.int64)
    torch.cumsum(flags, 0, out=sums[1:])
    return sums
