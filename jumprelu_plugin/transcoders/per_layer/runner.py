"""Transcoders trained in lockstep on one stream of text: SAELens' multi-SAE runner, for pairs.

`MultiSAETrainingRunner` gives every SAE its own optimizer, schedules and statistics, and runs the
model once for all. This module adds rows [input ‖ output] from `PairStore`, a scale for each side,
a progress bar with loss, L0, FVU and dead latents, alarms, checkpoints that are whole or absent,
and a stop at the end of a step, so that a resumed run equals the uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from sae_lens import logger
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from tqdm import tqdm
from typing_extensions import override

from jumprelu_plugin.evaluation.metrics import batch_fvu
from jumprelu_plugin.step.activity import mean_l0
from jumprelu_plugin.training.activations.hook_pairs import pair_widths
from jumprelu_plugin.training.activations.pairs import HookPair, PairStore
from jumprelu_plugin.training.activations.scaler import pair_scaler
from jumprelu_plugin.training.checkpoints import Checkpoints, explained_at_the_end
from jumprelu_plugin.training.health.alarms import Monitor, StepStats
from jumprelu_plugin.training.health.reporting import report
from jumprelu_plugin.training.interruption import InterruptibleIterator
from jumprelu_plugin.training.metrics_file import append_metrics, keep_before


class LayerwiseTrainer(MultiSAETrainer):
    """`MultiSAETrainer` over rows [input ‖ output]: one transcoder for each name, each monitored.

    Attributes:
        metrics_path: where JSON lines go, one every `cfg.logger.wandb_log_frequency` steps, with
            SAELens' metrics of every transcoder under its name, and one for each alarm
            (`health.alarms`).
        monitors: one for each transcoder, during `fit`.
        checkpoints: where they are saved, the last two kept; None for none.
    """

    metrics_path: Path | None = None
    checkpoints: Checkpoints | None = None
    monitors: Mapping[str, Monitor] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name, trainer in self.trainers.items():
            trainer.activation_scaler = pair_scaler(self.saes[name])

    @override
    def fit(self) -> dict[str, Any]:
        steps = self.cfg.total_training_steps
        self.monitors = {name: Monitor.of(sae, steps) for name, sae in self.saes.items()}
        try:
            return super().fit()
        finally:
            for monitor in self.monitors.values():
                monitor.close()

    @override
    @torch.no_grad()
    def _estimate_scaling_factors(self) -> None:
        # SAELens keeps all batches of the estimate in memory; two sums a transcoder are enough.
        scalers: dict[str, Any] = {
            name: trainer.activation_scaler
            for name, trainer in self.trainers.items()
            if self.saes[name].cfg.normalize_activations == "expected_average_only_in"
            and trainer.activation_scaler.scaling_factor is None
        }
        if not scalers:
            return
        for _ in range(self.cfg.n_batches_for_norm_estimate):
            batch = next(self.data_provider)
            for name, scaler in scalers.items():
                scaler.observe(batch[self.hook_names[name]])
        for scaler in scalers.values():
            scaler.finish()

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
                name: _finite(
                    trainer.build_train_step_log_dict(step_outputs[name], self.n_training_samples)
                    | self.monitors[name].gauges
                )
                for name, trainer in self.trainers.items()
            }
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
        step, to_wandb = self.n_training_steps - 1, self.cfg.logger.log_to_wandb
        for name, monitor in self.monitors.items():
            silent = self.trainers[name].n_forward_passes_since_fired
            for alarm in monitor.step(StepStats.at(step_outputs[name]), silent, step):
                report(alarm, self.metrics_path, to_wandb, of=name)

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
            self.save_checkpoint(str(self.n_training_samples))

    @override
    def save_checkpoint(self, checkpoint_name: str, wandb_aliases: list[str] | None = None) -> None:
        """Save a checkpoint in one piece, in place of the one before the last."""
        if self.checkpoints is None:
            return
        write, folder = super().save_checkpoint, self.checkpoints.folder
        # SAELens writes below `checkpoint_path`, which is `folder`.
        self.checkpoints.save(
            checkpoint_name,
            lambda unfinished: write(str(unfinished.relative_to(folder)), wandb_aliases),
        )

    @override
    def load_checkpoint(self, path: str | Path) -> None:
        super().load_checkpoint(path)
        if self.checkpoints is not None:
            self.checkpoints.last = Path(path)
        # Otherwise each threshold already behind would be saved again, one a step.
        self.checkpoint_thresholds = [
            threshold
            for threshold in self.checkpoint_thresholds
            if threshold > self.n_training_samples
        ]


class LayerwiseRunner(MultiSAETrainingRunner):
    """Train a transcoder for each of several pairs of hooks, in one pass over the text.

    Args:
        cfg: SAELens' multi-SAE config; `saes` are transcoder configs and `hook_names` their input
            hooks.
        pairs: both hooks, under the names of `cfg.saes`.
        metrics_path: see `LayerwiseTrainer`.
        checkpoints: where they are saved; by default in `cfg.checkpoint_path`, if it is set.
        override_dataset, override_model: as in SAELens.

    Raises:
        ValueError: a hook does not exist, does not fire, or has another width than the config says.
    """

    def __init__(
        self,
        cfg: MultiSAETrainingRunnerConfig,
        pairs: Mapping[str, HookPair],
        override_dataset: Any = None,
        override_model: Any = None,
        metrics_path: Path | None = None,
        checkpoints: Checkpoints | None = None,
    ):
        torch.manual_seed(cfg.seed)
        super().__init__(cfg, override_dataset, override_model)
        self.pairs, self.metrics_path = dict(pairs), metrics_path
        if checkpoints is None and cfg.checkpoint_path is not None:
            checkpoints = Checkpoints(cfg.checkpoint_path)
        self.checkpoints = checkpoints
        widths = pair_widths(self.model, self.pairs.values())
        for name, pair in self.pairs.items():
            _refuse_widths(name, pair, cfg.saes[name], widths)
        self.activations_store: PairStore = PairStore.like(  # type: ignore[assignment]
            self.activations_store, self.pairs, widths, cfg.seed
        )

    @override
    def run(self) -> dict[str, Any]:
        """Train, from `cfg.resume_from_checkpoint` where it is given; return the transcoders.

        Stopped by Ctrl-C or SIGTERM, it finishes the step, saves a checkpoint where
        `cfg.checkpoint_path` is set, and raises SAELens' `InterruptedException`.
        """
        self._set_sae_metadata()
        for name, pair in self.pairs.items():
            self.saes[name].cfg.metadata.hook_name_out = pair.hook_out
        batches = InterruptibleIterator(self.activations_store.get_multi_hook_data_loader())
        trainer = LayerwiseTrainer(
            cfg=self.cfg.to_sae_trainer_config(),
            saes=self.saes,
            hook_names={name: name for name in self.pairs},
            data_provider=batches,
            evaluator=None,
            save_checkpoint_fn=self._save_runner_checkpoint_files,
        )
        trainer.metrics_path = self.metrics_path
        trainer.checkpoints = self.checkpoints
        if self.cfg.resume_from_checkpoint is not None:
            trainer.load_checkpoint(self.cfg.resume_from_checkpoint)
            self.activations_store.load_from_checkpoint(self.cfg.resume_from_checkpoint)
            if self.metrics_path is not None:
                keep_before(self.metrics_path, trainer.n_training_steps + 1)
        with batches.stopped_by_signals():
            try:
                saes = trainer.fit()
            except InterruptedException:
                # Before the first step there is nothing that a fresh start would not give.
                if trainer.n_training_steps > 0 and trainer.checkpoints is not None:
                    trainer.save_checkpoint(str(trainer.n_training_samples))
                    logger.warning(f"interrupted; the last checkpoint: {trainer.checkpoints.last}")
                raise
        if self.cfg.output_path is not None:
            last = None if self.checkpoints is None else self.checkpoints.last
            with explained_at_the_end(self.cfg.output_path, last, "the same command"):
                self._save_final_outputs(saes, trainer)
        return saes


def _refuse_widths(name: str, pair: HookPair, cfg: Any, widths: Mapping[str, int]) -> None:
    for field, hook, given in (
        ("d_in", pair.hook_in, cfg.d_in),
        ("d_out", pair.hook_out, cfg.width_out),
    ):
        if widths[hook] != given:
            raise ValueError(
                f"{name}: {field} is {given}, but the activations at {hook} are {widths[hook]} "
                f"wide; set {field}={widths[hook]}"
            )


def _finite(metrics: dict[str, Any]) -> dict[str, Any]:
    """Numbers that are not finite as null, which JSON has."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
