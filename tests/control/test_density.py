"""Multipliers of the density limit, between two steps."""

from __future__ import annotations

import pytest
import torch

from jumprelu_plugin.control.density import RATE, DensityMultipliers

pytestmark = pytest.mark.usefixtures("one_thread_throughout")


@pytest.mark.parametrize("sparse", [False, True])
def test_multipliers_follow_the_latent_densities(sparse: bool) -> None:
    """Up with what is above the ceiling, at most by the rate; down, and not below 0, otherwise."""
    acts = torch.zeros(50, 3)
    acts[:12, 1] = acts[:45, 2] = 1.7  # 0, 24 and 90 % of the tokens
    prices = DensityMultipliers(3, 0.2)
    for _ in range(7):
        prices.update(acts.to_sparse() if sparse else acts)
    torch.testing.assert_close(prices.multipliers, 7 * RATE * torch.tensor([0.0, 0.2, 1.0]))
    acts[2:, 1:] = 0
    prices.update(acts.to_sparse() if sparse else acts)
    torch.testing.assert_close(prices.multipliers, RATE * torch.tensor([0.0, 1.4 - 0.8, 7.0 - 0.8]))
    resumed = DensityMultipliers(3, 0.2)
    resumed.load(prices.tensors())
    assert torch.equal(resumed.multipliers, prices.multipliers)
