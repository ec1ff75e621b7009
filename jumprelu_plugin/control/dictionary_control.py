"""Everything that the training of one dictionary keeps beside its parameters.

A dictionary is whatever has W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out] and threshold
[d_sae]: an SAE, a transcoder, or one layer of a cross-layer transcoder. Each has one control, which
is called four times in a training:

    calibrate      on the first batch: thresholds and bandwidth from the data
    observe        in a step: the slopes and firings that the controls need
    after_update   after the optimizer's step: shift thresholds, constrain rows, resample
    state          in a checkpoint
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jumprelu_plugin.control.calibration import calibrate
from jumprelu_plugin.control.decoder_norm import normalize_rows_
from jumprelu_plugin.control.density import DensityMultipliers
from jumprelu_plugin.control.l0 import L0Controller
from jumprelu_plugin.control.resampling import (
    EncoderDirections,
    FiringRecord,
    patience,
    resample_dead_,
)
from jumprelu_plugin.control.saved_state import checked_control_state, require_same_shapes
from jumprelu_plugin.control.units import LogParameter, parametrized, set_value, stored
from jumprelu_plugin.step.losses import Step, Term, threshold_slopes
from jumprelu_plugin.step.processes import ONE_PROCESS, OneProcess

# The L0 that calibration starts from where there is no target, as a share of the latents.
START_SHARE = 0.05


@dataclass(frozen=True)
class ControlSettings:
    """How one dictionary is controlled, with every optional setting resolved.

    Attributes:
        d_sae: latents.
        controls_l0: whether thresholds hold `target_l0` and the coefficient is measured.
        target_l0: L0*, active latents a token; 0 where there is none.
        target_l0_start_ratio, target_l0_warm_up_steps: see `L0Controller`.
        jumprelu_bandwidth: ε in the units of training; 0: measured on the first batch.
        jumprelu_bandwidth_std: ε as a multiple of the pre-activations' standard deviation, where
            it is measured.
        jumprelu_init_threshold: θ₀ in the units of training; 0: measured on the first batch.
        jumprelu_ste_input_share: of the estimators' gradient, what the encoder receives.
        ste_input_share_is_given: whether the config says it, and not a default.
        max_latent_density: the largest share of tokens a latent is to fire on; 1: no limit.
        resample_dead_latents: whether dead latents are resampled.
        unit_norm_decoder: whether decoder rows are held at unit norm.
    """

    d_sae: int
    controls_l0: bool
    target_l0: float
    target_l0_start_ratio: float
    target_l0_warm_up_steps: int
    jumprelu_bandwidth: float
    jumprelu_bandwidth_std: float
    jumprelu_init_threshold: float
    jumprelu_ste_input_share: float
    ste_input_share_is_given: bool
    max_latent_density: float
    resample_dead_latents: bool
    unit_norm_decoder: bool


class DictionaryControl:
    """Holds one dictionary's L0, latent densities and decoder norms while it trains.

    Args:
        settings: what to hold.
        keep_firing_record: also where no latent is resampled.
        index, of: which of how many dictionaries that train together. Resampling then draws other
            tokens for each.
        processes: that hold the dictionary, and what is kept of its latents, and split its batches.

    Attributes:
        bandwidth: ε; None before calibration.
        ste_input_share: of the estimators' gradient, what the encoder receives; kept on resuming.
        batch_l0: mean L0 of the last batch observed.
        batch_firings: on how many of its tokens each latent was active, [d_sae], where several
            processes split it.
        l0: the L0 controller, where `settings.controls_l0`.
        density: the multipliers of the density limit, where there is one.
        firing: how long each latent has not fired, where that is kept.
    """

    def __init__(
        self,
        settings: ControlSettings,
        *,
        keep_firing_record: bool = False,
        index: int = 0,
        of: int = 1,
        processes: OneProcess = ONE_PROCESS,
    ):
        self.settings, self.processes = settings, processes
        held = processes.held(settings.d_sae)
        self.bandwidth: float | None = settings.jumprelu_bandwidth or None
        self.ste_input_share = settings.jumprelu_ste_input_share
        self.batch_l0 = 0.0
        self.batch_firings: Int[Tensor, " d_sae"] | None = None
        self.l0 = (
            L0Controller(
                settings.target_l0,
                settings.target_l0_start_ratio,
                settings.target_l0_warm_up_steps,
            )
            if settings.controls_l0
            else None
        )
        limit = settings.max_latent_density
        self.density = DensityMultipliers(held, limit) if limit < 1 else None
        keeps_firing = settings.resample_dead_latents or keep_firing_record
        self.firing = FiringRecord(held) if keeps_firing else None
        self._index, self._of, self._batch = index, of, 1
        self._l0_slope: Tensor | None = None
        self._resampling_batch: tuple[Tensor, Tensor] | None = None

    # ---------------------------------------------------------------- the first batch

    def start_l0(self) -> float:
        """The L0 that calibration gives the first batch."""
        return START_SHARE * self.settings.d_sae if self.l0 is None else self.l0.current_target()

    @torch.no_grad()
    def calibrate(
        self, dictionary: Any, z: Float[Tensor, "batch d_sae"], *, keep_thresholds: bool = False
    ) -> None:
        """Set thresholds and bandwidth from one batch's pre-activations, where they are not given.

        Args:
            keep_thresholds: leave the thresholds as they are: the dictionary was loaded.

        Raises:
            ValueError: the pre-activations are not finite, or all the same.
        """
        found = calibrate(
            z,
            self.start_l0() * z.shape[1] / self.settings.d_sae,
            self.settings.jumprelu_bandwidth_std,
            self.processes,
        )
        if not self.settings.jumprelu_init_threshold and not keep_thresholds:
            set_value(dictionary, "threshold", found.threshold)
        if self.bandwidth is None:
            self.bandwidth = found.bandwidth

    # ---------------------------------------------------------------- in a step

    @property
    def multiplier(self) -> float | Tensor:
        """What the sparsity coefficient of the schedule is multiplied by."""
        return 1.0 if self.l0 is None else self.l0.coefficient

    def density_multipliers(self, device: torch.device) -> Float[Tensor, " d_sae"] | None:
        """The multipliers of the density limit, or None without one."""
        return None if self.density is None else self.density.multipliers.to(device)

    def take_active(self, active: float, batch: int) -> None:
        """Measure the L0 of a batch of so many tokens, from its active pairs, on all processes."""
        self._batch, self.batch_l0 = batch, active / batch

    def observe(
        self,
        step: Step,
        sparsity: Term,
        penalty: Float[Tensor, ""],
        coefficient: float | Tensor,
        feature_acts: Float[Tensor, "batch d_sae"],
        loss: Float[Tensor, ""] | None = None,
    ) -> None:
        """Measure what the controls need of a step that will be followed by a backward pass.

        Args:
            sparsity, penalty: the sparsity term, and its value at `step`.
            coefficient: what the penalty is multiplied by in the loss.
            feature_acts: of the batch, dense or sparse COO of the active ones.
            loss: what `backward` is called on, where a user may scale it before.
        """
        self._l0_slope = None
        if self.l0 is not None and step.threshold.requires_grad:
            self._measure_slopes(self.l0, step, sparsity, penalty, coefficient, loss)
        firings = self.batch_firings = self.processes.firings_of_batch(feature_acts)
        if self.density is not None and firings is None:
            self.density.update(feature_acts)
        elif self.density is not None and firings is not None:
            self.density.update_from(firings, self._batch)
        if self.firing is not None:
            self.firing.update(feature_acts if firings is None else firings[None])
        self._resampling_batch = None

    def _measure_slopes(
        self,
        controller: L0Controller,
        step: Step,
        sparsity: Term,
        penalty: Tensor,
        coefficient: float | Tensor,
        loss: Tensor | None,
    ) -> None:
        """The slopes of L0 and penalty now, the loss's when the thresholds' gradient arrives."""
        own = threshold_slopes(sparsity, step, penalty)
        penalty_slope = torch.zeros_like(own.penalty)
        scale: list[Tensor] = []  # the loss's own gradient: not 1 where a user scales the loss
        if loss is not None:
            loss.register_hook(scale.append)

        def take_l0_slope(total: Tensor) -> None:
            self._l0_slope = total

        def take_penalty_slope(total: Tensor) -> None:
            penalty_slope.copy_(total)

        def update(total: Tensor) -> None:
            controller.update_multiplier(total - coefficient * penalty_slope, penalty_slope)

        def sum_gradient(gradient: Tensor) -> None:
            total = gradient.sum() / (scale[-1].to(gradient) if scale else 1.0)
            self.processes.after_backward(total, update)

        self.processes.after_backward(own.l0, take_l0_slope)
        self.processes.after_backward(own.penalty, take_penalty_slope)
        step.threshold.register_hook(sum_gradient)

    def resampling_is_due(self) -> bool:
        """Whether this step's batch is wanted for resampling; see `keep_for_resampling`."""
        return (
            self.settings.resample_dead_latents
            and self.firing is not None
            and self.firing.due(self.patience())
        )

    def keep_for_resampling(
        self, inputs: Float[Tensor, "batch d_in"], residual: Float[Tensor, "batch d_out"]
    ) -> None:
        """Keep what the encoder read and what the dictionary left until after the update."""
        of_batch = self.processes.gather_tokens
        self._resampling_batch = of_batch(inputs.detach()), of_batch(residual.detach())

    def patience(self) -> int:
        """Steps without firing after which a new latent counts as dead."""
        return patience(self.settings.d_sae, self._usual_l0(), self._batch)

    def _usual_l0(self) -> float:
        return self.settings.target_l0 or max(1.0, self.batch_l0)

    # ---------------------------------------------------------------- after the update

    @torch.no_grad()
    def after_update(
        self,
        dictionary: Any,
        optimizer: torch.optim.Optimizer | None,
        directions: EncoderDirections,
        *,
        by_kernels: bool = False,
    ) -> None:
        """Bring the dictionary back to its constraints after a step of its optimizer.

        Args:
            directions: see `resampling.EncoderDirections`.
            by_kernels: use the kernels of `step.kernels.rows`.
        """
        if self.settings.unit_norm_decoder and dictionary.W_dec.requires_grad:
            normalize_rows_(dictionary.W_dec.data, by_kernels)
        if self.l0 is not None and self._l0_slope is not None:
            assert self.bandwidth is not None
            if optimizer is not None:
                self.l0.follow(max(group["lr"] for group in optimizer.param_groups))
            shift = self.l0.shift(self.batch_l0, self._l0_slope, self.bandwidth)
            # At most halved, so that a logarithm stays finite.
            moved = torch.maximum(dictionary.threshold + shift, 0.5 * dictionary.threshold)
            set_value(dictionary, "threshold", moved)
            self._l0_slope = None
        # Also after the last step: below 0, an active latent could be negative.
        keep_thresholds_positive_(dictionary)
        if self.settings.resample_dead_latents:
            self._resample(dictionary, optimizer, directions)

    def _resample(
        self,
        dictionary: Any,
        optimizer: torch.optim.Optimizer | None,
        directions: EncoderDirections,
    ) -> None:
        firing = self.firing
        if firing is None or optimizer is None or not firing.may_resample(optimizer):
            return
        if self._resampling_batch is None:
            return
        inputs, residual = self._resampling_batch
        self._resampling_batch = None
        seed = firing.steps * self._of + self._index
        resample_dead_(
            dictionary,
            firing,
            self.patience(),
            inputs,
            residual,
            directions,
            optimizer,
            seed,
            mean_density=self._usual_l0() / self.settings.d_sae,
            processes=self.processes,
        )

    def dead(self) -> Bool[Tensor, " d_sae"]:
        """Latents that have not fired for so long that they count as dead.

        Raises:
            ValueError: no firing record is kept.
        """
        if self.firing is None:
            raise ValueError("this control keeps no firing record")
        return self.firing.dead(self.patience())

    # ---------------------------------------------------------------- copies and checkpoints

    def disable_feedback(self) -> None:
        """Control nothing from now on: for a copy that is only measured."""
        self.l0 = self.firing = None

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside `tensors`, in JSON's types."""
        return {
            "bandwidth": self.bandwidth,
            "batch_l0": self.batch_l0,
            "ste_input_share": self.ste_input_share,
            "l0": None if self.l0 is None else self.l0.state(),
            "firing": None if self.firing is None else self.firing.state(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The firing record's tensors and the density multipliers, by name."""
        return {
            **({} if self.firing is None else self.firing.tensors()),
            **({} if self.density is None else self.density.tensors()),
        }

    def load_state(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` and `tensors` gave; what is not controlled here is left.

        Raises:
            ValueError: they have another form.
        """
        state = checked_control_state(state, self.state())
        if state["firing"] is None:
            expected = {} if self.density is None else self.density.tensors()
        else:
            expected = self.tensors()
        require_same_shapes(tensors, expected)
        self.bandwidth, self.batch_l0 = state["bandwidth"], state["batch_l0"]
        if not self.settings.ste_input_share_is_given:
            self.ste_input_share = state["ste_input_share"]
        if self.l0 is not None and state["l0"] is not None:
            self.l0.load_state(state["l0"])
        if self.firing is not None and state["firing"] is not None:
            self.firing.load_state(state["firing"], tensors)
        if self.density is not None:
            self.density.load(tensors)


@torch.no_grad()
def keep_thresholds_positive_(dictionary: Any) -> None:
    """In place, raise negative thresholds to 0.

    On the stored value, not in the graph: a clamp in the graph would zero the gradient of a latent
    that reached 0 and pin it there. A logarithm needs none.
    """
    if not isinstance(parametrized(dictionary, "threshold"), LogParameter):
        stored(dictionary, "threshold").data.clamp_(min=0.0)
