"""SAELens' training configs, and small runs of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import sae_lens
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from torch import Tensor

from tests.tiny import D_MODEL, RESIDUAL, tiny_tokens

D_SAE, BATCH, STEPS, CONTEXT = 41, 31, 23, 13
# Fields beside the sizes, none of them at its default.
FIELDS: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.7, "l1_warm_up_steps": 5},
    "gated": {"l1_coefficient": 0.3, "l1_warm_up_steps": 7},
    "topk": {"k": 7, "aux_loss_coefficient": 0.5, "use_sparse_activations": False},
    "batchtopk": {"k": 5.5, "topk_threshold_lr": 0.03},
    "matryoshka_batchtopk": {"k": 6, "matryoshka_widths": [11, 29]},
    "matching_pursuit": {"residual_threshold": 0.02, "max_iterations": 5},
    "jumprelu": {
        "l0_coefficient": 0.7,
        "l0_warm_up_steps": 11,
        "jumprelu_init_threshold": 0.13,
        "jumprelu_bandwidth": 0.43,
    },
}
# A stock jumprelu config trains this package's class: the same initial weights, bit for bit, and
# then the same gradients, summed in another order. Adam turns the rounding of a gradient near
# zero into part of a step.
CLOSE = 2e-4


def config(architecture: str, **fields: Any) -> TrainingSAEConfig:
    """SAELens' config of an architecture, whatever is registered for it."""
    if architecture == "jumprelu":
        cls: Any = sae_lens.JumpReLUTrainingSAEConfig
    else:
        cls = get_sae_training_class(architecture)[1]
    given = {"d_in": D_MODEL, "d_sae": D_SAE, "decoder_init_norm": 0.3}
    # A copy: SAELens completes the Matryoshka widths in place.
    return cls(**{**given, **copy.deepcopy(FIELDS[architecture]), **fields})


def run_config(
    sae: TrainingSAEConfig, folder: Path, **fields: Any
) -> LanguageModelSAERunnerConfig[Any]:
    given: dict[str, Any] = {
        "sae": sae,
        "model_name": "tiny",
        "hook_name": RESIDUAL,
        "training_tokens": STEPS * BATCH,
        "train_batch_size_tokens": BATCH,
        "context_size": CONTEXT,
        "store_batch_size_prompts": 5,
        "n_batches_in_buffer": 7,
        "n_batches_for_norm_estimate": 5,
        "lr": 3e-3,
        "lr_warm_up_steps": 3,
        "lr_decay_steps": 5,
        "dead_feature_window": 7,
        "feature_sampling_window": 11,
        "n_checkpoints": 2,
        "checkpoint_path": str(folder / "checkpoints"),
        "output_path": str(folder / "output"),
        "verbose": False,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return LanguageModelSAERunnerConfig(**{**given, **fields})


def dataset() -> Dataset:
    return Dataset.from_dict({"tokens": tiny_tokens(67, CONTEXT).tolist()})


def weights(sae: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in sae.state_dict().items()}
