"""Activations of known distribution and the L0 of thresholds on them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

D_IN, D_SAE, TOKENS = 33, 41, 4099


def l0_of(sae: Any, x: Tensor) -> float:
    return float((sae.encode(x) > 0).sum()) / len(x)


def activations(seed: int, tokens: int = TOKENS, d_in: int = D_IN) -> Float[Tensor, "n d"]:
    generator = torch.Generator().manual_seed(seed)
    return 2.3 * torch.randn(tokens, d_in, generator=generator) + torch.linspace(-1, 1, d_in)
