"""Batches of sums of a few known directions, the same for every seed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

D_IN, D_SAE, FEATURES, BATCH, STEPS = 29, 127, 83, 257, 100


def tokens(seed: int) -> Iterator[Tensor]:
    """Batches of sums of a few known directions out of many, the same directions for every seed."""
    directions = torch.randn(FEATURES, D_IN, generator=torch.Generator().manual_seed(1))
    directions /= directions.norm(dim=1, keepdim=True)
    g = torch.Generator().manual_seed(seed)
    while True:
        active = torch.rand(BATCH, FEATURES, generator=g) < 0.05
        amounts = 1 + torch.rand(BATCH, FEATURES, generator=g)
        yield (active * amounts) @ directions + 0.05 * torch.randn(BATCH, D_IN, generator=g)
