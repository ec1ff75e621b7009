"""A small transcoder in training, and batches of both of its sides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from jumprelu_plugin.saes.transcoder import (
    JumpReLUTrainingSkipTranscoder,
    JumpReLUTrainingTranscoder,
)
from jumprelu_plugin.saes.transcoder_config import (
    JumpReLUTrainingSkipTranscoderConfig,
    JumpReLUTrainingTranscoderConfig,
)
from jumprelu_plugin.training.activations.scaler import PairScaler

D_IN, D_OUT, D_SAE, BATCH = 19, 23, 53, 67


def make(skip: bool, **fields: Any) -> JumpReLUTrainingTranscoder:
    config = JumpReLUTrainingSkipTranscoderConfig if skip else JumpReLUTrainingTranscoderConfig
    kind = JumpReLUTrainingSkipTranscoder if skip else JumpReLUTrainingTranscoder
    start = {"target_l0": 5} if "l0_coefficient" not in fields else {}
    widths = {"d_in": D_IN, "d_out": D_OUT, "d_sae": D_SAE}
    return kind(config(**{**widths, **start, **fields}))


def batches(count: int, scale_in: float = 1.0, scale_out: float = 1.0) -> list[Tensor]:
    """Rows whose output is a non-linear function of the input, with means away from zero."""
    g = torch.Generator().manual_seed(8)
    mix, out = torch.randn(D_IN, D_IN, generator=g), torch.randn(D_IN, D_OUT, generator=g)
    found = []
    for _ in range(count):
        x = 0.7 + torch.randn(BATCH, D_IN, generator=g) @ mix
        y = 0.3 * torch.tanh(x) @ out - 0.4
        found.append(torch.cat([scale_in * x, scale_out * y], 1))
    return found


def endless(**scales: float) -> Iterator[Tensor]:
    while True:
        yield from batches(11, **scales)


def trainer_for(
    sae: JumpReLUTrainingTranscoder, steps: int, **scales: float
) -> SAETrainer[Any, Any]:
    trainer: SAETrainer[Any, Any] = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * BATCH,
            train_batch_size_samples=BATCH,
            lr=5e-3,
            lr_end=5e-4,
            n_batches_for_norm_estimate=11,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=endless(**scales),
    )
    trainer.activation_scaler = PairScaler(D_IN, D_OUT)
    return trainer
