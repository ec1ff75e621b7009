"""What a run needs beside its SAE, asked before its model is loaded: devices, login, schedule."""

from __future__ import annotations

import os
from typing import Any

import wandb

from jumprelu_plugin.models.devices import require_device

# SAELens' own names (`sae_lens.training.optim.get_lr_scheduler`).
SCHEDULERS = ("constant", "cosineannealing", "cosineannealingwarmrestarts")


def require_what_a_run_needs(cfg: Any) -> None:
    """Raise ValueError for the first thing that a run of SAELens' config lacks."""
    for field in ("device", "llm_device", "act_store_device"):
        name = getattr(cfg, field, None)
        if name is not None and name != "with_model":
            require_device(name)
    if cfg.lr_scheduler_name.lower() not in SCHEDULERS:
        raise ValueError(
            f"lr_scheduler_name is {cfg.lr_scheduler_name!r}; it must be one of "
            f"{', '.join(SCHEDULERS)}"
        )
    if cfg.n_restart_cycles != 1 and cfg.lr_scheduler_name.lower() != SCHEDULERS[-1]:
        raise ValueError(
            f"n_restart_cycles is {cfg.n_restart_cycles}, which the schedule "
            f"{cfg.lr_scheduler_name!r} does not read: set lr_scheduler_name={SCHEDULERS[-1]!r}, "
            "or leave it out"
        )
    if cfg.logger.log_to_wandb:
        _require_wandb_login()


def _require_wandb_login() -> None:
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in ("online", "run") or wandb.api.api_key:
        return
    raise ValueError(
        "log_to_wandb is on, as it is by default in SAELens, and nobody is logged in to wandb "
        "here: run `wandb login`, or set WANDB_MODE=offline, or train with --log_to_wandb False "
        "(LoggingConfig(log_to_wandb=False)); metrics.jsonl has the metrics in every case"
    )
