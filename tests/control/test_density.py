"""Multipliers of the density limit, between two steps."""

from __future__ import annotations

import pytest
import torch

from jumprelu_plugin.control.density import LARGEST, RATE, DensityMultipliers

pytestmark = pytest.mark.usefixtures("one_thread_throughout")


@pytest.mark.parametrize("sparse", [False, True])
def test_multipliers_follow_the_latent_densities(sparse: bool) -> None:
    """Up with what is above the limit, at most by the rate and to the largest; down, and not below
    0, otherwise."""
    acts = torch.zeros(50, 3)
    acts[:12, 1] = acts[:45, 2] = 1.7  # 0, 24 and 90 % of the tokens
    limit = DensityMultipliers(3, 0.2)
    for _ in range(3):
        limit.update(acts.to_sparse() if sparse else acts)
    assert 3 * 0.2 * RATE < LARGEST < 3 * RATE
    found = limit.multipliers
    torch.testing.assert_close(found, torch.tensor([0.0, 3 * 0.2 * RATE, LARGEST]))
    acts[2:, 1:] = 0
    limit.update(acts.to_sparse() if sparse else acts)
    expected = torch.tensor([0.0, 0.0, LARGEST - 0.8 * RATE])
    torch.testing.assert_close(limit.multipliers, expected)
    resumed = DensityMultipliers(3, 0.2)
    resumed.load(limit.tensors())
    assert torch.equal(resumed.multipliers, limit.multipliers)
