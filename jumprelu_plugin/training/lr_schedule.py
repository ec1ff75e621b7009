"""The learning rate of a resumed run: that of its own config, whatever the checkpoint's was.

PyTorch's schedulers save their length and their rates with their state. Loaded into a run of
another length or rate, they go on with the old ones, and a longer run trains on at a rate of 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens import logger
from sae_lens.config import SAETrainerConfig
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer

# Of SAELens' config, what a run resumes with its own of.
SCHEDULE_FIELDS = (
    "lr",
    "lr_end",
    "lr_scheduler_name",
    "lr_warm_up_steps",
    "lr_decay_steps",
    "n_restart_cycles",
    "adam_beta1",
    "adam_beta2",
)
# What makes a schedule of PyTorch's the one it is; the rest of its state says how far it is.
_SHAPE = (
    "base_lrs",
    "_milestones",
    "start_factor",
    "end_factor",
    "total_iters",
    "T_max",
    "T_0",
    "T_mult",
    "eta_min",
)


@contextmanager
def own_schedule(trainer: SAETrainer[Any, Any], of: str = "") -> Iterator[None]:
    """While it loads a checkpoint's state, have a trainer keep the schedule of its own config.

    A checkpoint of the same schedule is resumed with the state it has. Otherwise the rate at step t
    is what an uninterrupted run of this config has at step t, and a line is logged. Adam's betas
    are this config's, and its moments the checkpoint's.

    Args:
        of: the dictionary's name, where there are several.
    """
    schedule, saved = trainer.lr_scheduler, _SavedState()
    trainer.lr_scheduler = saved  # type: ignore[assignment]
    try:
        yield
    finally:
        trainer.lr_scheduler = schedule
    cfg, step = trainer.cfg, trainer.n_training_steps
    for group in trainer.optimizer.param_groups:
        group["betas"] = cfg.adam_beta1, cfg.adam_beta2
    if _shape(saved.state) == _shape(schedule.state_dict()):
        schedule.load_state_dict(saved.state)
        return
    state, rate = _at_step(cfg, step)
    schedule.load_state_dict(state)
    for group in trainer.optimizer.param_groups:
        group |= {"lr": rate, "initial_lr": cfg.lr}
    logger.warning(
        f"{of + ': ' if of else ''}the checkpoint's learning rates are of another config; from "
        f"step {step:,} on they follow this run's schedule (lr {rate:.3g} now)"
    )


class _SavedState:
    """Takes a scheduler's place while a checkpoint is loaded, and keeps what is loaded."""

    state: dict[str, Any]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def _shape(state: Mapping[str, Any]) -> list[Any]:
    """What a scheduler's state says of its schedule, and of those it is made of."""
    parts = [_shape(part) for part in state.get("_schedulers", ())]
    return [*(state.get(name) for name in _SHAPE), parts]


def _at_step(cfg: SAETrainerConfig, step: int) -> tuple[dict[str, Any], float]:
    """The state and the rate of a config's schedule after this many steps."""
    assert cfg.lr_end is not None  # SAELens sets it
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=cfg.lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no step of an optimizer came before
        schedule = get_lr_scheduler(
            cfg.lr_scheduler_name,
            optimizer,
            training_steps=cfg.total_training_steps,
            lr=cfg.lr,
            warm_up_steps=cfg.lr_warm_up_steps,
            decay_steps=cfg.lr_decay_steps,
            lr_end=cfg.lr_end,
            num_cycles=cfg.n_restart_cycles,
        )
        for _ in range(step):
            schedule.step()
    return schedule.state_dict(), optimizer.param_groups[0]["lr"]
