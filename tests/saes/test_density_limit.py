"""Training with a density penalty or a density limit: dense latents go, L0 stays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from tests.saes.frequent_features import TARGET, frequencies, steered, trained

pytestmark = pytest.mark.usefixtures("one_thread_throughout")


def test_the_density_penalty_removes_dense_latents_at_the_target_l0(
    plain: JumpReLUTrainingSAE,
) -> None:
    without, with_it = frequencies(plain), frequencies(trained(steered(density_penalty_scale=0.01)))
    assert (without > 0.1).sum() >= 5
    assert (with_it > 0.1).sum() == 0
    for found in (without, with_it):
        assert float(found.sum()) == pytest.approx(TARGET, rel=0.03)


def test_the_density_limit_leaves_half_of_the_dense_latents_at_most(
    plain: JumpReLUTrainingSAE,
) -> None:
    found = frequencies(trained(steered(max_latent_density=0.08)))
    assert (found > 0.1).sum() <= 0.5 * (frequencies(plain) > 0.1).sum()
    assert float(found.sum()) == pytest.approx(TARGET, rel=0.03)


def test_a_density_limit_stays_above_the_mean_density() -> None:
    sparse = JumpReLUTrainingSAEConfig(d_in=13, d_sae=211, target_l0=9.0, max_latent_density=0.09)
    assert sparse.resolve().max_latent_density == 0.09
    assert replace(sparse, target_l0=11.0).resolve().max_latent_density == pytest.approx(22 / 211)
    assert replace(sparse, target_l0=13.0).resolve().max_latent_density == 1
    # At a fixed penalty the frequencies are not known beforehand.
    assert replace(sparse, target_l0=13.0, l0_coefficient=0.3).resolve().max_latent_density == 0.09
