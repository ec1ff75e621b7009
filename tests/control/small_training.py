"""A small SAE in training in the paper's units, and a config that is valid."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

D_IN, D_SAE, BATCH, STEPS = 19, 53, 61, 6
RATE, SPARSITY, WARM_UP, THETA, BANDWIDTH = 5e-3, 0.006, 3, 0.11, 0.07  # in the paper's units


def data() -> list[Tensor]:
    g = torch.Generator().manual_seed(8)
    mixing = torch.randn(D_IN, D_IN, generator=g)
    return [0.7 + torch.randn(BATCH, D_IN, generator=g) @ mixing for _ in range(STEPS)]


def train(sae: JumpReLUTrainingSAE, batches: list[Tensor]) -> list[float]:
    """Every step's loss; afterwards the SAE is folded, as SAELens' runner leaves it."""
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=len(batches) * BATCH,
            train_batch_size_samples=BATCH,
            lr=RATE,
            lr_end=RATE / 10,
            n_batches_for_norm_estimate=len(batches),
        ),
        sae=sae,
        data_provider=cycle(batches),
    )
    losses: list[float] = []
    take_step = trainer.step

    def recorded(batch: Tensor) -> Any:
        output = take_step(batch)
        losses.append(output.loss.item())
        return output

    trainer.step = recorded  # type: ignore[method-assign]
    trainer.fit()
    return losses


def good_config(**fields: Any) -> JumpReLUTrainingSAEConfig:
    return JumpReLUTrainingSAEConfig(**{"d_in": 7, "d_sae": 13, "target_l0": 3, **fields})
