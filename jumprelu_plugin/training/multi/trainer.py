"""SAELens' multi-SAE trainer with metrics, alarms, and checkpoints that are whole or absent.

`MultiSAETrainer` gives every dictionary its own optimizer, schedules and statistics, and one batch
of the same tokens in each step. This adds a schedule of its own for each, a progress bar with loss,
L0, FVU and dead latents, JSON lines, alarms, and a stop at the end of a step, so that a resumed run
equals the uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from sae_lens import logger
from sae_lens.config import SAETrainerConfig
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, TRAINER_STATE_FILENAME
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm import tqdm
from typing_extensions import override

from jumprelu_plugin.evaluation.metrics import batch_fvu
from jumprelu_plugin.records import require_file
from jumprelu_plugin.saes.pickled_tensors import require_plain_tensors
from jumprelu_plugin.step.activity import mean_l0
from jumprelu_plugin.training.checkpoints import Checkpoints
from jumprelu_plugin.training.health.alarms import Alarm, Monitor, StepStats
from jumprelu_plugin.training.health.reporting import report
from jumprelu_plugin.training.interruption import InterruptibleIterator
from jumprelu_plugin.training.lr_schedule import own_schedule
from jumprelu_plugin.training.metrics_file import append_metrics, finite_numbers
from jumprelu_plugin.training.starting_weights import refuse_past_the_end


class MultiTrainer(MultiSAETrainer):
    """`MultiSAETrainer` with each dictionary monitored.

    Attributes:
        metrics_path: where JSON lines go, one every `cfg.logger.wandb_log_frequency` steps, with
            SAELens' metrics of every dictionary under its name, and one for each alarm
            (`health.alarms`).
        monitors: one for each dictionary, during `fit`.
        checkpoints: where they are saved; None for none. The last two are kept.
        keeps_checkpoints: whether those that `cfg` asks for are kept too, however many.
    """

    metrics_path: Path | None = None
    checkpoints: Checkpoints | None = None
    keeps_checkpoints: bool = False
    monitors: Mapping[str, Monitor] = MappingProxyType({})

    def give_schedules(self, configs: Mapping[str, SAETrainerConfig]) -> None:
        """Train each dictionary by a config of its own: learning rate, Adam's betas, windows.

        To be called before the first step.

        Args:
            configs: by name, all with this trainer's batch and number of samples.
        """
        for name, cfg in configs.items():
            self.trainers[name] = _NamedTrainer(
                name,
                cfg=replace(
                    cfg, n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False
                ),
                sae=self.saes[name],
                data_provider=iter(()),
            )

    @override
    def fit(self) -> dict[str, Any]:
        steps = self.cfg.total_training_steps
        self.monitors = {name: Monitor.of(sae, steps) for name, sae in self.saes.items()}
        try:
            return super().fit()
        except _StepError as error:
            raise ValueError(f"{error}{self._how_the_others_go_on()}") from error
        finally:
            for monitor in self.monitors.values():
                monitor.close()

    def _how_the_others_go_on(self) -> str:
        last = None if self.checkpoints is None else self.checkpoints.last
        if len(self.saes) == 1 or last is None:
            return ""
        return (
            ". The others can go on without it where their hooks are the same: leave it out and "
            f"give --resume_from_checkpoint {last}"
        )

    @override
    @torch.no_grad()
    def _estimate_scaling_factors(self) -> None:
        # SAELens keeps all batches of the estimate in memory; two sums a dictionary are enough.
        if any(self._waits_for(name, "covariance_whitening") for name in self.saes):
            return super()._estimate_scaling_factors()
        waiting = [name for name in self.saes if self._waits_for(name, "expected_average_only_in")]
        norms, counts = dict.fromkeys(waiting, 0.0), dict.fromkeys(waiting, 0)
        count = self.cfg.n_batches_for_norm_estimate if waiting else 0
        for _ in tqdm(range(count), desc="Estimating norm scaling factors", leave=False):
            batch = next(self.data_provider)
            for name in waiting:
                # As in ActivationScaler: added up in float32, which float16 would overflow.
                found = batch[self.hook_names[name]].norm(dim=-1)
                norms[name] += found.float().sum().item()
                counts[name] += found.numel()
        for name in waiting:
            mean = norms[name] / counts[name]
            scaler = self.trainers[name].activation_scaler
            scaler.scaling_factor = math.sqrt(self.saes[name].cfg.d_in) / mean

    def _waits_for(self, name: str, normalization: str) -> bool:
        """Whether a dictionary's input is normalized so, by statistics that are not there yet."""
        scaler = self.trainers[name].activation_scaler
        found = (
            scaler.whitening if normalization == "covariance_whitening" else scaler.scaling_factor
        )
        return found is None and self.saes[name].cfg.normalize_activations == normalization

    @override
    @torch.no_grad()
    def _update_pbar(
        self, step_outputs: dict[str, TrainStepOutput], pbar: tqdm, update_interval: int = 10
    ) -> None:
        """SAELens' last call in a step: raise alarms, record the metrics, show them."""
        pbar.update(self.n_training_samples - pbar.n)
        self._raise_alarms(step_outputs)
        self._record(step_outputs)
        if self.n_training_steps % update_interval == 0:
            self._show(step_outputs, pbar)
        self._save_what_is_due()

    def _record(self, step_outputs: dict[str, TrainStepOutput]) -> None:
        if self.metrics_path is not None and self._due():
            lines = {
                name: finite_numbers(
                    trainer.build_train_step_log_dict(step_outputs[name], self.n_training_samples)
                    | self.monitors[name].gauges
                )
                for name, trainer in self.trainers.items()
            }
            self.record(lines)

    def record(self, lines: dict[str, Any]) -> None:
        """Append a line with the metrics of each dictionary, by name."""
        if self.metrics_path is not None:
            append_metrics(self.metrics_path, {"step": self.n_training_steps, **lines})

    def _show(self, step_outputs: dict[str, TrainStepOutput], pbar: tqdm) -> None:
        outputs = step_outputs.values()
        errors = [batch_fvu(output.sae_in, output.sae_out).item() for output in outputs]
        dead = [trainer.dead_neurons.float().mean().item() for trainer in self.trainers.values()]
        pbar.set_postfix(
            loss=f"{_mean([output.loss.item() for output in outputs]):.3g}",
            L0=f"{_mean([mean_l0(output.feature_acts) for output in outputs]):.1f}",
            FVU=f"{_mean(errors):.3f} ({min(errors):.3f} to {max(errors):.3f})",
            dead=f"{_mean(dead):.1%}",
        )

    def _raise_alarms(self, step_outputs: dict[str, TrainStepOutput]) -> None:
        step = self.n_training_steps - 1
        found = []
        for name, monitor in self.monitors.items():
            silent = self.trainers[name].n_forward_passes_since_fired
            alarms = monitor.step(StepStats.at(step_outputs[name]), silent, step)
            found += [(name, alarm) for alarm in alarms]
        self.report_all(found)

    def report_all(self, found: list[tuple[str, Alarm]]) -> None:
        """Say the alarms of a step, each with its dictionary's name."""
        for name, alarm in found:
            report(alarm, self.metrics_path, self.cfg.logger.log_to_wandb, of=name)

    def _due(self) -> bool:
        return self.n_training_steps % self.cfg.logger.wandb_log_frequency == 0

    # ---------------------------------------------------------------- checkpoints

    @override
    def _checkpoint_if_needed(self) -> None:
        """Nothing: SAELens calls this before it counts the step; `_update_pbar` saves after it."""

    def _save_what_is_due(self) -> None:
        if self.checkpoints is None:
            return
        left = len(self.checkpoint_thresholds)
        super()._checkpoint_if_needed()
        if len(self.checkpoint_thresholds) == left and self.checkpoints.due():
            self.save_now()

    @override
    def save_checkpoint(self, checkpoint_name: str, wandb_aliases: list[str] | None = None) -> None:
        """Save a checkpoint that `cfg` asks for, in one piece."""
        self._save(checkpoint_name, wandb_aliases, replaceable=not self.keeps_checkpoints)

    def save_now(self) -> None:
        """Save a checkpoint in one piece, in place of the one before the last."""
        self._save(str(self.n_training_samples), None, replaceable=True)

    def _save(self, name: str, wandb_aliases: list[str] | None, *, replaceable: bool) -> None:
        if self.checkpoints is None:
            return
        write, folder = super().save_checkpoint, self.checkpoints.folder
        # SAELens writes below `checkpoint_path`, which is `folder`.
        self.checkpoints.save(
            name,
            lambda unfinished: write(str(unfinished.relative_to(folder)), wandb_aliases),
            replaceable=replaceable,
        )

    @override
    def load_checkpoint(self, path: str | Path) -> None:
        for name in self.saes:
            require_file(Path(path, name, ACTIVATION_SCALER_CFG_FILENAME))
            require_plain_tensors(Path(path, name, TRAINER_STATE_FILENAME))
        with ExitStack() as schedules:
            for name, trainer in self.trainers.items():
                schedules.enter_context(own_schedule(trainer, of=name))
            super().load_checkpoint(path)
        refuse_past_the_end(self, path)
        if self.checkpoints is not None:
            self.checkpoints.last = Path(path)
        # Otherwise each threshold already behind would be saved again, one a step.
        self.checkpoint_thresholds = [
            threshold
            for threshold in self.checkpoint_thresholds
            if threshold > self.n_training_samples
        ]


class _NamedTrainer(SAETrainer[Any, Any]):
    """SAELens' trainer of one dictionary, which an error in its step names."""

    def __init__(self, name: str, **parts: Any):
        super().__init__(**parts)
        self._name = name

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        try:
            return super().step(batch)
        except ValueError as error:
            raise _StepError(f"{self._name}: {error}") from error


class _StepError(ValueError):
    """A step of one dictionary that could not be made."""


def fit_until_stopped(trainer: MultiTrainer, batches: InterruptibleIterator) -> dict[str, Any]:
    """Train to the end; stopped by Ctrl-C or SIGTERM, finish the step and save a checkpoint.

    Args:
        batches: the trainer's.

    Raises:
        InterruptedException: the run was stopped.
    """
    with batches.stopped_by_signals():
        try:
            return trainer.fit()
        except InterruptedException:
            # Before the first step there is nothing that a fresh start would not give.
            if trainer.n_training_steps > 0 and trainer.checkpoints is not None:
                trainer.save_now()
                logger.warning(f"interrupted; the last checkpoint: {trainer.checkpoints.last}")
            raise


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
