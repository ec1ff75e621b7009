"""What a run needs beside its SAE, asked before its model is loaded: devices, login, schedule."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import wandb
from sae_lens import logger
from sae_lens.registry import get_sae_training_class
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

from jumprelu_plugin.models.devices import require_device
from jumprelu_plugin.saes.jumprelu import JumpReLUTrainingSAE
from jumprelu_plugin.training.health.schedule import repaired, total_steps

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
    evaluated = not cfg.logger.log_to_wandb or cfg.n_eval_batches >= 1
    _require(evaluated, "n_eval_batches", cfg.n_eval_batches, "at least 1 where wandb logs")
    _require_a_batch_in_the_buffer(cfg)


def _require_a_batch_in_the_buffer(cfg: Any) -> None:
    batch, enough = cfg.train_batch_size_tokens, sequences_of(cfg, batches=1)
    if cfg.n_batches_in_buffer < enough:
        rows = cfg.n_batches_in_buffer * _positions(cfg)
        raise ValueError(
            f"the mixing buffer holds {rows} rows (n_batches_in_buffer · context_size) and one "
            f"batch takes {batch}: give n_batches_in_buffer={enough} or more"
        )


def sequences_of(cfg: Any, *, batches: int) -> int:
    """The `n_batches_in_buffer` that holds so many batches; 0 where a sequence has no token."""
    positions = _positions(cfg)
    return -(-batches * cfg.train_batch_size_tokens // positions) if positions else 0


def _positions(cfg: Any) -> int:
    """Of a sequence, those that are trained on."""
    return len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}; give {expected}")


def require_what_a_run_needs(cfg: Any) -> None:
    """Raise ValueError for the first thing that a run of SAELens' config lacks."""
    for field in ("device", "llm_device", "act_store_device"):
        name = getattr(cfg, field, None)
        if name is not None and name != "with_model":
            require_device(name)
    try:
        require_device(cfg.sae.device)
    except ValueError as error:
        raise ValueError(f"in the SAE's config (--sae.device), {error}") from error
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
    _require_possible_schedule(cfg)
    _require_no_compiled_step(cfg)
    _require_effects(cfg)
    _require_hook_to_reshape(cfg)
    if cfg.logger.log_to_wandb:
        _require_wandb_login()


def require_same_sae(cfg: Any, sae: Any) -> None:
    """Raise ValueError for an `override_sae` of another width than `cfg.sae` names; warn where it
    is trained otherwise, because SAELens trains it by its own config."""
    if sae.cfg.d_in != cfg.sae.d_in:
        raise ValueError(
            f"override_sae has d_in {sae.cfg.d_in}, and cfg.sae says {cfg.sae.d_in}: give an SAE "
            f"of the width of {cfg.hook_name}"
        )
    for name in ("target_l0", "l0_coefficient"):
        given, own = getattr(cfg.sae, name, None), getattr(sae.cfg, name, None)
        if given is not None and given != own:
            logger.warning(
                f"override_sae is trained by its own config, with {name} {own}; the {given} of "
                "cfg.sae is not read"
            )


def require_taken_by_model(cfg: Any, model: Any) -> None:
    """Raise ValueError for `model_kwargs` that the model's forward pass does not take.

    Runs the model on three tokens as SAELens will, and as its evaluations will where there are any.
    """
    given = cfg.model_kwargs
    if not given:
        return
    tokens = torch.zeros((1, 3), dtype=torch.long, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            model.run_with_cache(
                tokens,
                names_filter=[cfg.hook_name],
                stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(cfg.hook_name),
                prepend_bos=False,
                **given,
            )
            if cfg.logger.log_to_wandb:
                model(tokens, return_type="both", loss_per_token=True, **given)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model_kwargs is {given}, which the model's forward pass does not take ({error}): "
            "give keyword arguments of its forward method, or leave it out"
        ) from error


def _require_possible_schedule(cfg: Any) -> None:
    """Raise ValueError for a cosine that has no steps, or that ends at 0 and is to decay then."""
    cfg, name = repaired(cfg)[0], cfg.lr_scheduler_name
    steps, warm_up, decay = total_steps(cfg), cfg.lr_warm_up_steps, cfg.lr_decay_steps
    left, restarts = steps - warm_up - decay, name.lower() == SCHEDULERS[2]
    if name.lower() == SCHEDULERS[0] or steps < 1:  # a run without steps is refused elsewhere
        return
    if left < 1 and (restarts or not decay):
        raise ValueError(
            f"lr_warm_up_steps {warm_up:,} and lr_decay_steps {decay:,} leave no step of "
            f"{steps:,} to the schedule {name!r}: lower them"
        )
    if restarts and cfg.n_restart_cycles > left:
        raise ValueError(
            f"n_restart_cycles is {cfg.n_restart_cycles:,}, and warm-up and decay leave {left:,} "
            f"of {steps:,} steps to the schedule {name!r}: give at most {left:,}"
        )
    if decay and cfg.lr_end == 0:
        raise ValueError(
            f"lr_decay_steps is {decay:,} and lr_end is 0, where the schedule {name!r} ends: there "
            "is nothing left to decay. Set lr_decay_steps=0, or give an lr_end above 0"
        )


def _require_no_compiled_step(cfg: Any) -> None:
    """Raise ValueError where `torch.compile` would trace a step of this package.

    It cannot: the step waits for its optimizer, times its ways against each other, and goes through
    its graph twice, for the penalty's slopes.
    """
    architecture = cfg.sae.architecture()
    if not issubclass(get_sae_training_class(architecture)[0], JumpReLUTrainingSAE):
        return
    for name, default in (("compile_sae", False), ("sae_compilation_mode", None)):
        value = getattr(cfg, name)
        if value != default:
            raise ValueError(
                f"{name} is {value!r}, and torch.compile cannot compile a training step of "
                f"{architecture}, which has its own kernels: leave it out, and step_kernel='auto' "
                "takes the fastest of them"
            )


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
