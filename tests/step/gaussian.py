"""A step whose pre-activations are Gaussian, so that densities have closed forms."""

from __future__ import annotations

import torch
from torch import Tensor

from jumprelu_plugin.step.dense import DenseEntries
from jumprelu_plugin.step.losses import Step

BATCH, D_SAE = 40_009, 7


def gaussian_step(to_input: bool = False) -> tuple[Step, Tensor, Tensor, Tensor]:
    """A step whose pre-activations are independent Gaussians; their means, spreads, and z."""
    g = torch.Generator().manual_seed(3)
    mean = torch.linspace(-1.1, 0.9, D_SAE, dtype=torch.float64)
    spread = torch.linspace(0.6, 1.7, D_SAE, dtype=torch.float64)
    noise = torch.randn(BATCH, D_SAE, generator=g, dtype=torch.float64)
    z = (mean + spread * noise).requires_grad_()
    threshold = torch.linspace(0.4, 1.3, D_SAE, dtype=torch.float64).requires_grad_()
    W_dec = torch.randn(D_SAE, 5, generator=g, dtype=torch.float64)
    step = Step(DenseEntries(z), z * (z > threshold), threshold, 0.21, to_input, W_dec)
    return step, mean, spread, z
