"""A run of a few hundred steps on the tiny model, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

from jumprelu_plugin import JumpReLUTrainingSAEConfig
from jumprelu_plugin.training.runner import JumpReLUTrainingRunner
from tests.tiny import BOS, D_MODEL, RESIDUAL, VOCABULARY

BATCH, CONTEXT, STEPS, D_SAE = 31, 13, 500, 41
ROWS = 67  # 804 rows of activations an epoch, 15,500 in a run: several times through the text


def token_rows(rows: int = ROWS) -> Dataset:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(4, VOCABULARY, (rows, CONTEXT), generator=generator)
    tokens[:, 0] = BOS
    return Dataset.from_dict({"tokens": tokens.tolist()})


def config(folder: Path, **fields: Any) -> LanguageModelSAERunnerConfig[Any]:
    sae = JumpReLUTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, target_l0=7, step_kernel="sparse")
    given = {
        "sae": sae,
        "model_name": "tiny",
        "hook_name": RESIDUAL,
        "training_tokens": STEPS * BATCH,
        "train_batch_size_tokens": BATCH,
        "context_size": CONTEXT,
        "store_batch_size_prompts": 17,
        "n_batches_in_buffer": 17,
        "n_batches_for_norm_estimate": 3,
        "exclude_special_tokens": True,
        "lr": 3e-3,
        "lr_decay_steps": 60,
        "dead_feature_window": 20,
        "feature_sampling_window": 23,
        "checkpoint_path": str(folder / "checkpoints"),
        "output_path": str(folder / "output"),
        "verbose": False,
        "logger": LoggingConfig(log_to_wandb=False, wandb_log_frequency=1),
        **fields,
    }
    return LanguageModelSAERunnerConfig(**given)


def run(model: Any, cfg: Any, dataset: Any = None, **options: Any) -> JumpReLUTrainingRunner:
    runner = JumpReLUTrainingRunner(cfg, override_dataset=dataset, override_model=model, **options)
    runner.run()
    return runner


def assert_same_sae(found: JumpReLUTrainingRunner, expected: JumpReLUTrainingRunner) -> None:
    for (name, value), (_, wanted) in zip(
        found.sae.state_dict().items(), expected.sae.state_dict().items(), strict=True
    ):
        assert torch.equal(value, wanted), name
    assert torch.equal(found.trainer.act_freq_scores, expected.trainer.act_freq_scores)
    assert found.sae.cfg.metadata.l0 == expected.sae.cfg.metadata.l0


def steps_logged(folder: Path) -> list[int]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "losses/overall_loss" in line]
