"""The penalties on latent densities against their closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from jumprelu_plugin import JumpReLUTrainingSAE
from jumprelu_plugin.step.dense import DenseEntries
from jumprelu_plugin.step.losses import (
    L0,
    QuadraticL0,
    Step,
    Term,
    WithDensityLimit,
    WithDensityPenalty,
)
from tests.saes.frequent_features import steered
from tests.step.gaussian import D_SAE, gaussian_step

pytestmark = pytest.mark.usefixtures("one_thread_throughout")
SCALE = 0.03


def test_the_density_penalty_is_its_formula() -> None:
    """On frequencies that are counted: 0/5, 1/5, 3/5 and 5/5 of the tokens."""
    z = torch.full((5, 4), 0.2)
    z[:1, 1] = z[:3, 2] = z[:, 3] = 2.3
    threshold = torch.full((4,), 0.7)
    step = Step(DenseEntries(z), z * (z > threshold), threshold, 0.3, False, torch.randn(4, 3))
    expected = sum(f * (1 + f / SCALE) for f in (0.0, 0.2, 0.6, 1.0))
    assert float(WithDensityPenalty(L0(), SCALE)(step)) == pytest.approx(expected, rel=1e-6)
    quadratic = QuadraticL0(1.7)(step) + sum(f**2 / SCALE for f in (0.2, 0.6, 1.0))
    assert float(WithDensityPenalty(QuadraticL0(1.7), SCALE)(step)) == pytest.approx(
        float(quadratic)
    )


def test_the_density_penalty_s_threshold_gradient_is_the_formula_s() -> None:
    """d/dθ of F(1 + F/w₀), F = P(z > θ), is -(1 + 2F/w₀) p(θ): Gaussians give both."""
    step, mean, spread, z = gaussian_step()
    WithDensityPenalty(L0(), SCALE)(step).backward()
    assert step.threshold.grad is not None and z.grad is None
    for i in range(D_SAE):
        distance = float((step.threshold[i] - mean[i]) / spread[i])
        frequency = 0.5 * math.erfc(distance / math.sqrt(2))
        density = math.exp(-(distance**2) / 2) / (float(spread[i]) * math.sqrt(2 * math.pi))
        expected = -(1 + 2 * frequency / SCALE) * density
        assert float(step.threshold.grad[i]) == pytest.approx(expected, rel=0.05), i


def test_the_density_penalty_s_gradient_reaches_the_encoder_where_it_may() -> None:
    step, _, _, z = gaussian_step(to_input=True)
    WithDensityPenalty(L0(), SCALE)(step).backward()
    assert z.grad is not None and step.threshold.grad is not None
    torch.testing.assert_close(z.grad.sum(0), -step.threshold.grad)


def test_the_density_limit_weighs_each_latent_by_its_multiplier() -> None:
    """On frequencies that are counted, 0/5, 1/5, 3/5 and 5/5, with a ceiling of 0.3."""
    z = torch.full((5, 4), 0.2)
    z[:1, 1] = z[:3, 2] = z[:, 3] = 2.3
    threshold = torch.full((4,), 0.7)
    step = Step(DenseEntries(z), z * (z > threshold), threshold, 0.3, False, torch.randn(4, 3))
    term = WithDensityLimit(L0(), 0.3)
    assert float(term(step)) == pytest.approx(0.2 + 0.6 + 1.0, rel=1e-6)
    priced = replace(step, density_multipliers=torch.tensor([2.0, 3.0, 5.0, 7.0]))
    excess = 2 * (0.0 - 0.3) + 3 * (0.2 - 0.3) + 5 * (0.6 - 0.3) + 7 * (1.0 - 0.3)
    assert float(term(priced)) == pytest.approx(1.8 + excess, rel=1e-6)


def test_the_density_limit_s_threshold_gradient_is_the_formula_s() -> None:
    """-(1 + μ_i) p(θ_i)."""
    step, mean, spread, _ = gaussian_step()
    prices = torch.linspace(0.0, 7.0, D_SAE, dtype=torch.float64)
    WithDensityLimit(L0(), 0.2)(replace(step, density_multipliers=prices)).backward()
    assert step.threshold.grad is not None
    for i in range(D_SAE):
        distance = float((step.threshold[i] - mean[i]) / spread[i])
        density = math.exp(-(distance**2) / 2) / (float(spread[i]) * math.sqrt(2 * math.pi))
        expected = -(1 + float(prices[i])) * density
        assert float(step.threshold.grad[i]) == pytest.approx(expected, rel=0.05), i


def test_every_sparsity_mode_takes_a_density_penalty_scale() -> None:
    for mode in ("step", "tanh", "quadratic"):
        sae = JumpReLUTrainingSAE(
            steered(jumprelu_sparsity_loss_mode=mode, density_penalty_scale=0.01)
        )
        assert isinstance(sae.sparsity, WithDensityPenalty)
        plain: Term = JumpReLUTrainingSAE(steered(jumprelu_sparsity_loss_mode=mode)).sparsity
        assert sae.sparsity.term == plain
