"""A training SAE of stock SAELens and one of the plugin with the same weights and settings."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE as StockSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from jumprelu_plugin import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

D_IN, D_SAE, BATCH = 23, 101, 37
StockConfig = sae_lens.JumpReLUTrainingSAEConfig


def stock_config(**fields: Any) -> StockConfig:
    quadratic = fields.get("jumprelu_sparsity_loss_mode") == "quadratic"
    defaults = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "jumprelu_init_threshold": 0.31,
        "jumprelu_bandwidth": 0.43,
        "l0_coefficient": 0.7,
        "target_l0": 7.0 if quadratic else None,
    }
    return StockConfig(**{**defaults, **fields})


def twins(cfg: StockConfig, path: str) -> tuple[StockSAE, JumpReLUTrainingSAE]:
    """SAELens' SAE and ours with the same random parameters, all latents different."""
    stock = StockSAE(cfg)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        stock.threshold.abs_()
    ours = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig.from_dict({**cfg.to_dict(), "step_kernel": path})
    )
    ours.load_state_dict(stock.state_dict())
    return stock.train(), ours.train()


def step(
    sae: Any, x: Tensor, dead: Tensor | None = None, autocast: bool = False
) -> TrainStepOutput:
    """Forward and backward as SAELens' trainer calls them: only the forward under autocast."""
    sae.zero_grad()
    step_input = TrainStepInput(
        sae_in=x,
        coefficients={"l0": 0.7},
        dead_neuron_mask=dead,
        n_training_steps=3,
        is_logging_step=False,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = sae.training_forward_pass(step_input=step_input)
    output.loss.backward()
    return output


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


STEPS = 7
LEARNING_RATE = 3e-3


def batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    mixing = torch.randn(D_IN, D_IN, generator=g)
    return [torch.randn(BATCH, D_IN, generator=g) @ mixing / 3 for _ in range(STEPS)]


def train(
    sae: Any, dtype: torch.dtype = torch.float32, autocast: bool = False
) -> SAETrainer[Any, Any]:
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=STEPS * BATCH,
            train_batch_size_samples=BATCH,
            lr=LEARNING_RATE,
            lr_end=LEARNING_RATE / 10,
            lr_warm_up_steps=3,
            dead_feature_window=1,
            autocast=autocast,
            n_batches_for_norm_estimate=STEPS,
        ),
        sae=sae,
        data_provider=cycle([batch.to(dtype) for batch in batches()]),
    )
    trainer.fit()
    return trainer
