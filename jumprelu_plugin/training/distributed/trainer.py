"""The trainer of one shard: it trains as `JumpReLUTrainer` does, and keeps in step with the others.

Every process is given whole batches and trains on its own part of each. What depends on a clock or
on a signal is decided together, at the end of a step; what is counted by latent or token is counted
over all of them; what is saved is the whole dictionary, by the first process.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from sae_lens.saes.sae import TrainStepOutput
from torch.optim import Adam
from tqdm import tqdm
from typing_extensions import override

from jumprelu_plugin.step.activity import firings_by_latent
from jumprelu_plugin.training.checkpoints import Checkpoints
from jumprelu_plugin.training.distributed.gathering import (
    gather,
    gather_optimizer,
    gather_whole,
    take_optimizer_part,
    take_part,
    whole_like,
)
from jumprelu_plugin.training.distributed.launch import Launch
from jumprelu_plugin.training.distributed.sharded_sae import ShardOfSAE
from jumprelu_plugin.training.health.alarms import StepStats
from jumprelu_plugin.training.trainer import PROGRESS_EVERY, JumpReLUTrainer

T = TypeVar("T")


class AgreedCheckpoints(Checkpoints):
    """Checkpoints that are due when the first process's clock says so.

    Attributes:
        agreed: whether one is due; set at the end of each step.
    """

    agreed: bool = False

    @override
    def due(self) -> bool:
        return self.agreed

    def due_by_this_clock(self) -> bool:
        """Whether one is due by the clock of this process."""
        return super().due()


class ShardTrainer(JumpReLUTrainer):
    """Trains one shard of a dictionary.

    Attributes:
        launch: the processes of the run.
    """

    sae: ShardOfSAE
    launch: Launch
    _of_all_latents: dict[str, float]

    @override
    def _train_step(self, sae: Any, sae_in: torch.Tensor) -> TrainStepOutput:
        processes = self.sae.processes
        output = super()._train_step(sae, processes.mesh.tokens_of(sae_in))
        self._count_firings_of_all(output)
        step = self.n_training_steps + 1
        logged = step % self.cfg.logger.wandb_log_frequency == 0
        if logged:
            passes = processes.mean_over_shards(self.n_forward_passes_since_fired)
            self._of_all_latents = {
                "metrics/l0": self.sae.control.batch_l0,
                "sparsity/mean_passes_since_fired": float(passes),
                "sparsity/dead_features": processes.count_over_shards(self.dead_neurons.sum()),
            }
        if logged or step % PROGRESS_EVERY == 0:  # it will be shown
            gather = processes.gather_tokens
            output.sae_in, output.sae_out = gather(output.sae_in), gather(output.sae_out.detach())
        return output

    def _count_firings_of_all(self, output: TrainStepOutput) -> None:
        """Make of SAELens' counts, which are of this process's tokens, those of the batch."""
        of_all = self.sae.control.batch_firings
        if of_all is not None:
            self.act_freq_scores += of_all - firings_by_latent(output.feature_acts)
            self.n_forward_passes_since_fired[of_all > 0] = 0

    @override
    def step_stats(self, output: TrainStepOutput) -> StepStats:
        tokens = self.cfg.train_batch_size_samples
        return dataclasses.replace(super().step_stats(output), tokens=tokens)

    @override
    def build_train_step_log_dict(
        self, output: TrainStepOutput, n_training_samples: int
    ) -> dict[str, Any]:
        log = super().build_train_step_log_dict(output, n_training_samples)
        return {**log, **self._of_all_latents}

    @override
    def _build_sparsity_log_dict(self) -> dict[str, Any]:
        processes, sparsity = self.sae.processes, self.feature_sparsity
        return {
            "metrics/mean_log10_feature_sparsity": float(
                processes.mean_over_shards(self.log_feature_sparsity.to(sparsity.device))
            ),
            "sparsity/below_1e-5": processes.count_over_shards((sparsity < 1e-5).sum()),
            "sparsity/below_1e-6": processes.count_over_shards((sparsity < 1e-6).sum()),
        }

    @override
    def set_final_sae_metadata(self) -> None:
        if self.n_frac_active_samples > 0:
            count = self.sae.processes.count_over_shards
            metadata = self.sae.cfg.metadata
            metadata.l0 = count(self.feature_sparsity.sum())
            metadata.num_dead_features = int(count(self.dead_neurons.sum()))

    # ---------------------------------------------------------------- the end of a step

    @override
    def _update_pbar(
        self, step_output: TrainStepOutput, pbar: tqdm, update_interval: int = PROGRESS_EVERY
    ) -> None:
        checkpoints = self.checkpoints
        own = isinstance(checkpoints, AgreedCheckpoints) and checkpoints.due_by_this_clock()
        stop, due = self.launch.any_of(self._stop_requested, own and self.launch.rank == 0)
        self._stop_requested = stop
        if isinstance(checkpoints, AgreedCheckpoints):
            checkpoints.agreed = due
        super()._update_pbar(step_output, pbar, update_interval)

    @override
    def l0_and_dead_share(self, step_output: TrainStepOutput) -> tuple[float, float]:
        dead = self.sae.processes.mean_over_shards(self.dead_neurons.float())
        return self.sae.control.batch_l0, float(dead)

    # ---------------------------------------------------------------- checkpoints

    def whole(self, *, with_optimizer: bool = True) -> JumpReLUTrainer | None:
        """One process's trainer in this state, on the first process; None on the others."""
        sae, processes = gather_whole(self.sae), self.sae.processes
        counts = {
            name: gather(getattr(self, name), 0, processes)
            for name in ("act_freq_scores", "n_forward_passes_since_fired")
        }
        optimizer = gather_optimizer(self.sae, self.optimizer, sae) if with_optimizer else None
        if sae is None:
            return None
        return self._in_one_process(sae=sae, optimizer=optimizer, **counts)

    def _in_one_process(self, **parts: Any) -> JumpReLUTrainer:
        """A trainer of one process with these parts, and with all else of this one."""
        made = JumpReLUTrainer.__new__(JumpReLUTrainer)
        vars(made).update(vars(self), **parts)
        return made

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        self._by_the_first(
            lambda whole: whole.save_checkpoint(checkpoint_name, base_path, wandb_aliases)
        )

    @override
    def _save_replaceable(self) -> Path | None:
        return self._by_the_first(lambda whole: whole._save_replaceable())

    def _by_the_first(self, act: Callable[[Any], T]) -> T:
        """Have the first process act on the whole; everyone gets its result, or its error."""
        if self.sae.optimizer_hooks is not None:  # a step may have been interrupted
            self.sae.optimizer_hooks.restore_layout()
        result, last = self._of_the_whole(act)
        # The whole has cycles: Python would keep it, and the next one beside it.
        gc.collect()
        if self.checkpoints is not None:
            self.checkpoints.last = last
        return result

    def _of_the_whole(self, act: Callable[[Any], T]) -> tuple[T, Path | None]:
        """What an act on the whole gives, and the last checkpoint after it."""
        whole = self.whole()

        def on_the_first() -> tuple[Any, Path | None]:
            result = None if whole is None else act(whole)
            return result, self.checkpoints.last if self.checkpoints else None

        return self.launch.from_the_first(on_the_first)

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Load this shard's part of a checkpoint, and its SAE's.

        On each machine one process after the other: each has the whole on the host for a while.
        """
        for turn in range(1 + max(self.launch.all_objects(self.launch.local_rank))):
            if turn == self.launch.local_rank:
                self._load(Path(checkpoint_path))
                gc.collect()  # the whole has cycles
            self.launch.wait()

    def _load(self, checkpoint: Path) -> None:
        sae = whole_like(self.sae)
        sae.load_weights_from_checkpoint(checkpoint)
        cfg = copy.copy(self.cfg)
        cfg.device = "cpu"
        whole = self._in_one_process(sae=sae, optimizer=Adam(sae.parameters()), cfg=cfg)
        whole.load_trainer_state(checkpoint)
        take_part(sae, self.sae)
        take_optimizer_part(sae, whole.optimizer, self.sae, self.optimizer)
        for name in (
            "n_training_samples",
            "n_training_steps",
            "n_frac_active_samples",
            "started_fine_tuning",
            "checkpoint_thresholds",
        ):
            setattr(self, name, getattr(whole, name))
        for name in ("act_freq_scores", "n_forward_passes_since_fired"):
            part = self.sae.processes.part_of(getattr(whole, name))
            setattr(self, name, part.to(self.cfg.device))
