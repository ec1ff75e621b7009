"""Transcoders trained in lockstep on one stream of text: SAELens' multi-SAE runner, for pairs.

`MultiTrainer` trains them. This adds rows [input ‖ output] from `PairStore`, and a scale for each
side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from typing_extensions import override

from jumprelu_plugin.training.activations.hook_pairs import pair_widths
from jumprelu_plugin.training.activations.pairs import HookPair, PairStore
from jumprelu_plugin.training.activations.scaler import pair_scaler
from jumprelu_plugin.training.checkpoints import Checkpoints, explained_at_the_end
from jumprelu_plugin.training.interruption import InterruptibleIterator
from jumprelu_plugin.training.metrics_file import keep_before
from jumprelu_plugin.training.multi.trainer import MultiTrainer, fit_until_stopped
from jumprelu_plugin.training.text_source import without_false_alarms


class LayerwiseTrainer(MultiTrainer):
    """`MultiTrainer` over rows [input ‖ output]: one transcoder for each name."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name, trainer in self.trainers.items():
            trainer.activation_scaler = pair_scaler(self.saes[name])

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


class LayerwiseRunner(MultiSAETrainingRunner):
    """Train a transcoder for each of several pairs of hooks, in one pass over the text.

    Args:
        cfg: SAELens' multi-SAE config; `saes` are transcoder configs and `hook_names` their input
            hooks.
        pairs: both hooks, under the names of `cfg.saes`.
        metrics_path: see `LayerwiseTrainer`.
        checkpoints: where they are saved; by default in `cfg.checkpoint_path`, if it is set.
        override_dataset, override_model, override_saes: as in SAELens.

    Raises:
        ValueError: a hook does not exist, does not fire, or has another width than the config says.
    """

    @without_false_alarms()
    def __init__(
        self,
        cfg: MultiSAETrainingRunnerConfig,
        pairs: Mapping[str, HookPair],
        override_dataset: Any = None,
        override_model: Any = None,
        metrics_path: Path | None = None,
        checkpoints: Checkpoints | None = None,
        override_saes: dict[str, Any] | None = None,
    ):
        torch.manual_seed(cfg.seed)
        super().__init__(cfg, override_dataset, override_model, override_saes)
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
    @without_false_alarms()
    def run(self) -> dict[str, Any]:
        """Train, from `cfg.resume_from_checkpoint` where it is given; return the transcoders.

        Stopped by Ctrl-C or SIGTERM, it finishes the step, saves a checkpoint where
        `cfg.checkpoint_path` is set, and raises SAELens' `InterruptedException`.
        """
        self._set_sae_metadata()
        for name, pair in self.pairs.items():
            self.saes[name].cfg.metadata.hook_name_out = pair.hook_out
        batches = self.make_batches()
        trainer = self.make_trainer(
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
        saes = fit_until_stopped(trainer, batches)
        if self.cfg.output_path is not None:
            last = None if self.checkpoints is None else self.checkpoints.last
            with explained_at_the_end(self.cfg.output_path, last, "the same command"):
                self._save_final_outputs(saes, trainer)
        return saes

    def make_batches(self) -> InterruptibleIterator:
        """The batches of this run, which stop on Ctrl-C."""
        return InterruptibleIterator(self.activations_store.get_multi_hook_data_loader())

    def make_trainer(self, **parts: Any) -> LayerwiseTrainer:
        """The trainer of this run."""
        return LayerwiseTrainer(**parts)


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
