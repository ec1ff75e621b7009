"""SAELens' trainer with a progress bar, recorded metrics, alarms and checkpoints on interruption.

It changes no number of a training. It adds a progress bar with loss, L0, FVU and dead latents; a
file of JSON lines with the metrics that SAELens logs to wandb, with or without wandb; and
checkpoints that are whole or absent, saved between steps and when the run is interrupted.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, TRAINER_STATE_FILENAME
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer
from tqdm import tqdm
from typing_extensions import override

from jumprelu_plugin.evaluation.metrics import batch_fvu
from jumprelu_plugin.records import append_jsonl, require_file, whole_folder
from jumprelu_plugin.saes.pickled_tensors import require_plain_tensors
from jumprelu_plugin.saes.tensor_files import explained
from jumprelu_plugin.step.activity import mean_l0
from jumprelu_plugin.training.health.alarms import Monitor, StepStats
from jumprelu_plugin.training.health.reporting import report
from jumprelu_plugin.training.interruption import stop_signals_to

PROGRESS_EVERY = 10


class JumpReLUTrainer(SAETrainer[Any, Any]):
    """`SAETrainer` with a progress bar and, if `metrics_path` is set, JSON lines.

    A line is written every `cfg.logger.wandb_log_frequency` steps, and at the end of every
    `cfg.feature_sampling_window`. It holds the step and the numbers SAELens logs to wandb at that
    step; a number that is not finite is null. An alarm (`health.alarms`) is a warning and a line of
    its own.

    SIGINT (Ctrl-C) and SIGTERM end a run after the current step, with a checkpoint if
    `cfg.checkpoint_path` is set, and raise SAELens' `InterruptedException`. During the first step,
    and at the second signal, the run ends at once and nothing is saved.
    """

    metrics_path: Path | None = None
    monitor: Monitor | None = None
    _steps_made: int = 0
    _stop_requested: bool = False

    @override
    def fit(self) -> Any:
        self.monitor = Monitor.of(self.sae, self.cfg.total_training_steps)
        try:
            with stop_signals_to(self._request_stop):
                return super().fit()
        finally:
            self.monitor.close()

    @override
    def step(self, batch: torch.Tensor) -> TrainStepOutput:
        output = super().step(batch)
        if self.monitor is not None:
            silent = self.n_forward_passes_since_fired
            for alarm in self.monitor.step(StepStats.at(output), silent, self.n_training_steps):
                report(alarm, self.metrics_path, self.cfg.logger.log_to_wandb)
        due = (self.n_training_steps + 1) % self.cfg.logger.wandb_log_frequency == 0
        if self.metrics_path is not None and due:
            self._record(self.build_train_step_log_dict(output, self.n_training_samples))
        return output

    # ---------------------------------------------------------------- metrics

    @override
    def build_train_step_log_dict(
        self, output: TrainStepOutput, n_training_samples: int
    ) -> dict[str, Any]:
        log = super().build_train_step_log_dict(output, n_training_samples)
        return log if self.monitor is None else {**log, **self.monitor.gauges}

    @override
    def full_sparsity_window_log(self) -> dict[str, Any]:
        log = super().full_sparsity_window_log()
        if log:
            self._record(log)
        return log

    @override
    def _build_sparsity_log_dict(self) -> dict[str, Any]:
        if self.cfg.logger.log_to_wandb:
            return super()._build_sparsity_log_dict()
        # SAELens makes a wandb histogram here even for a run without wandb.
        return {
            "metrics/mean_log10_feature_sparsity": self.log_feature_sparsity.mean().item(),
            "sparsity/below_1e-5": (self.feature_sparsity < 1e-5).sum().item(),
            "sparsity/below_1e-6": (self.feature_sparsity < 1e-6).sum().item(),
        }

    def _record(self, metrics: dict[str, Any]) -> None:
        if self.metrics_path is None:
            return
        numbers = {
            name: value if math.isfinite(value) else None
            for name, value in metrics.items()
            if isinstance(value, int | float)
        }
        append_jsonl(self.metrics_path, {"step": self.n_training_steps, **numbers})

    # ---------------------------------------------------------------- interruption

    def _request_stop(self, signal_number: int, frame: Any) -> None:
        if self._stop_requested or self._steps_made == 0:
            raise InterruptedException("interrupted; nothing was saved")
        # In the middle of a step, weights and optimizer belong to different steps.
        self._stop_requested = True
        logger.warning("interrupted: finishing this step (once more to stop at once)")

    def _stop(self) -> None:
        if self.cfg.checkpoint_path is None:
            raise InterruptedException("interrupted; nothing was saved (checkpoint_path is None)")
        name = str(self.n_training_samples)
        self.save_checkpoint(checkpoint_name=name)
        folder = Path(self.cfg.checkpoint_path, name)
        raise InterruptedException(f"interrupted; continue with --resume_from_checkpoint {folder}")

    # ---------------------------------------------------------------- checkpoints

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        base = self.cfg.checkpoint_path if base_path is None else base_path
        if base is None:
            return super().save_checkpoint(checkpoint_name, None, wandb_aliases)
        whole = Path(base, checkpoint_name)
        with whole_folder(whole, replaces=True) as unfinished, self._producer_paused():
            super().save_checkpoint(unfinished.name, unfinished.parent, wandb_aliases)

    def _producer_paused(self) -> Any:
        source = self.data_provider
        return source.paused() if isinstance(source, PrefetchingIterator) else nullcontext()

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        folder = Path(checkpoint_path)
        require_file(folder / ACTIVATION_SCALER_CFG_FILENAME)
        require_plain_tensors(folder / TRAINER_STATE_FILENAME)
        with explained(folder, "resume from an earlier one, or start anew"):
            super().load_trainer_state(folder)
        done = self.n_training_samples
        self.checkpoint_thresholds = [t for t in self.checkpoint_thresholds if t >= done]

    @override
    def _checkpoint_if_needed(self) -> None:
        """Nothing: SAELens calls this before it counts the step; `_update_pbar` saves after it."""

    # ---------------------------------------------------------------- the end of a step

    @override
    @torch.no_grad()
    def _update_pbar(
        self, step_output: TrainStepOutput, pbar: tqdm, update_interval: int = PROGRESS_EVERY
    ) -> None:
        """SAELens' last call in a step: show the metrics, and save a checkpoint if one is due."""
        self._steps_made += 1
        pbar.update(len(step_output.sae_in))
        if self.n_training_steps % update_interval == 0:
            self._show(step_output, pbar)
        super()._checkpoint_if_needed()
        if self._stop_requested:
            pbar.close()
            self._stop()

    def _show(self, step_output: TrainStepOutput, pbar: tqdm) -> None:
        fvu = batch_fvu(step_output.sae_in, step_output.sae_out)
        pbar.set_postfix(
            loss=f"{step_output.loss.item():.3g}",
            L0=f"{mean_l0(step_output.feature_acts):.1f}",
            FVU=f"{fvu.item():.3f}",
            dead=f"{self.dead_neurons.float().mean().item():.1%}",
        )
