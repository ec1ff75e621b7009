"""The training SAE behind `architecture="jumprelu"`.

A subclass of SAELens' own: same parameters, same state dict, same config, and with a stock config
the same losses and gradients. It computes them through `step/`, leaves what happens between two
steps to its `control.DictionaryControl`, and is saved as a stock `jumprelu` folder.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from jumprelu_plugin.control.decoder_norm import keep_gradient_tangential, normalize_rows_
from jumprelu_plugin.control.dictionary_control import (
    DictionaryControl,
    keep_thresholds_positive_,
)
from jumprelu_plugin.control.finite import FiniteCheck, LastCheck
from jumprelu_plugin.control.optimizer_hooks import OptimizerHooks
from jumprelu_plugin.control.units import units_of
from jumprelu_plugin.saes.config import JumpReLUTrainingSAEConfig, StockConfig, as_plugin_config
from jumprelu_plugin.saes.first_batch import full_precision, start_from, target_center
from jumprelu_plugin.saes.losses import (
    decoder_target,
    loss_terms,
    over_batch,
    sparsity_of,
    token_weights,
)
from jumprelu_plugin.saes.own_loops import (
    refuse_uncalled_overrides,
    require_rows,
    trained_parameter,
)
from jumprelu_plugin.saes.storage import StoredParameters, by_latent
from jumprelu_plugin.saes.validation import EFFECT_RULES, SAE_RULES, require
from jumprelu_plugin.step.choose import PathChoice
from jumprelu_plugin.step.counting import PairCount
from jumprelu_plugin.step.dense import DenseEntries
from jumprelu_plugin.step.encoding import encode
from jumprelu_plugin.step.entries import BufferOverflow, Entries
from jumprelu_plugin.step.kernels.buffers import PairBuffers
from jumprelu_plugin.step.losses import Step
from jumprelu_plugin.step.processes import ONE_PROCESS, OneProcess

# Of a step that is not finite.
_REMEDIES = {
    "input_remedy": "run the model in float32 or bfloat16, or exclude the tokens that overflow",
    "remedy": "lower lr (or l0_coefficient)",
}


class JumpReLUTrainingSAE(StoredParameters):
    """A JumpReLU SAE in training (arXiv 2407.14435).

    Shapes: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in], threshold
    [d_sae] (float32 at least, whatever the SAE's dtype; never negative).

    Attributes:
        resolved: what the config's optional fields resolve to; all that training reads of them.
        control: what is kept between two steps.
        sparsity: the sparsity term.
        path_choice: which way of computing a step is taken.
        pair_buffers: the size of its buffers, where that is the way of the kernels.
        finite_check: whether the last step was finite, read on a GPU before its update.
        processes: that hold the dictionary and split its batches; where they are several, `cfg` and
            the shapes are of this one's latents, and `resolved` is of the whole dictionary.

    Raises:
        ValueError: on construction, if the config cannot train; on a step, if the activations or
            the parameters are NaN or infinite.
    """

    cfg: JumpReLUTrainingSAEConfig  # type: ignore[assignment]
    rules = SAE_RULES
    # Or whoever scales its rows does.
    standardizes_itself: ClassVar[bool] = True
    processes: OneProcess = ONE_PROCESS

    def __init__(self, cfg: StockConfig, use_error_term: bool = False):
        refuse_uncalled_overrides(type(self))
        cfg = as_plugin_config(cfg)
        require(cfg, self.rules)
        if not cfg.is_stock:
            require(cfg, EFFECT_RULES)
        self.resolved = cfg.resolve()
        self.control = DictionaryControl(self.resolved, processes=self.processes)
        self.units = units_of(cfg.hyperparameter_units, cfg.d_in)
        threshold = self.resolved.jumprelu_init_threshold or self.units.activation
        held = cfg
        if (latents := self.processes.held(cfg.d_sae)) != cfg.d_sae:
            held = dataclasses.replace(cfg, d_sae=latents)
        super().__init__(
            dataclasses.replace(held, jumprelu_init_threshold=threshold),  # type: ignore[arg-type]
            use_error_term,
        )
        self.cfg = held
        cfg.add_training_info_to_metadata()
        self.sparsity = sparsity_of(cfg, self.resolved)
        self.path_choice = PathChoice(cfg.step_kernel)
        self.pair_buffers = PairBuffers()
        self.finite_check = LastCheck()
        standardizes = self.standardizes_itself and self.resolved.standardize_activations
        known = self.resolved.jumprelu_init_threshold and self.resolved.jumprelu_bandwidth
        self.calibrated = bool(known) and cfg.initialization == "saelens" and not standardizes
        self.store_in_units(
            self.units.activation, standardizes=standardizes, log_threshold=cfg.log_threshold
        )

    @property
    def bandwidth(self) -> float | None:
        """ε, where SAELens' code looks for it; None before calibration."""
        return self.control.bandwidth

    @bandwidth.setter
    def bandwidth(self, value: float) -> None:
        pass  # SAELens sets the config's number, which may be in other units than training

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        if self.cfg.initialization == "anthropic":
            nn.init.uniform_(self.W_dec.data, -(self.cfg.d_in**-0.5), self.cfg.d_in**-0.5)
        if self.resolved.unit_norm_decoder:
            normalize_rows_(self.W_dec.data)
            self.W_enc.data = self.W_dec.data.t().clone()
        if self.cfg.initialization == "anthropic":
            self.W_enc.data = self.cfg.d_in / self.resolved.d_sae * self.W_dec.data.t()
        self.W_enc.data = by_latent(self.W_enc.data)

    # ---------------------------------------------------------------- one step

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self._begin_step(step_input.sae_in)
        # The estimators need θ, ε and z in full precision: at small ε, bfloat16 puts most of the
        # window on one side or the other. Autocast is therefore switched off inside the step.
        with torch.autocast(step_input.sae_in.device.type, enabled=False):
            try:
                return self._step(step_input)
            except BufferOverflow:  # nothing was kept of the step, and the buffers have grown
                return self._step(step_input)

    def input_and_target(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What a batch's rows hold: here the input, which is also the target."""
        return rows, rows

    def decoder_offset(self, x: Tensor, b_dec: Tensor) -> Tensor:
        """What the output holds besides the decoded latents, given the normalized input."""
        return b_dec

    def normalized_input(self, sae_in: Tensor) -> Tensor:
        """`process_sae_in` up to the subtraction of b_dec, which belongs to the step."""
        x = self.hook_sae_input(self.reshape_fn_in(sae_in.to(self.dtype)))
        require_rows(x, sae_in, self.cfg.d_in)
        return self.run_time_activation_norm_fn_in(x)

    def _step(self, step_input: TrainStepInput) -> TrainStepOutput:
        resolved, control = self.resolved, self.control
        sae_in, target = self.input_and_target(step_input.sae_in)
        x = full_precision(self.normalized_input(sae_in))
        target = target.to(x.dtype)
        W_dec, b_dec = full_precision(self.W_dec), full_precision(self.b_dec)
        # A node of its own in the graph, so that the gradient of θ can be hooked.
        threshold = self.threshold.view(-1)
        bandwidth, to_input = control.bandwidth, control.ste_input_share
        assert bandwidth is not None  # set by the first step at the latest

        entries = self._encode(x, b_dec, threshold, bandwidth)
        activations = entries.activations(threshold, bandwidth, to_input)
        if isinstance(entries, DenseEntries):
            activations = self.hook_sae_acts_post(activations)
        active = activations > 0
        count = PairCount([entries], [active], self.processes)
        offset = self.decoder_offset(x, b_dec)
        weights = token_weights(resolved, target, target_center(self), self.processes)
        prefix_errors = None
        if widths := resolved.matryoshka_widths:
            wanted, scale = decoder_target(self, target)
            scale = scale if weights is None else scale * weights
            decoded, prefix_errors = self.decode_prefixes(
                entries, activations, W_dec, offset, wanted, scale, widths
            )
        else:
            decoded = self.processes.sum_over_shards(entries.decode(activations, W_dec))
            decoded = decoded.add_(offset)
        x_hat = self.run_time_activation_norm_fn_out(self.hook_sae_recons(decoded))
        x_hat = self.reshape_fn_out(x_hat, self.d_head)

        step = Step(
            entries,
            activations,
            threshold,
            bandwidth,
            to_input,
            W_dec,
            dead=step_input.dead_neuron_mask,
            density_multipliers=control.density_multipliers(x.device),
            processes=self.processes,
        )
        coefficient = step_input.coefficients["l0"] * self.units.loss * control.multiplier
        penalty = self.sparsity(step)
        losses = loss_terms(
            resolved,
            step,
            x_hat=x_hat,
            target=target,
            weights=weights,
            prefix_errors=prefix_errors,
            sparsity=coefficient * penalty,
            pre_act_latents=self.cfg.pre_act_loss_latents,
        )
        if self.units.loss != 1.0:
            losses = {name: value / self.units.loss for name, value in losses.items()}
        losses = over_batch(losses, self.processes)
        loss = torch.stack(list(losses.values())).sum()
        (active_pairs,) = count.finish()
        self._require_finite(loss, step_input.sae_in, step_input.n_training_steps)
        feature_acts = entries.as_matrix(activations, where=active)
        control.take_active(active_pairs, len(feature_acts) * self.processes.replicas)
        if self.training and loss.requires_grad:
            paid = coefficient / self.units.loss
            control.observe(step, self.sparsity, penalty, paid, feature_acts, loss)
            if control.resampling_is_due():
                residual = (target - x_hat).detach().flatten(1)
                if weights is not None:
                    residual *= weights.sqrt()[:, None]
                read = x - b_dec if self.cfg.apply_b_dec_to_input else x
                control.keep_for_resampling(read, residual)
        return TrainStepOutput(
            sae_in=target,
            sae_out=x_hat,
            feature_acts=feature_acts,
            hidden_pre=entries.as_matrix(entries.z),
            loss=loss,
            losses=losses,
            metrics={"measured_l0_coefficient": coefficient} if control.l0 else {},
        )

    def decode_prefixes(
        self, entries: Entries, *arguments: Any
    ) -> tuple[Float[Tensor, "batch d_out"], Float[Tensor, " prefixes"]]:
        """`Entries.decode_prefixes` of the whole dictionary."""
        return entries.decode_prefixes(*arguments)

    def _encode(
        self,
        x: Float[Tensor, "batch d_in"],
        b_dec: Tensor,
        threshold: Tensor,
        bandwidth: float,
    ) -> Entries:
        W_enc, b_enc = full_precision(self.W_enc), full_precision(self.b_enc)
        b_pre = b_dec if self.cfg.apply_b_dec_to_input else None
        path = self.path_choice.start(x.device, (len(x), W_enc.shape[0], W_enc.shape[1]))
        points = (self.hook_sae_acts_pre, self.hook_sae_acts_post)
        hooked = any(len(p._forward_hooks) or len(p._backward_hooks) for p in points)
        # A user's hook on the pre-activations or activations gets all of them: dense.
        entries = encode(
            "dense" if hooked else path,
            x,
            W_enc,
            b_enc,
            b_pre,
            threshold,
            bandwidth,
            self.pair_buffers,
            keep_mean=self.resolved.pre_act_loss_coefficient > 0,
        )
        if isinstance(entries, DenseEntries):
            entries.z = self.hook_sae_acts_pre(entries.z)
        return entries

    def _require_finite(self, loss: Tensor, rows: Tensor, step: int) -> None:
        """Refuse a step that is not finite: at once, or on a GPU before it updates anything."""
        hook = self.cfg.metadata.hook_name or "the activation source"
        check = FiniteCheck(loss, [self], {hook: rows}, step, **_REMEDIES)
        self.finite_check.begin(check, later=loss.is_cuda and self.training and loss.requires_grad)

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        warm_up = 0 if self.control.l0 else self.cfg.l0_warm_up_steps
        return {"l0": TrainCoefficientConfig(self.resolved.l0_coefficient, warm_up)}

    # ---------------------------------------------------------------- around the step

    def _begin_step(self, rows: Tensor) -> None:
        self.finite_check.finish()  # of a step that was followed by no update
        if self.optimizer_hooks is not None:
            self.optimizer_hooks.restore_layout()
        elif self.training:
            owned = trained_parameter(self, self.W_dec)
            self.optimizer_hooks = OptimizerHooks(owned, self._before_update, self._after_update)
            if self.resolved.unit_norm_decoder and self.W_dec.requires_grad:
                choice = self.path_choice
                keep_gradient_tangential(self.W_dec, lambda: choice.current == "triton")
        self.calibrate_if_needed(rows)
        keep_thresholds_positive_(self)

    @torch.no_grad()
    def calibrate_if_needed(self, rows: Float[Tensor, "batch width"]) -> None:
        """Set what the config leaves to the data, from a batch as a training step takes it."""
        if not self.calibrated:
            self.calibrate(rows)
            self.calibrated = True

    def calibrate(self, rows: Float[Tensor, "batch width"]) -> None:
        """Set biases, thresholds and bandwidth from a batch, where they are not given or loaded."""
        source, _ = self.input_and_target(rows)
        sample = full_precision(self.normalized_input(source))
        if not torch.isfinite(sample).all():
            with torch.no_grad():
                self._require_finite(sample.sum() * torch.nan, source, 0)
        start_from(self, sample)

    def _before_update(self) -> None:
        self.finite_check.finish()
        self.path_choice.finish(self.control.batch_l0 / self.resolved.d_sae)

    def _after_update(self) -> None:
        assert self.optimizer_hooks is not None
        self.control.after_update(
            self,
            self.optimizer_hooks.optimizer,
            self.resampling_directions,
            by_kernels=self.path_choice.current == "triton",
        )

    def resampling_directions(
        self, x: Tensor, residual: Tensor, tokens: Tensor
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " d_in"]]:
        """Encoders of resampled latents, and the input that gives them z = 0."""
        center = torch.zeros_like(x[0]) if self.cfg.apply_b_dec_to_input else x.mean(0)
        encoders = residual[tokens]
        if self.whitening is not None:
            whitening = self.whitening.to(encoders)
            encoders = encoders @ whitening @ whitening
        return encoders, center

    # ---------------------------------------------------------------- inference

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.bandwidth is None:  # before the first step: the value does not matter to inference
            x_in = self.process_sae_in(x)
            hidden_pre = self.hook_sae_acts_pre(x_in @ self.W_enc + self.b_enc)
            active = hidden_pre > self.threshold.to(hidden_pre.dtype)
            return self.hook_sae_acts_post(hidden_pre * active), hidden_pre
        return super().encode_with_hidden_pre(x)
