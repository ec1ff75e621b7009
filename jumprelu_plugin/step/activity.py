"""Which latents a batch activates, counted from its activations, dense or sparse COO.

A latent is active where its activation is not 0; an explicit zero of a sparse matrix does not
count in `firings_by_latent`. Of the three only `mean_l0` waits for the device.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def active_count(acts: Float[Tensor, "batch d_sae"]) -> int | Int[Tensor, ""]:
    """Active (token, latent) pairs: a number of the host for a sparse matrix, which holds the
    active ones alone, and a tensor on the activations' device for a dense one."""
    return acts._nnz() if acts.is_sparse else acts.count_nonzero()


def mean_l0(acts: Float[Tensor, "batch d_sae"]) -> float:
    """Mean number of active latents a token."""
    return float(active_count(acts)) / len(acts)


@torch.no_grad()
def firings_by_latent(acts: Float[Tensor, "batch d_sae"]) -> Int[Tensor, " d_sae"]:
    """The number of tokens on which each latent is active; a sparse matrix names no place twice."""
    if not acts.is_sparse:
        return (acts != 0).sum(0)
    # Not torch.bincount, which reads its largest value back from the device.
    counts = torch.zeros(acts.shape[1], dtype=torch.long, device=acts.device)
    return counts.scatter_add_(0, acts._indices()[1], (acts._values() != 0).long())
