"""Alarms of a running training: what goes wrong, said once, with what to change.

Every step leaves a few numbers on its device: the error, which thresholds had a gradient, how many
latents were active. Every `every` steps they are read back and judged, so nothing waits for the
device in between, and nothing of [batch, d_sae] is computed at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from jumprelu_plugin.control.dictionary_control import DictionaryControl
from jumprelu_plugin.control.resampling import longest_patience
from jumprelu_plugin.control.units import stored
from jumprelu_plugin.step.activity import active_count
from jumprelu_plugin.step.processes import ONE_PROCESS

EVERY = 100

# The bars. docs/guides/monitoring.md has what healthy runs read.
STARVED_SHARE = 0.5
DEAD_SHARE = 0.25
USELESS_SHARE = 0.5
ENCODER_GROWTH = 5.0
FROZEN_SHARE = 0.5
L0_RATIO = 1.25
LOSS_RATIO = 3.0
UNMEASURED_SHARE = 0.5

# Latents whose encoders are compared with what they were.
PROBED = 64


@dataclass(frozen=True)
class Alarm:
    """Something that went wrong.

    Attributes:
        name: a fixed word for it.
        step: when it was noticed.
        message, suggestion: what was measured, and what to do about it.
    """

    name: str
    step: int
    message: str
    suggestion: str

    def __str__(self) -> str:
        return f"step {self.step:,}: {self.message}; {self.suggestion}"


@dataclass(frozen=True)
class StepStats:
    """What one step leaves to be judged later, on its device.

    Attributes:
        active: active (token, latent) pairs of the batch.
        tokens: of the batch.
        error: the reconstruction's.

    Where processes split the dictionary or the batch, `active` are the pairs of this one.
    """

    active: int | Tensor
    tokens: int
    error: Float[Tensor, ""]

    @classmethod
    def at(cls, output: TrainStepOutput) -> StepStats:
        """At a step of SAELens'."""
        active = active_count(output.feature_acts)
        error = output.losses.get("mse_loss", output.loss)
        assert isinstance(error, Tensor)
        return cls(active, len(output.sae_in), error.detach())


class Monitor:
    """Watches one dictionary in training and raises alarms.

    Args:
        dictionary: has W_enc, W_dec and, where it is controlled, threshold: any SAELens training
            SAE, or one layer of a cross-layer transcoder. See `Monitor.of` for an SAE.
        steps: of the whole run.
        control: what controls the dictionary; None for an architecture without thresholds.
        target_l0: the L0 that it is to have; None where none was given.
        warm_up_steps: before which L0 is not judged.
        every: steps between two looks.

    Attributes:
        gauges: what the last look read, by metric name; empty before the first.
        raised: the alarms so far, by name; each is raised once.
    """

    def __init__(
        self,
        dictionary: Any,
        steps: int,
        *,
        control: DictionaryControl | None = None,
        target_l0: float | None = None,
        warm_up_steps: int = 0,
        every: int = EVERY,
    ):
        self.gauges: dict[str, float] = {}
        self.raised: dict[str, Alarm] = {}
        self._dictionary, self._control = dictionary, control
        self._processes = ONE_PROCESS if control is None else control.processes
        self._d_sae = dictionary.W_enc.shape[1] if control is None else control.settings.d_sae
        self._target_l0, self._warm_up_steps = target_l0, warm_up_steps
        self._steps, self._every = steps, every
        self._seen = 0  # steps since the last look
        self._active: float | Tensor = 0.0
        self._tokens = 0
        self._error: Float[Tensor, ""] | None = None
        self._worst: Float[Tensor, ""] | None = None
        self._usual_error: float | None = None
        self._gap: float | None = None
        self._misses = 0  # looks in a row at an L0 that will not reach its target
        self._first_gain: float | None = None
        self._probe: Float[Tensor, "probed d_in"] | None = None
        self._moved: Bool[Tensor, " d_sae"] | None = None
        listener: Any = self._gradient_of_threshold
        self._hook = (
            None
            if control is None
            else stored(dictionary, "threshold").register_post_accumulate_grad_hook(listener)
        )

    @classmethod
    def of(cls, sae: Any, steps: int) -> Monitor:
        """The monitor of any SAELens training SAE; thresholds are watched on ours alone."""
        control = getattr(sae, "control", None)
        controlled = control is not None and control.l0 is not None
        warm_up = "target_l0_warm_up_steps" if controlled else "l0_warm_up_steps"
        return cls(
            sae,
            steps,
            control=control,
            target_l0=getattr(sae.cfg, "target_l0", None),
            warm_up_steps=getattr(sae.cfg, warm_up, 0),
        )

    @property
    def _controls_l0(self) -> bool:
        return self._control is not None and self._control.l0 is not None

    def close(self) -> None:
        """Stop listening to the thresholds' gradient."""
        if self._hook is not None:
            self._hook.remove()

    # ---------------------------------------------------------------- every step

    def _gradient_of_threshold(self, theta: Tensor) -> None:
        if theta.grad is None:
            return
        moved = theta.grad != 0
        self._moved = moved if self._moved is None else self._moved.logical_or_(moved)

    @torch.no_grad()
    def step(self, seen: StepStats, silent: Float[Tensor, " d_sae"], step: int) -> list[Alarm]:
        """Take in a step that was made; return the alarms it raised.

        Args:
            seen: what the step gave.
            silent: steps since each latent fired.
            step: its number, from 0.
        """
        self._active += seen.active
        self._tokens += seen.tokens
        error = seen.error
        if self._first_gain is None:
            self._first_gain, self._probe = self._gain(), self._probed()
            self._usual_error = float(error)
        self._error = error.clone() if self._error is None else self._error + error
        self._worst = error if self._worst is None else torch.maximum(self._worst, error)
        self._seen += 1
        if (step + 1) % self._every:  # the same steps in a run that is resumed
            return []
        found = self._look(silent, step, seen.tokens)
        fresh = [alarm for alarm in found if alarm.name not in self.raised]
        self.raised.update({alarm.name: alarm for alarm in fresh})
        return fresh

    # ---------------------------------------------------------------- every now and then

    def _look(self, silent: Tensor, step: int, batch: int) -> list[Alarm]:
        l0 = self._processes.count_pairs(self._active) / self._tokens
        found = [
            self._thresholds(step),
            self._dead(silent, l0, step, batch),
            self._encoder(step),
            self._frozen(silent, step),
            self._l0(l0, step),
            self._loss(step),
            self._multiplier(l0, step),
        ]
        self._seen = self._tokens = 0
        self._active, self._error, self._worst = 0.0, None, None
        return [alarm for alarm in found if alarm is not None]

    def _thresholds(self, step: int) -> Alarm | None:
        if self._control is None:
            return None
        if self._seen < self._every:  # resumed in between: too few steps for all to be moved
            self._moved = None
            return None
        moved = stored(self._dictionary, "threshold") * 0 if self._moved is None else self._moved
        moved = self._processes.any_over_replicas(moved != 0)
        starved = 1.0 - float(self._processes.mean_over_shards(moved.float()))
        self._moved = None
        self.gauges["health/thresholds_without_gradient"] = starved
        if starved <= STARVED_SHARE:
            return None
        return Alarm(
            "thresholds starved",
            step,
            f"{starved:.0%} of the thresholds had no gradient in {self._seen} steps: their windows "
            f"(jumprelu_bandwidth, {self._control.bandwidth:.3g} in the input's units) hold no "
            "token",
            "raise jumprelu_bandwidth, or leave it out to take it from the data",
        )

    def _dead(self, silent: Tensor, l0: float, step: int, batch: int) -> Alarm | None:
        wait = longest_patience(self._d_sae, self._target_l0 or max(1.0, l0), batch)
        if step < wait:
            return None
        before = self.gauges.get("health/dead_share", 0.0)
        dead = float(self._processes.mean_over_shards((silent >= wait).float()))
        self.gauges["health/dead_share"] = dead
        if dead <= DEAD_SHARE or dead < before:
            return None
        firing = None if self._control is None else self._control.firing
        useless = firing is not None and firing.useless > USELESS_SHARE
        return Alarm(
            "latents dying",
            step,
            f"{dead:.0%} of the latents have not fired for {wait:,} steps"
            + (", and most that were to replace them would add to the error" if useless else ""),
            "lower d_sae: these activations have no use for so many latents at this L0"
            if useless
            else "lower lr"
            if self._controls_l0
            else "lower lr or l0_coefficient, or give target_l0 in place of l0_coefficient, which "
            "also resamples dead latents",
        )

    def _gain(self) -> float:
        """Mean over the probed latents of ‖encoder‖ · ‖decoder‖: 1 where z is a fair guess."""
        every = max(1, self._dictionary.W_enc.shape[1] // PROBED)
        encoders, decoders = self._dictionary.W_enc[:, ::every], self._dictionary.W_dec[::every]
        lengths = encoders.float().norm(dim=0) * decoders.float().norm(dim=1)
        return float(self._processes.mean_over_shards(lengths))

    def _encoder(self, step: int) -> Alarm | None:
        assert self._first_gain is not None
        # SAELens' own start is short, at a gain of 0.01, and grows to 1 in good health.
        growth = self.gauges["health/encoder_growth"] = self._gain() / max(self._first_gain, 1.0)
        if growth <= ENCODER_GROWTH:
            return None
        return Alarm(
            "encoder runaway",
            step,
            f"the encoder is {growth:.0f} times as long as it should be, and the thresholds' "
            "windows are as much narrower beside the pre-activations",
            "lower lr",
        )

    def _probed(self) -> Float[Tensor, "probed d_in"]:
        W_enc = self._dictionary.W_enc
        return W_enc[:, :: max(1, W_enc.shape[1] // PROBED)].t().clone()

    def _frozen(self, silent: Tensor, step: int) -> Alarm | None:
        now = self._probed()
        fired = silent[:: max(1, len(silent) // PROBED)] < self._seen
        same = (now == self._probe)[fired]
        self._probe = now
        if self._seen < self._every:
            return None
        if not self._processes.count_over_shards(len(same)):
            return None
        frozen = float(self._processes.mean_over_shards(same.float()))
        self.gauges["health/frozen_share"] = frozen
        if frozen <= FROZEN_SHARE:
            return None
        dtype = self._dictionary.W_enc.dtype
        exact = dtype in (torch.float32, torch.float64)
        name = str(dtype).removeprefix("torch.")
        return Alarm(
            "weights frozen",
            step,
            f"{frozen:.0%} of the encoder's numbers, of latents that fire, did not change in "
            f"{self._seen} steps: a step of lr is lost in rounding to {name}",
            "raise lr" if exact else "train the SAE in float32 (--sae.dtype), or raise lr",
        )

    def _l0(self, l0: float, step: int) -> Alarm | None:
        target, d_sae = self._target_l0, self._d_sae
        if step < self._warm_up_steps:
            return None
        if target is None:
            gap = max(1.0 / max(l0, 1e-6), 4.0 * l0 / d_sae)
        else:
            gap = max(l0, 1e-6) / target
        gap, before = abs(math.log(gap)), self._gap
        if target is None and 1.0 <= l0 <= d_sae / 4:
            gap = 0.0
        self._gap = gap
        if before is None:
            return None
        # Where it ends if it goes on coming nearer as it did since the last look.
        pace = max(0.0, before - gap) / self._seen
        left = gap - pace * max(0, self._steps - step)
        self._misses = self._misses + 1 if left > math.log(L0_RATIO) else 0
        if self._misses < 2:
            return None
        return self._l0_alarm(l0, target, step)

    def _l0_alarm(self, l0: float, target: float | None, step: int) -> Alarm:
        if target is not None:
            return Alarm(
                "L0 off target",
                step,
                f"L0 is {l0:.3g}, the target {target:g}, and it does not get there at this pace",
                "leave out jumprelu_bandwidth and jumprelu_init_threshold, which are then taken "
                "from the data, and lower lr"
                if self._controls_l0
                else "leave out l0_coefficient: thresholds then hold the target",
            )
        few, d_sae = l0 < 1.0, self._d_sae
        return Alarm(
            "L0 off target",
            step,
            f"L0 is {l0:.3g} of {d_sae:,} latents, and stays there at this pace",
            f"{'lower' if few else 'raise'} l0_coefficient, or give target_l0 in its place",
        )

    def _loss(self, step: int) -> Alarm | None:
        assert self._error is not None and self._worst is not None
        mean, worst, usual = self._error.item() / self._seen, self._worst.item(), self._usual_error
        self._usual_error = mean
        assert usual is not None
        if worst <= LOSS_RATIO * usual:
            return None
        return Alarm(
            "loss spike",
            step,
            f"the reconstruction error rose to {worst:.3g}; it was {usual:.3g} before",
            "lower lr, or warm it up (lr_warm_up_steps); if it is over soon, look for unusual text",
        )

    def _multiplier(self, l0: float, step: int) -> Alarm | None:
        if self._control is None or self._control.l0 is None:
            return None
        controller = self._control.l0
        share = self.gauges["health/multiplier_unmeasured"] = float(controller.unmeasured)
        if share <= UNMEASURED_SHARE or l0 <= controller.current_target():
            return None
        return Alarm(
            "multiplier lost",
            step,
            f"L0 is {l0:.3g}, above its target of {controller.current_target():.3g}, and in "
            f"{share:.0%} of the latest steps lowering the thresholds would not reduce the error, "
            "so the coefficient cannot be measured",
            "lower lr; if it stays, look for a few tokens or one direction with most of the "
            "activations' variance",
        )
