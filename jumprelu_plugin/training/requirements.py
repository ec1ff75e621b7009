"""What a run needs beside its SAE, asked before its model is loaded: devices, login, schedule."""

from __future__ import annotations

import math
import os
from typing import Any

import wandb

from jumprelu_plugin.models.devices import require_device

# SAELens' own names (`sae_lens.training.optim.get_lr_scheduler`).
SCHEDULERS = ("constant", "cosineannealing", "cosineannealingwarmrestarts")
_COUNTS = (
    "training_tokens",
    "train_batch_size_tokens",
    "store_batch_size_prompts",
    "n_batches_in_buffer",
    "n_batches_for_norm_estimate",
    "feature_sampling_window",
    "n_restart_cycles",
)
_MAYBE_ZERO = (
    "dead_feature_window",
    "lr_warm_up_steps",
    "lr_decay_steps",
    "lr_end",
    "n_checkpoints",
    "n_eval_batches",
)
_LOGGED_EVERY = ("wandb_log_frequency", "eval_every_n_wandb_logs")


def require_possible_numbers(cfg: Any) -> None:
    """Raise ValueError for the first number that a run of SAELens' config cannot work with."""
    for owner, names in ((cfg, _COUNTS), (cfg.logger, _LOGGED_EVERY), (cfg.sae, ("d_in", "d_sae"))):
        for name in names:
            _require(getattr(owner, name) >= 1, name, getattr(owner, name), "at least 1")
    _require(0 < cfg.lr < math.inf, "lr", cfg.lr, "a number above 0")
    for name in _MAYBE_ZERO:
        value = getattr(cfg, name)
        _require(value is None or value >= 0, name, value, "at least 0")
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(cfg, name)
        _require(0 <= value < 1, name, value, "at least 0 and below 1")
    mixing, prompts = cfg.activations_mixing_fraction, cfg.eval_batch_size_prompts
    _require(0 <= mixing <= 1, "activations_mixing_fraction", mixing, "0 to 1")
    _require(prompts is None or prompts >= 1, "eval_batch_size_prompts", prompts, "at least 1")


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}; give {expected}")


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
    _require_effects(cfg)
    _require_hook_to_reshape(cfg)
    if cfg.logger.log_to_wandb:
        _require_wandb_login()


def _require_effects(cfg: Any) -> None:
    """Raise ValueError for the first field that nothing in the run would read."""
    rules = (
        ("n_checkpoints", 0, cfg.checkpoint_path, "give checkpoint_path a folder"),
        ("save_final_checkpoint", False, cfg.checkpoint_path, "give checkpoint_path a folder"),
        ("cached_activations_path", None, cfg.use_cached_activations, "set use_cached_activations"),
        ("llm_compilation_mode", None, cfg.compile_llm, "set compile_llm"),
        ("sae_compilation_mode", None, cfg.compile_sae, "set compile_sae"),
    )
    for name, default, read, remedy in rules:
        value = getattr(cfg, name)
        if value != default and not read:
            raise ValueError(f"{name} is {value} and has no effect: {remedy}, or leave it out")


def _require_hook_to_reshape(cfg: Any) -> None:
    """SAELens trains an SAE that flattens heads where there are none, and cannot load it then."""
    if cfg.sae.reshape_activations == "hook_z" and not cfg.hook_name.endswith("_z"):
        raise ValueError(
            "reshape_activations is 'hook_z', which flattens the heads of an attn.hook_z, and "
            f"hook_name is {cfg.hook_name}: leave it 'none'"
        )


def _require_wandb_login() -> None:
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in ("online", "run") or wandb.api.api_key:
        return
    raise ValueError(
        "log_to_wandb is on, as it is by default in SAELens, and nobody is logged in to wandb "
        "here: run `wandb login`, or set WANDB_MODE=offline, or train with --log_to_wandb False "
        "(LoggingConfig(log_to_wandb=False)); metrics.jsonl has the metrics in every case"
    )
