"""SAELens' trainer on a stream of activations, with samples of how training goes.

The loop is `SAETrainer.fit`'s, written with the methods that SAELens offers to whoever drives a
trainer from outside (as its MultiSAETrainer does); a test compares both, weight for weight. It
shows no progress bar of its own.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from jumprelu_plugin.evaluation.metrics import batch_fvu
from jumprelu_plugin.formats.saelens import load_inference_sae
from jumprelu_plugin.step.activity import mean_l0

THRESHOLD_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SAMPLES = 60


@dataclass
class TrainingRun:
    """What a training took, and samples of how it went.

    Attributes:
        seconds: wall-clock time of the training; of SAEs trained together, each one's share.
        cpu_seconds: CPU time of this process in it, shared likewise.
        trained_together: how many SAEs were trained at that time, this one included.
        dynamics: one entry a sampled step: step, l0, fvu and dead_share of its batch, the sparsity
            coefficient, and the thresholds' quantiles `THRESHOLD_QUANTILES` (None where an
            architecture has none).
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    trained_together: int = 1
    dynamics: list[dict[str, Any]] = field(default_factory=list)


def batches(
    rows: Float[Tensor, "rows d"],
    size: int,
    seed: int,
    center: Float[Tensor, " d"] | None = None,
) -> Iterator[Float[Tensor, "batch d"]]:
    """Endless batches less `center`, in a random order that depends on the seed."""
    random = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=random)
        for start in range(0, len(order) - size + 1, size):
            batch = rows[order[start : start + size]].float()
            yield batch if center is None else batch - center


def less(
    source: Iterator[Float[Tensor, "batch d"]], center: Float[Tensor, " d"] | None
) -> Iterator[Float[Tensor, "batch d"]]:
    """Batches less `center`."""
    for batch in source:
        yield batch if center is None else batch - center


def trainer_config(
    steps: int, batch: int, lr: float, device: str = "cpu", decay: float = 0.2
) -> SAETrainerConfig:
    """A learning rate that is constant, and falls linearly to 0 over the last part of the run.

    Args:
        decay: that part.
    """
    return SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        device=device,
        lr=lr,
        lr_end=0.0,
        lr_decay_steps=round(decay * steps),
        dead_feature_window=max(1, steps // 10),
        n_batches_for_norm_estimate=20,
    )


def needs_input_scale(sae: Any) -> bool:
    """Whether a scale of the SAE's input is estimated from its first batches."""
    return sae.cfg.normalize_activations == "expected_average_only_in"


class SAETraining:
    """One SAE in SAELens' trainer, taken a step at a time.

    Args:
        sae: trained in place.
        cfg: of the trainer.
        source: endless batches, from which the input scale is estimated where the SAE needs one.
        samples: about how many steps are sampled.
        scaling_factor: the input scale, where it is known; nothing is then read from `source`.

    Attributes:
        steps: steps taken.
        run: samples of them.
    """

    def __init__(
        self,
        sae: Any,
        cfg: SAETrainerConfig,
        source: Iterator[Float[Tensor, "batch d"]],
        samples: int = SAMPLES,
        scaling_factor: float | None = None,
    ):
        self._trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=source)
        self.run = TrainingRun()
        self._every = max(1, cfg.total_training_steps // samples)
        sae.to(cfg.device)
        self._trainer.activation_scaler.scaling_factor = scaling_factor
        if needs_input_scale(sae) and scaling_factor is None:
            with redirect_stderr(io.StringIO()):  # a progress bar
                self._trainer.activation_scaler.estimate_scaling_factor(
                    sae.cfg.d_in, source, cfg.n_batches_for_norm_estimate
                )

    @property
    def scaling_factor(self) -> float | None:
        """The input scale; None where the SAE has none."""
        return self._trainer.activation_scaler.scaling_factor

    @property
    def steps(self) -> int:
        return self._trainer.n_training_steps

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        cfg = self._trainer.cfg
        return -(-cfg.total_training_samples // cfg.train_batch_size_samples)

    def step(self, batch: Float[Tensor, "batch d"]) -> None:
        """Take the next step; `batch` is left as it is."""
        trainer = self._trainer
        trainer.maybe_reset_sparsity()
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        if self.steps == 1 or self.steps % self._every == 0:
            self.run.dynamics.append(_sample(trainer, output))

    def finish(self) -> None:
        """Fold the input scale, and write what SAELens records at the end."""
        trainer = self._trainer
        if trainer.activation_scaler.scaling_factor is not None:
            trainer.sae.fold_activation_norm_scaling_factor(
                trainer.activation_scaler.scaling_factor
            )
        trainer.set_final_sae_metadata()


def train(
    sae: Any,
    source: Iterator[Float[Tensor, "batch d"]],
    cfg: SAETrainerConfig,
    *,
    on_step: Callable[[], None] | None = None,
    samples: int = SAMPLES,
) -> TrainingRun:
    """Train in place with SAELens' trainer.

    Args:
        source: endless batches.
        on_step: called after every step.
        samples: about how many steps are sampled.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    training = SAETraining(sae, cfg, source, samples)
    while training.steps < training.total:
        training.step(next(source))
        if on_step is not None:
            on_step()
    training.finish()
    run = training.run
    run.seconds, run.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return run


@torch.no_grad()
def _sample(trainer: SAETrainer[Any, Any], output: TrainStepOutput) -> dict[str, Any]:
    sae: Any = trainer.sae
    threshold = getattr(sae, "threshold", None)
    quantiles = None
    if isinstance(threshold, Tensor):
        wanted = torch.tensor(THRESHOLD_QUANTILES)
        quantiles = torch.quantile(threshold.detach().float().cpu().flatten(), wanted).tolist()
    return {
        "step": trainer.n_training_steps,
        "l0": float(mean_l0(output.feature_acts)),
        "fvu": float(batch_fvu(output.sae_in, output.sae_out)),
        "dead_share": float(trainer.dead_neurons.float().mean()),
        "coefficient": _coefficient(trainer, output),
        "threshold_quantiles": quantiles,
    }


def _coefficient(trainer: SAETrainer[Any, Any], output: TrainStepOutput) -> float | None:
    """What the sparsity term is multiplied by; None for an architecture without one."""
    measured: Any = output.metrics.get("measured_l0_coefficient")
    if measured is not None:
        return float(measured)
    values = [value for name, value in trainer.get_coefficients().items() if name in ("l0", "l1")]
    if not values:
        return None
    factor = torch.tensor(getattr(trainer.sae, "log_coefficient", 0.0)).exp()
    return float(values[0] * factor)


def as_saved(
    sae: Any, center: Float[Tensor, " d"] | None = None, folder: str | Path | None = None
) -> Any:
    """The SAE as stock SAELens loads it after training, with `center` put back.

    Args:
        folder: where it is saved; by default nowhere that stays.

    Raises:
        ValueError: there is a center, and the SAE does not subtract b_dec from its input.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return as_saved(sae, center, temporary)
    sae.save_inference_model(str(folder))
    saved = load_inference_sae(Path(folder))
    if center is not None:
        if not saved.cfg.apply_b_dec_to_input:
            raise ValueError("b_dec can hold the center only where it is subtracted from the input")
        saved.b_dec.data += center
        saved.save_model(str(folder))
    return saved
