"""SAELens' trainer with a progress bar, recorded metrics, alarms and checkpoints on interruption.

It changes no number of a training. It adds a progress bar with loss, L0, FVU and dead latents; a
file of JSON lines with the metrics that SAELens logs to wandb, with or without wandb; and
checkpoints that are whole or absent (`checkpoints.py`), saved between steps: those that SAELens'
config asks for, one every few minutes, and one when the run is interrupted.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file
from tqdm import tqdm
from typing_extensions import override

from jumprelu_plugin.evaluation.metrics import batch_fvu
from jumprelu_plugin.records import require_file
from jumprelu_plugin.saes.pickled_tensors import require_plain_tensors
from jumprelu_plugin.saes.tensor_files import explained
from jumprelu_plugin.step.activity import mean_l0
from jumprelu_plugin.training.checkpoints import Checkpoints
from jumprelu_plugin.training.health.alarms import Monitor, StepStats
from jumprelu_plugin.training.health.reporting import report
from jumprelu_plugin.training.interruption import stop_signals_to
from jumprelu_plugin.training.lr_schedule import own_schedule
from jumprelu_plugin.training.metrics_file import append_metrics, finite_numbers
from jumprelu_plugin.training.starting_weights import refuse_past_the_end

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

    Attributes:
        checkpoints: where they are saved; None without `cfg.checkpoint_path`. Those that SAELens'
            config asks for are kept; of those every few minutes and on interruption, the last two.
            One that the disk refuses is a warning, and training goes on.
    """

    metrics_path: Path | None = None
    monitor: Monitor | None = None
    checkpoints: Checkpoints | None = None
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
            for alarm in self.monitor.step(self.step_stats(output), silent, self.n_training_steps):
                report(alarm, self.metrics_path, self.cfg.logger.log_to_wandb)
        due = (self.n_training_steps + 1) % self.cfg.logger.wandb_log_frequency == 0
        if self.metrics_path is not None and due:
            self._record(self.build_train_step_log_dict(output, self.n_training_samples))
        return output

    def step_stats(self, output: TrainStepOutput) -> StepStats:
        """What the alarms read of a step."""
        return StepStats.at(output)

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
        line = {"step": self.n_training_steps, **finite_numbers(metrics)}
        append_metrics(self.metrics_path, line)

    # ---------------------------------------------------------------- interruption

    def _request_stop(self, signal_number: int, frame: Any) -> None:
        if self._stop_requested or self._steps_made == 0:
            raise InterruptedException("interrupted; nothing was saved")
        # In the middle of a step, weights and optimizer belong to different steps.
        self._stop_requested = True
        logger.warning("interrupted: finishing this step (once more to stop at once)")

    def _stop(self) -> None:
        if self.checkpoints is None:
            raise InterruptedException("interrupted; nothing was saved (checkpoint_path is None)")
        saved, before = self._save_replaceable(), self.checkpoints.last
        if saved is None and before is None:
            raise InterruptedException("interrupted; no checkpoint could be saved")
        reason = "" if saved else "this step could not be saved; "
        raise InterruptedException(
            f"interrupted; {reason}continue with --resume_from_checkpoint {saved or before}"
        )

    # ---------------------------------------------------------------- checkpoints

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        base = self.cfg.checkpoint_path if base_path is None else base_path
        write = super().save_checkpoint
        if base is None:
            return write(checkpoint_name, None, wandb_aliases)
        own = self.checkpoints is not None and self.checkpoints.folder == Path(base)
        checkpoints = self.checkpoints if own and self.checkpoints else Checkpoints(base)
        with self._producer_paused():
            checkpoints.save(
                checkpoint_name,
                lambda folder: write(folder.name, folder.parent, wandb_aliases),
                replaceable=False,
            )

    def _save_replaceable(self) -> Path | None:
        assert self.checkpoints is not None
        with self._producer_paused():
            return self.checkpoints.save(str(self.n_training_samples), self._write_state)

    def _write_state(self, folder: Path) -> None:
        """SAELens' checkpoint files, without its upload to wandb."""
        self.sae.save_model(str(folder))
        save_file({"sparsity": self.log_feature_sparsity}, folder / SPARSITY_FILENAME)
        self.save_trainer_state(folder)
        if self.save_checkpoint_fn is not None:
            self.save_checkpoint_fn(checkpoint_path=folder)

    def _producer_paused(self) -> Any:
        source = self.data_provider
        return source.paused() if isinstance(source, PrefetchingIterator) else nullcontext()

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        folder = Path(checkpoint_path)
        require_file(folder / ACTIVATION_SCALER_CFG_FILENAME)
        require_plain_tensors(folder / TRAINER_STATE_FILENAME)
        with explained(folder, "resume from an earlier one, or start anew"), own_schedule(self):
            super().load_trainer_state(folder)
        refuse_past_the_end(self, folder)
        if self.checkpoints is not None:
            self.checkpoints.last = folder
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
        pbar.update(self.n_training_samples - pbar.n)
        if self.n_training_steps % update_interval == 0:
            self._show(step_output, pbar)
        self._save_what_is_due()
        if self._stop_requested:
            pbar.close()
            self._stop()

    def _save_what_is_due(self) -> None:
        left = len(self.checkpoint_thresholds)
        super()._checkpoint_if_needed()
        saved = len(self.checkpoint_thresholds) < left
        if self.checkpoints is not None and self.checkpoints.due() and not saved:
            self._save_replaceable()

    def _show(self, step_output: TrainStepOutput, pbar: tqdm) -> None:
        fvu = batch_fvu(step_output.sae_in, step_output.sae_out)
        l0, dead = self.l0_and_dead_share(step_output)
        pbar.set_postfix(
            loss=f"{step_output.loss.item():.3g}",
            L0=f"{l0:.1f}",
            FVU=f"{fvu.item():.3f}",
            dead=f"{dead:.1%}",
        )

    def l0_and_dead_share(self, step_output: TrainStepOutput) -> tuple[float, float]:
        """The L0 of a step, and the share of latents that have not fired within the window."""
        return mean_l0(step_output.feature_acts), self.dead_neurons.float().mean().item()
