"""SAELens' trainer, showing and recording what it measures.

Adds three things and changes no number: a progress bar with loss, L0, FVU and dead latents, the
metrics SAELens logs to wandb as JSON lines in a file, with or without wandb, and a full checkpoint
when it is interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens import logger
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer
from tqdm import tqdm
from typing_extensions import override

from jumprelu_plugin.records import append_jsonl

PROGRESS_EVERY = 10


class JumpReLUTrainer(SAETrainer[Any, Any]):
    """`SAETrainer` with a telling progress bar and, if `metrics_path` is set, JSON lines.

    A line is written every `cfg.logger.wandb_log_frequency` steps and holds exactly what SAELens
    would give wandb at that step, and the step.
    """

    metrics_path: Path | None = None

    @override
    def fit(self) -> Any:
        try:
            return super().fit()
        except (KeyboardInterrupt, InterruptedException):
            # SAELens' runner saves its place in the data now, into a folder it expects to find,
            # and no weights: those come first.
            if self.cfg.checkpoint_path is not None:
                name = str(self.n_training_samples)
                self.save_checkpoint(checkpoint_name=name)
                folder = Path(self.cfg.checkpoint_path, name)
                logger.warning(f"interrupted; continue with --resume_from_checkpoint {folder}")
            raise

    @override
    def step(self, batch: torch.Tensor) -> TrainStepOutput:
        output = super().step(batch)
        due = (self.n_training_steps + 1) % self.cfg.logger.wandb_log_frequency == 0
        if self.metrics_path is not None and due:
            metrics = self.build_train_step_log_dict(output, self.n_training_samples)
            append_jsonl(self.metrics_path, {"step": self.n_training_steps, **metrics})
        return output

    @override
    @torch.no_grad()
    def _update_pbar(
        self, step_output: TrainStepOutput, pbar: tqdm, update_interval: int = PROGRESS_EVERY
    ) -> None:
        pbar.update(len(step_output.sae_in))
        if self.n_training_steps % update_interval:
            return
        x, x_hat = step_output.sae_in, step_output.sae_out
        residual = (x_hat - x).pow(2).sum()
        variance = (x - x.mean(0)).pow(2).sum()
        acts = step_output.feature_acts
        active = acts._nnz() if acts.is_sparse else acts.count_nonzero()
        pbar.set_postfix(
            loss=f"{step_output.loss.item():.3g}",
            L0=f"{float(active) / len(x):.1f}",
            FVU=f"{(residual / variance).item():.3f}",
            dead=f"{self.dead_neurons.float().mean().item():.1%}",
        )
