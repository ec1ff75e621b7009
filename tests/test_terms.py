"""Terms of the loss beyond the paper's: each against its closed form, and doing what it is for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.objective import L0, QuadraticL0, Step, Term, WithFrequency
from jumprelu_plugin.step.reference import DenseEntries

BATCH, D_SAE = 40_009, 7
SCALE = 0.03


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


# ---------------------------------------------------------------- frequency


def test_the_frequency_penalty_is_its_formula() -> None:
    """On frequencies that are counted: 0/5, 1/5, 3/5 and 5/5 of the tokens."""
    z = torch.full((5, 4), 0.2)
    z[:1, 1] = z[:3, 2] = z[:, 3] = 2.3
    threshold = torch.full((4,), 0.7)
    step = Step(DenseEntries(z), z * (z > threshold), threshold, 0.3, False, torch.randn(4, 3))
    expected = sum(f * (1 + f / SCALE) for f in (0.0, 0.2, 0.6, 1.0))
    assert float(WithFrequency(L0(), SCALE)(step)) == pytest.approx(expected, rel=1e-6)
    quadratic = QuadraticL0(1.7)(step) + sum(f**2 / SCALE for f in (0.2, 0.6, 1.0))
    assert float(WithFrequency(QuadraticL0(1.7), SCALE)(step)) == pytest.approx(float(quadratic))


def test_the_frequency_penaltys_threshold_gradient_is_the_densitys() -> None:
    """d/dθ of F(1 + F/w₀), F = P(z > θ), is -(1 + 2F/w₀) p(θ): Gaussians give both."""
    step, mean, spread, z = gaussian_step()
    WithFrequency(L0(), SCALE)(step).backward()
    assert step.threshold.grad is not None and z.grad is None
    for i in range(D_SAE):
        distance = float((step.threshold[i] - mean[i]) / spread[i])
        frequency = 0.5 * math.erfc(distance / math.sqrt(2))
        density = math.exp(-(distance**2) / 2) / (float(spread[i]) * math.sqrt(2 * math.pi))
        expected = -(1 + 2 * frequency / SCALE) * density
        assert float(step.threshold.grad[i]) == pytest.approx(expected, rel=0.05), i


def test_the_frequency_penaltys_gradient_reaches_the_encoder_where_it_may() -> None:
    step, _, _, z = gaussian_step(to_input=True)
    WithFrequency(L0(), SCALE)(step).backward()
    assert z.grad is not None and step.threshold.grad is not None
    torch.testing.assert_close(z.grad.sum(0), -step.threshold.grad)


def test_every_sparsity_mode_takes_a_frequency_scale() -> None:
    for mode in ("step", "tanh", "quadratic"):
        sae = JumpReLUTrainingSAE(steered(jumprelu_sparsity_loss_mode=mode, frequency_scale=0.01))
        assert isinstance(sae.sparsity, WithFrequency)
        plain: Term = JumpReLUTrainingSAE(steered(jumprelu_sparsity_loss_mode=mode)).sparsity
        assert sae.sparsity.term == plain


FEATURES, WIDTH, LATENTS, TARGET = 199, 41, 211, 4.0


def steered(**fields: Any) -> JumpReLUTrainingSAEConfig:
    return JumpReLUTrainingSAEConfig(
        **{"d_in": WIDTH, "d_sae": LATENTS, "target_l0": TARGET, "step_path": "sparse", **fields}
    )


def tokens_with_frequent_features(seed: int = 0) -> Iterator[Tensor]:
    """Sums of known directions: seven of them are in 30 % of the tokens, the others in 1 %."""
    g = torch.Generator().manual_seed(1)
    directions = nn.functional.normalize(torch.randn(FEATURES, WIDTH, generator=g), dim=1)
    rate = torch.full((FEATURES,), 0.01)
    rate[:7] = 0.3
    g = torch.Generator().manual_seed(seed)
    while True:
        present = torch.rand(1024, FEATURES, generator=g) < rate
        yield (present * (1 + torch.rand(1024, FEATURES, generator=g))) @ directions


def trained(cfg: JumpReLUTrainingSAEConfig, steps: int = 160) -> JumpReLUTrainingSAE:
    torch.manual_seed(3)
    sae = JumpReLUTrainingSAE(cfg)
    SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * 1024,
            train_batch_size_samples=1024,
            lr=5e-3,
            lr_end=0.0,
            lr_decay_steps=steps // 2,
            n_batches_for_norm_estimate=5,
        ),
        sae=sae,
        data_provider=tokens_with_frequent_features(),
    ).fit()
    return sae.eval()


@torch.no_grad()
def frequencies(sae: JumpReLUTrainingSAE) -> Tensor:
    """Share of unseen tokens on which each latent fires."""
    data = tokens_with_frequent_features(seed=9)
    x = torch.cat([next(data) for _ in range(8)])
    return (sae.encode(x) > 0).float().mean(0)


def test_the_frequency_penalty_removes_frequent_latents_at_the_l0_asked_for() -> None:
    without, with_it = (frequencies(trained(steered(frequency_scale=w))) for w in (None, 0.01))
    assert (without > 0.1).sum() >= 5
    assert (with_it > 0.1).sum() == 0
    for found in (without, with_it):
        assert float(found.sum()) == pytest.approx(TARGET, rel=0.03)
