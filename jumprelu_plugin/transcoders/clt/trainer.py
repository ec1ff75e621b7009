"""The training loop of a cross-layer transcoder: scaled batches of all layers, one optimizer.

SAELens' trainers give each dictionary its own optimizer and have no joint loss, so this package has
a loop of its own. Schedules, activation store and scales are SAELens'. A run that is stopped saves
its state between two steps, and the resumed run equals the uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from sae_lens import logger
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.optim import get_lr_scheduler
from torch import Tensor
from tqdm.auto import tqdm

from jumprelu_plugin.control.saved_state import require_same_form, require_same_shapes
from jumprelu_plugin.saes.parameters import PairScale
from jumprelu_plugin.saes.tensor_files import explained
from jumprelu_plugin.training.activations.pairs import PairStore
from jumprelu_plugin.training.activations.scaler import PairScaler
from jumprelu_plugin.training.checkpoints import Checkpoints
from jumprelu_plugin.training.health.reporting import report
from jumprelu_plugin.training.interruption import InterruptibleIterator
from jumprelu_plugin.training.metrics_file import append_metrics, keep_before
from jumprelu_plugin.training.text_source import without_false_alarms
from jumprelu_plugin.transcoders.clt.monitors import LayerMonitors
from jumprelu_plugin.transcoders.clt.saved_training import SavedTraining
from jumprelu_plugin.transcoders.clt.training_step import CLTTrainingStep, StepOutput

_UPDATE_EVERY = 10
# SAELens' trainer clips at this.
_CLIP_NORM = 1.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: of the run.
        lr: its peak, constant until it decays.
        decay_steps: at the end, over which it falls to 0.
        norm_batches: that the scales are measured on.
        checkpoints: how many are saved along the way; the last two are kept.
        log_every: steps between two lines of metrics.
    """

    steps: int
    lr: float
    decay_steps: int
    norm_batches: int = 20
    checkpoints: int = 0
    log_every: int = 10


class Trainer:
    """Trains a cross-layer transcoder on a store of its pairs, named by `pair_name`.

    Args:
        checkpoints: where checkpoints are saved; the last two are kept.
        metrics_path: JSON lines with each layer's L0, FVU and coefficient, and one for each alarm
            (`health.alarms`); None: another process writes them.
    """

    def __init__(
        self,
        training_step: CLTTrainingStep,
        schedule: Schedule,
        store: PairStore,
        *,
        checkpoints: Checkpoints,
        metrics_path: Path | None,
    ):
        self.training_step, self.model = training_step, training_step.model
        self.schedule, self.store = schedule, store
        self.checkpoints, self.metrics_path = checkpoints, metrics_path
        shape, centers = self.model.cfg, training_step.cfg.controls_l0
        self.scalers = [PairScaler(shape.d_in, shape.d_out, centers=centers) for _ in shape.layers]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=schedule.lr)
        self.scheduler = get_lr_scheduler(
            "constant",
            self.optimizer,
            training_steps=schedule.steps,
            lr=schedule.lr,
            warm_up_steps=0,
            decay_steps=schedule.decay_steps,
            lr_end=schedule.lr,
            num_cycles=1,
        )
        self.step = 0
        self.last: StepOutput | None = None

    @without_false_alarms()
    def fit(self) -> None:
        """Train to the end, from where `load` left it.

        Raises:
            InterruptedException: stopped by Ctrl-C or SIGTERM; the step was finished and a
                checkpoint saved.
        """
        batches = self.make_batches()
        due = self._checkpoint_steps()
        monitors = LayerMonitors(self.training_step, self.schedule.steps)
        with (
            closing(monitors),
            batches.stopped_by_signals(),
            tqdm(total=self.schedule.steps, initial=self.step, desc="training", unit="step") as bar,
        ):
            try:
                if self.scalers[0].scaling_factor is None:
                    self._measure_scales(batches)
                while self.step < self.schedule.steps:
                    self.last = self._take_step(next(batches))
                    for index, alarm in monitors.step(self.last, self.step - 1):
                        layer = self.model.cfg.layers[index]
                        report(alarm, self.metrics_path, to_wandb=False, of=f"layer_{layer}")
                    self._show(bar, self.last)
                    if self.step in due or self.checkpoints.due():
                        self.save()
            except InterruptedException:
                # Before the first step there is nothing that a fresh start would not give.
                if self.step > 0:
                    self.save()
                    logger.warning(f"interrupted; the last checkpoint: {self.checkpoints.last}")
                raise

    def make_batches(self) -> InterruptibleIterator:
        """The batches of the run, which end where it is asked to stop."""
        return InterruptibleIterator(self.store.get_multi_hook_data_loader())

    @torch.no_grad()
    def fold_scales(self) -> None:
        """Make the weights take and give the model's own activations: when training is over."""
        self.training_step.restore_layout()
        self.model.fold_scales_([scaler.scaling_factor for scaler in self.scalers])

    # ---------------------------------------------------------------- one step

    def _measure_scales(self, batches: InterruptibleIterator) -> None:
        for _ in range(self.schedule.norm_batches):
            rows = next(batches)
            for index, scaler in enumerate(self.scalers):
                scaler.observe(rows[pair_name(index)])
        for scaler in self.scalers:
            scaler.finish()

    def _take_step(self, rows: Mapping[str, Tensor]) -> StepOutput:
        inputs, targets = [], []
        for index, scaler in enumerate(self.scalers):
            mine = self.own_tokens(rows[pair_name(index)])
            scaled = scaler.scale(mine.to(self.model.device))
            x, y = scaled.split([scaler.d_in, scaler.d_out], dim=1)
            # Copied apart: the sparse products read whole rows.
            inputs.append(x.contiguous())
            targets.append(y)
        output = self.training_step.loss(inputs, targets)
        self.optimizer.zero_grad()
        output.loss.backward()
        self.clip_gradients()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return output

    def own_tokens(self, rows: Float[Tensor, "batch width"]) -> Float[Tensor, "tokens width"]:
        """The part of a batch's rows that is trained on here."""
        return rows

    def clip_gradients(self) -> None:
        """Limit the norm of the gradients before the optimizer's step."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP_NORM)

    def _show(self, bar: tqdm, output: StepOutput) -> None:
        bar.update(1)
        shown, logged = (
            self.step % every == 0 for every in (_UPDATE_EVERY, self.schedule.log_every)
        )
        if not (shown or logged):
            return
        errors, n_layers = output.fvu(self.model.cfg.n_layers), self.model.cfg.n_layers
        dead, loss = self.training_step.dead_share(), output.batch_loss()
        if shown:
            bar.set_postfix(
                loss=f"{loss:.3g}",
                L0=f"{sum(output.l0) / n_layers:.1f}",
                FVU=f"{sum(errors) / n_layers:.3f} ({min(errors):.3f} to {max(errors):.3f})",
                dead=f"{dead:.1%}",
            )
        if logged and self.metrics_path is not None:
            finite = [error if math.isfinite(error) else None for error in errors]
            line = {
                "step": self.step,
                "loss": loss,
                "l0": output.l0,
                "fvu": finite,
                "coefficient": [float(value) for value in output.coefficients],
                "dead": dead,
                "lr": self.optimizer.param_groups[0]["lr"],
            }
            append_metrics(self.metrics_path, line)

    # ---------------------------------------------------------------- checkpoints

    def _checkpoint_steps(self) -> set[int]:
        count, steps = self.schedule.checkpoints, self.schedule.steps
        return {round(steps * (i + 1) / (count + 1)) for i in range(count)}

    def save(self) -> Path | None:
        """Save a checkpoint in one piece; None where the disk refuses it."""
        self.training_step.restore_layout()
        state = self.state()

        def write(folder: Path) -> None:
            state.write(folder)
            self.store.save_to_checkpoint(folder)

        return self.checkpoints.save(str(self.step), write)

    def state(self) -> SavedTraining:
        """What a resumed run needs beside the place in the text."""
        weights = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        return SavedTraining(
            tensors={**weights, **self.training_step.tensors()},
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            values={
                "step": self.step,
                "scales": [scaler.scaling_factor for scaler in self.scalers],
                "training_step": self.training_step.state(),
            },
        )

    def load(self, checkpoint: str | Path) -> None:
        """Go on from a checkpoint of a training with the same settings; call before `fit`.

        Raises:
            ValueError: a file of it is damaged, or of another training.
            OSError: a file is missing.
        """
        checkpoint = Path(checkpoint)
        state = self.read(checkpoint)
        with explained(checkpoint, "resume from an earlier one, or start anew"):
            self._restore(state)
        self.store.load_from_checkpoint(checkpoint)
        self.checkpoints.last = checkpoint
        if self.metrics_path is not None:
            keep_before(self.metrics_path, self.step + 1)

    def read(self, checkpoint: Path) -> SavedTraining:
        """What a checkpoint holds of what is trained here."""
        return SavedTraining.read(checkpoint, str(self.model.device))

    def _restore(self, state: SavedTraining) -> None:
        parameters = {f"model.{name}": value for name, value in self.model.named_parameters()}
        tensors = dict(state.tensors)
        require_same_shapes(tensors, parameters)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors.pop(name))
        self.optimizer.load_state_dict(state.optimizer)
        for group in self.optimizer.param_groups:
            group["fused"] = None  # for the seam to switch on, which then turns what it has to
        self.scheduler.load_state_dict(state.scheduler)
        require_same_form(state.values["step"], self.step, "its step")
        self.step, scales = state.values["step"], state.values["scales"]
        if not isinstance(scales, list) or len(scales) != len(self.scalers):
            raise ValueError(f"its scales are {scales!r}; expected one for each layer")
        for scaler, factors in zip(self.scalers, scales, strict=True):
            scaler.scaling_factor = PairScale.of(factors)
        self.training_step.load_state(state.values["training_step"], tensors)


def pair_name(index: int) -> str:
    """The name of a layer's pair in the store."""
    return f"layer_{index}"
