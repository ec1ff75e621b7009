"""Small SAEs trained on sums of directions of which a few are in many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from jumprelu_plugin.step.entries import Entries
from jumprelu_plugin.step.estimators import jumprelu
from jumprelu_plugin.step.losses import AuxiliaryLoss, Step, reconstruction
from tests.step.problems import Problem

FEATURES, WIDTH, LATENTS, TARGET = 199, 41, 211, 4.0


def steered(**fields: Any) -> JumpReLUTrainingSAEConfig:
    common = {"d_in": WIDTH, "d_sae": LATENTS, "target_l0": TARGET, "step_kernel": "sparse"}
    return JumpReLUTrainingSAEConfig(**{**common, **fields})


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


def train(sae: JumpReLUTrainingSAE, steps: int, lr: float, **fields: Any) -> None:
    cfg = SAETrainerConfig(
        total_training_samples=steps * 1024,
        train_batch_size_samples=1024,
        lr=lr,
        n_batches_for_norm_estimate=5,
        **{"lr_end": lr, **fields},
    )
    SAETrainer(cfg, sae, data_provider=tokens_with_frequent_features()).fit()


def trained(cfg: JumpReLUTrainingSAEConfig, steps: int = 160) -> JumpReLUTrainingSAE:
    torch.manual_seed(3)
    sae = JumpReLUTrainingSAE(cfg)
    train(sae, steps, lr=5e-3, lr_end=0.0, lr_decay_steps=steps // 2)
    return sae.eval()


@torch.no_grad()
def frequencies(sae: JumpReLUTrainingSAE) -> Tensor:
    """Share of unseen tokens on which each latent fires."""
    data = tokens_with_frequent_features(seed=9)
    x = torch.cat([next(data) for _ in range(8)])
    return (sae.encode(x) > 0).float().mean(0)


WIDTHS = [5, 6, 41, 100, 101]  # of the 101 latents of `problems`, one block of a single latent


def more_terms(entries: Entries, p: Problem, leaves: dict[str, Tensor]) -> Tensor:
    """Nested reconstructions and the auxiliary loss, through the verbs of `Entries`."""
    theta = leaves["threshold"]
    acts = jumprelu(entries.z, entries.per_latent(theta), p.bandwidth, p.to_input)
    step = Step(entries, acts, theta, p.bandwidth, p.to_input, leaves["W_dec"], p.dead)
    offset = 0.3 * p.target.mean(0)
    x_hat, errors = entries.decode_prefixes(
        acts, leaves["W_dec"], offset, p.target, token_weights_of(p), WIDTHS[:-1]
    )
    nested = (errors.sum() + reconstruction(x_hat, p.target)) / len(WIDTHS)
    return nested + 0.7 * AuxiliaryLoss()(step, p.target - x_hat)


def token_weights_of(p: Problem) -> Tensor:
    """Unequal weights of the tokens' inner errors."""
    return torch.linspace(0.3, 1.9, len(p.target), dtype=p.target.dtype)
