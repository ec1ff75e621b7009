"""Runs over three dictionaries of the tiny model, at two hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from jumprelu_plugin import JumpReLUMultiTrainingRunner, JumpReLUTrainingSAEConfig
from tests.tiny import MLP, RESIDUAL, WIDTH
from tests.training.runs import BATCH, config, token_rows

STEPS, D_SAE = 23, 41


def of(folder: Path, hook: str = RESIDUAL, *, sae: Any = None, **fields: Any) -> Any:
    """The config of one dictionary's own run."""
    given = {"d_in": WIDTH[hook], "d_sae": D_SAE, "target_l0": 7, "step_kernel": "sparse"}
    given |= {name: fields.pop(name) for name in ("target_l0", "d_sae") if name in fields}
    return config(
        folder,
        sae=JumpReLUTrainingSAEConfig(**given) if sae is None else sae,
        hook_name=hook,
        training_tokens=STEPS * BATCH,
        lr_decay_steps=7,
        **fields,
    )


def dictionaries(folder: Path, **fields: Any) -> dict[str, Any]:
    return {
        "low": of(folder, target_l0=5, **fields),
        "high": of(folder, target_l0=11, **{"lr": 1e-3, **fields}),
        "mlp": of(folder, MLP, **fields),
    }


def train(model: Any, configs: dict[str, Any], **options: Any) -> JumpReLUMultiTrainingRunner:
    options = {"check_first": False, **options}
    runner = JumpReLUMultiTrainingRunner(configs, token_rows(), model, **options)
    runner.run()
    return runner


def weights(folder: Path) -> dict[str, Any]:
    return {
        f"{file.parent.name}/{name}": value
        for file in sorted(folder.glob("*/sae_weights.safetensors"))
        for name, value in load_file(file).items()
    }
