"""The training SAE behind `architecture="jumprelu"`.

A subclass of SAELens' own: same parameters, same state dict, same config, and with a stock config
the same losses and gradients. It computes them through `step/`, keeps the decoder constraint and
the L0 control of `training/`, and is saved as a stock `jumprelu` folder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from sae_lens import JumpReLUTrainingSAE as StockTrainingSAE
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from jumprelu_plugin.control.calibration import calibrate, raise_to_fire
from jumprelu_plugin.control.decoder_norm import normalize_rows_, remove_parallel_gradient_
from jumprelu_plugin.control.density import DensityMultipliers
from jumprelu_plugin.control.l0 import L0Controller
from jumprelu_plugin.control.optimizer_hooks import OptimizerHooks
from jumprelu_plugin.control.resampling import FiringRecord, patience, resample_dead_
from jumprelu_plugin.control.units import (
    LogParameter,
    ScaledParameter,
    parametrized,
    set_value,
    stored,
    units,
)
from jumprelu_plugin.saes import checkpoint
from jumprelu_plugin.saes.config import (
    JumpReLUTrainingSAEConfig,
    StockConfig,
    check,
    with_our_fields,
)
from jumprelu_plugin.step.choose import PathChoice
from jumprelu_plugin.step.dense import DenseEntries, encode_dense
from jumprelu_plugin.step.entries import Entries
from jumprelu_plugin.step.estimators import jumprelu
from jumprelu_plugin.step.losses import (
    AuxiliaryLoss,
    PreActivationLoss,
    Step,
    outlier_token_weights,
    reconstruction,
    sparsity_term,
    threshold_slopes,
)
from jumprelu_plugin.step.sparse import encode_sparse

# Anthropic, Circuits Updates January 2025: each latent starts by firing on 10,000/d_sae of tokens.
UNIFORM_START_L0 = 10_000


class JumpReLUTrainingSAE(StockTrainingSAE):
    """A JumpReLU SAE in training (arXiv 2407.14435).

    Shapes: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in], threshold
    [d_sae] (float32 whatever the SAE's dtype, never negative).

    Raises:
        ValueError: on construction, if the config cannot train; on a step, if the activations or
            the parameters are NaN or infinite.
    """

    cfg: JumpReLUTrainingSAEConfig  # type: ignore[assignment]

    def __init__(self, cfg: StockConfig, use_error_term: bool = False):
        cfg = with_our_fields(cfg)
        check(cfg)
        self.units = units(cfg.units, cfg.d_in)
        start = cfg.jumprelu_init_threshold
        threshold = self.units.activation * (1.0 if start is None else start)
        super().__init__(
            dataclasses.replace(cfg, jumprelu_init_threshold=threshold),  # type: ignore[arg-type]
            use_error_term,
        )
        self.cfg = cfg
        cfg.add_training_info_to_metadata()
        self.bandwidth = (
            None
            if cfg.jumprelu_bandwidth is None
            else self.units.activation * cfg.jumprelu_bandwidth
        )
        self.sparsity = sparsity_term(
            cfg.jumprelu_sparsity_loss_mode,
            target_l0=_quadratic_centre(cfg),
            tanh_scale=cfg.jumprelu_tanh_scale,
            density_penalty_scale=cfg.density_penalty_scale,
            max_latent_density=cfg.ceiling,
        )
        self.controller = (
            L0Controller(cfg.target_l0, cfg.target_l0_start_ratio, cfg.target_l0_warm_up_steps)
            if cfg.controls_l0 and cfg.target_l0 is not None
            else None
        )
        self._prices = None if cfg.ceiling is None else DensityMultipliers(cfg.d_sae, cfg.ceiling)
        known = start is not None and cfg.jumprelu_bandwidth is not None
        self._calibrated = known and cfg.initialization == "saelens"
        self._has_loaded_weights = False
        self._seam: OptimizerHooks | None = None
        self._path = PathChoice(cfg.step_kernel)
        self._density = 1.0
        self._measured: tuple[float, Tensor] | None = None  # L0 and its slope, of this step
        self._firing = FiringRecord(cfg.d_sae) if cfg.resamples_dead_latents else None
        self._latest: tuple[Tensor, Tensor] | None = None  # encoder input and residual
        self._parametrize()

    # ---------------------------------------------------------------- parameters

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        if self.cfg.initialization == "uniform":
            nn.init.uniform_(self.W_dec.data, -(self.cfg.d_in**-0.5), self.cfg.d_in**-0.5)
        if self.cfg.unit_norm_decoder:
            normalize_rows_(self.W_dec.data)
            self.W_enc.data = self.W_dec.data.t().clone()
        if self.cfg.initialization == "uniform":
            self.W_enc.data = self.cfg.d_in / self.cfg.d_sae * self.W_dec.data.t()
        self._lay_out_encoder()

    def _lay_out_encoder(self) -> None:
        # Stored by latent: the fast step computes its gradient by latent ([d_sae, d_in]), and a
        # parameter stored the same way takes it without a transposing copy.
        self.W_enc.data = _by_latent(self.W_enc.data)

    def _parametrize(self) -> None:
        """Let the optimiser see parameters in the recipe's units; see `control.units`."""
        scale = self.units.activation
        if self.cfg.threshold_parameter == "log":
            parametrize.register_parametrization(self, "threshold", LogParameter(scale))
        elif scale != 1.0:
            parametrize.register_parametrization(self, "threshold", ScaledParameter(scale))
        if scale != 1.0:
            for name in ("b_enc", "b_dec"):
                parametrize.register_parametrization(self, name, ScaledParameter(scale))

    def _parametrized(self) -> list[str]:
        names = ("threshold", "b_enc", "b_dec")
        return [name for name in names if parametrized(self, name) is not None]

    def _store_plainly(self) -> None:
        """Replace parametrized parameters by plain ones: for folding, when training is over."""
        for name in self._parametrized():
            parametrize.remove_parametrizations(self, name, leave_parametrized=True)

    @override
    def _apply(self, *args: Any, **kwargs: Any) -> JumpReLUTrainingSAE:
        out = super()._apply(*args, **kwargs)
        if parametrized(self, "threshold") is not None:
            threshold = stored(self, "threshold")
            threshold.data = threshold.data.float()
        return out  # type: ignore[return-value]

    # ---------------------------------------------------------------- one step

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x = step_input.sae_in
        self._before_first_step(x)
        self._keep_threshold_positive()
        # The estimators need θ, ε and z in full precision: at small ε, bfloat16 puts most of the
        # window on one side or the other. Autocast is therefore switched off inside the step.
        with torch.autocast(x.device.type, enabled=False):
            return self._step(x, step_input)

    def _input_and_target(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What a batch's rows hold: here the input, which is also what is reconstructed."""
        return rows, rows

    def _decoder_offset(self, x: Tensor, b_dec: Tensor) -> Tensor:
        """What the output holds besides the decoded latents, given the normalised input."""
        return b_dec

    def _step(self, rows: Tensor, step_input: TrainStepInput) -> TrainStepOutput:
        sae_in, target = self._input_and_target(rows)
        W_enc, b_enc, W_dec, b_dec = map(
            _full_precision, (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        )
        # A node of its own in the graph, so that the gradient of θ can be listened to.
        threshold, bandwidth = self.threshold.view(-1), self.bandwidth
        assert bandwidth is not None  # set by the first step at the latest
        to_input = self.cfg.jumprelu_ste_to_input

        x = _full_precision(self._normalized_input(sae_in))
        b_pre = b_dec if self.cfg.apply_b_dec_to_input else None
        entries = self._encode(x, W_enc, b_enc, b_pre, threshold, bandwidth)
        theta = entries.per_latent(threshold)
        activations = jumprelu(entries.z, theta, bandwidth, to_input)
        if isinstance(entries, DenseEntries):
            activations = self.hook_sae_acts_post(activations)
        offset = self._decoder_offset(x, b_dec)
        target = _full_precision(target)
        limit = self.cfg.outlier_norm_limit
        worth = None if limit is None else outlier_token_weights(target, limit)
        inner = None
        if widths := self.cfg.prefix_widths:
            sought, unit = self._as_decoded(target)
            unit = unit if worth is None else unit * worth
            decoded, inner = entries.decode_prefixes(
                activations, W_dec, offset, sought, unit, widths
            )
        else:
            decoded = entries.decode(activations, W_dec).add_(offset)
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
            density_multipliers=None if self._prices is None else self._prices.prices.to(x.device),
        )
        coefficient = self._coefficient(step_input)
        penalty = self.sparsity(step)
        losses = self._losses(step, x_hat, inner, target, worth, coefficient * penalty)
        feature_acts = entries.as_matrix(activations, where=activations > 0)
        l0 = self._measure_l0(feature_acts)
        loss = torch.stack(list(losses.values())).sum()
        self._refuse_non_finite(loss, rows, step_input.n_training_steps)
        if self.training and loss.requires_grad:
            self._steer(step, penalty, coefficient, l0)
            if self._prices is not None:
                self._prices.update(feature_acts)
            self._watch_firing(feature_acts, x, target, x_hat, worth)
        return TrainStepOutput(
            sae_in=target,
            sae_out=x_hat,
            feature_acts=feature_acts,
            hidden_pre=entries.as_matrix(entries.z),
            loss=loss,
            losses=losses,
            metrics={"steered_l0_coefficient": coefficient} if self.controller else {},
        )

    def _as_decoded(
        self, target: Tensor
    ) -> tuple[Float[Tensor, "batch d_out"], Float[Tensor, " batch"]]:
        """The target where the decoder is to meet it, before input normalisation is undone; and
        what a squared error there is worth in the target's own units, for each token."""
        flat = target.flatten(1)
        match self.cfg.normalize_activations:
            case "layer_norm":
                mean, std = cast("Tensor", self.ln_mu), cast("Tensor", self.ln_std)
                scale = std.clamp_min(torch.finfo(flat.dtype).tiny)  # a constant token's std is 0
                return (flat - mean) / scale, scale.flatten().square()
            case "constant_norm_rescale":
                factor = cast("Tensor", self.x_norm_coeff)
                return flat * factor, factor.flatten().pow(-2)
        return flat, flat.new_ones(len(flat))

    def _losses(
        self,
        step: Step,
        x_hat: Tensor,
        inner: Tensor | None,
        target: Tensor,
        worth: Tensor | None,
        sparsity: Tensor,
    ) -> dict[str, Tensor]:
        cfg = self.cfg
        losses = {"mse_loss": reconstruction(x_hat, target, worth), "l0_loss": sparsity}
        if inner is not None:
            # Weights that sum to 1: λ keeps the meaning it has without nested dictionaries.
            whole = 1 / (1 + cfg.prefix_loss_weight)
            share = whole * cfg.prefix_loss_weight / len(inner)
            losses["mse_loss"] = whole * losses["mse_loss"]
            for width, error in zip(cfg.prefix_widths, inner.unbind(), strict=True):
                losses[f"inner_mse_loss_{width}"] = share * error
        if cfg.pre_act_loss_coefficient is not None:
            pre_act = PreActivationLoss(cfg.pre_act_loss_latents)(step)
            losses["pre_act_loss"] = cfg.pre_act_loss_coefficient * pre_act
        if cfg.aux_loss_coefficient is not None:
            auxiliary = AuxiliaryLoss()(step, (target - x_hat).flatten(1))
            losses["auxiliary_reconstruction_loss"] = cfg.aux_loss_coefficient * auxiliary
        if self.units.loss != 1.0:
            losses = {name: loss / self.units.loss for name, loss in losses.items()}
        return losses

    def _coefficient(self, step_input: TrainStepInput) -> float | Tensor:
        scheduled = step_input.coefficients["l0"] * self.units.loss
        return scheduled * (1.0 if self.controller is None else self.controller.coefficient)

    def _steer(self, step: Step, penalty: Tensor, coefficient: float | Tensor, l0: float) -> None:
        """Measure what the controller needs: slopes now, the price when θ's gradient arrives."""
        controller = self.controller
        if controller is None or not step.threshold.requires_grad:
            return
        slopes = threshold_slopes(self.sparsity, step, penalty)
        self._measured = l0, slopes.l0
        paid = coefficient / self.units.loss * slopes.penalty

        def price(gradient: Tensor) -> None:
            controller.price(gradient.sum() - paid, slopes.penalty)

        step.threshold.register_hook(price)

    def _watch_firing(
        self,
        feature_acts: Tensor,
        x: Tensor,
        target: Tensor,
        x_hat: Tensor,
        worth: Tensor | None,
    ) -> None:
        firing = self._firing
        if firing is None:
            return
        firing.update(feature_acts)
        self._latest = None
        if firing.due(self._patience(len(x))):
            residual = (target - x_hat).detach().flatten(1)
            if worth is not None:
                residual *= worth.sqrt()[:, None]
            self._latest = x.detach(), residual

    def _patience(self, batch: int) -> int:
        mean_l0 = max(1.0, self._density * self.cfg.d_sae)
        return patience(self.cfg.d_sae, self.cfg.target_l0 or mean_l0, batch)

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        if self.controller is not None:
            # The controller is the schedule: 1 is what it multiplies.
            return {"l0": TrainCoefficientConfig(value=1.0, warm_up_steps=0)}
        return super().get_coefficients()

    def _encode(
        self,
        x: Float[Tensor, "batch d_in"],
        W_enc: Tensor,
        b_enc: Tensor,
        b_pre: Tensor | None,
        threshold: Tensor,
        bandwidth: float,
    ) -> Entries:
        path = self._path.start(x.device, (len(x), W_enc.shape[0], W_enc.shape[1]))
        # A user's hook on the pre-activations or activations sees all of them: dense.
        if path == "dense" or self._is_watched():
            entries = encode_dense(x, W_enc, b_enc, b_pre)
            entries.z = self.hook_sae_acts_pre(entries.z)
            return entries
        return encode_sparse(
            x,
            W_enc,
            b_enc,
            b_pre,
            threshold,
            bandwidth,
            screen=path == "screened",
            keep_mean=self.cfg.pre_act_loss_coefficient is not None,
        )

    def _is_watched(self) -> bool:
        points = (self.hook_sae_acts_pre, self.hook_sae_acts_post)
        return any(len(p._forward_hooks) or len(p._backward_hooks) for p in points)

    def _normalized_input(self, sae_in: Tensor) -> Tensor:
        """`process_sae_in` up to the subtraction of b_dec, which belongs to the step."""
        x = self.hook_sae_input(self.reshape_fn_in(sae_in.to(self.dtype)))
        return self.run_time_activation_norm_fn_in(x)

    def _measure_l0(self, feature_acts: Tensor) -> float:
        active = feature_acts._nnz() if feature_acts.is_sparse else feature_acts.count_nonzero()
        batch, d_sae = feature_acts.shape
        self._density = float(active) / (batch * d_sae)
        return self._density * d_sae

    def _refuse_non_finite(self, loss: Tensor, x: Tensor, step: int) -> None:
        # A latent whose b_enc or θ is NaN is selected nowhere, and the loss would not show it.
        vectors = self.b_enc.detach().sum() + self.threshold.detach().sum()
        if torch.isfinite(loss.detach() + 0 * vectors):
            return
        hook = self.cfg.metadata.hook_name or "the activation source"
        if not torch.isfinite(x).all():
            raise ValueError(
                f"the activations of {hook} hold NaN or infinite values (training step {step}); "
                "run the model in float32 or bfloat16, or exclude the tokens that overflow"
            )
        raise ValueError(
            f"the loss became {loss.item()} at training step {step} though the activations of "
            f"{hook} are finite: the training diverged; lower lr (or l0_coefficient)"
        )

    # ---------------------------------------------------------------- around the step

    def _before_first_step(self, x: Tensor) -> None:
        if self._seam is not None:
            self._seam.settle()
        elif self.training:
            self._seam = OptimizerHooks(
                self.W_dec, before=self._gradients_ready, after=self._parameters_moved
            )
            if self.cfg.unit_norm_decoder:
                self.W_dec.register_post_accumulate_grad_hook(_make_tangential)
        if not self._calibrated:
            self._calibrate(x)

    @torch.no_grad()
    def _calibrate(self, x: Tensor) -> None:
        sample = _full_precision(self._normalized_input(x))
        if not torch.isfinite(sample).all():
            self._refuse_non_finite(sample.sum() * torch.nan, x, 0)
        if (limit := self.cfg.outlier_norm_limit) is not None:
            # One outlier in the batch would widen every latent's spread, and with it ε.
            sample = sample[outlier_token_weights(sample, limit) == 1]
        if self.cfg.apply_b_dec_to_input:
            if not self._has_loaded_weights:
                set_value(self, "b_dec", sample.mean(0))
            sample = sample - self.b_dec
        z = sample @ _full_precision(self.W_enc) + self.b_enc
        if self.cfg.initialization == "uniform" and not self._has_loaded_weights:
            raised = raise_to_fire(z[:4096], self.threshold, UNIFORM_START_L0 / self.cfg.d_sae)
            set_value(self, "b_enc", self.b_enc + raised)
            z = z + raised
        start_l0 = 0.05 * self.cfg.d_sae if self.controller is None else self.controller.aim()
        found = calibrate(z, start_l0, self.cfg.jumprelu_bandwidth_std)
        if self.cfg.jumprelu_init_threshold is None and not self._has_loaded_weights:
            set_value(self, "threshold", found.threshold)
        if self.bandwidth is None:
            self.bandwidth = found.bandwidth
        self._calibrated = True

    @torch.no_grad()
    def _keep_threshold_positive(self) -> None:
        # On the stored value, not in the graph: a clamp in the graph would zero the gradient of a
        # latent that reached 0 and pin it there. A logarithm needs none.
        if not isinstance(parametrized(self, "threshold"), LogParameter):
            stored(self, "threshold").data.clamp_(min=0.0)

    def _gradients_ready(self) -> None:
        self._path.finish(self._density)

    def _parameters_moved(self) -> None:
        if self.cfg.unit_norm_decoder:
            normalize_rows_(self.W_dec.data)
        if self.controller is not None and self._measured is not None:
            assert self.bandwidth is not None
            shift = self.controller.shift(*self._measured, self.bandwidth)
            # At most halved, so that a logarithm stays finite.
            moved = torch.maximum(self.threshold + shift, 0.5 * self.threshold)
            set_value(self, "threshold", moved)
            self._measured = None
        # Also after the last step: below 0, an active latent could be negative.
        self._keep_threshold_positive()
        if self._firing is not None:
            self._restart_dead_latents(self._firing)

    def _restart_dead_latents(self, firing: FiringRecord) -> None:
        optimizer = None if self._seam is None else self._seam.optimizer
        if optimizer is None or not firing.may_resample(optimizer) or self._latest is None:
            return
        x, residual = self._latest
        self._latest = None
        wait = self._patience(len(x))
        resample_dead_(
            self, firing, wait, x, residual, self._restart_encoders, optimizer, seed=firing.steps
        )

    def _restart_encoders(
        self, x: Tensor, residual: Tensor, tokens: Tensor
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " d_in"]]:
        """Directions in which restarted latents look, and the input that gives them z = 0."""
        center = torch.zeros_like(x[0]) if self.cfg.apply_b_dec_to_input else x.mean(0)
        return residual[tokens], center

    # ---------------------------------------------------------------- inference on the training SAE

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.bandwidth is None:  # before the first step: the value does not matter to inference
            x_in = self.process_sae_in(x)
            hidden_pre = self.hook_sae_acts_pre(x_in @ self.W_enc + self.b_enc)
            active = hidden_pre > self.threshold.to(hidden_pre.dtype)
            return self.hook_sae_acts_post(hidden_pre * active), hidden_pre
        return super().encode_with_hidden_pre(x)

    # ---------------------------------------------------------------- folding, saving, loading

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        self._store_plainly()
        super().fold_activation_norm_scaling_factor(scaling_factor)

    @override
    def fold_activation_whitening(self, *args: Any, **kwargs: Any) -> None:
        self._store_plainly()
        super().fold_activation_whitening(*args, **kwargs)

    @override
    def fold_W_dec_norm(self) -> None:
        self._store_plainly()
        super().fold_W_dec_norm()

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Write what stock SAELens reads: plain parameters, contiguous."""
        for name in self._parametrized():
            del state_dict[f"parametrizations.{name}.original"]
            state_dict[name] = getattr(self, name).detach()
        for name, value in state_dict.items():
            state_dict[name] = value.contiguous()

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        self._has_loaded_weights = True  # calibration must not overwrite them
        state_dict["W_enc"] = _by_latent(state_dict["W_enc"])
        for name in self._parametrized():
            how = parametrized(self, name)
            assert how is not None
            key = f"parametrizations.{name}.original"
            state_dict[key] = how.right_inverse(state_dict.pop(name))

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save for resuming: SAELens' checkpoint files and, beside them, what they do not hold."""
        if self._seam is not None:  # the optimiser's step may have been interrupted
            self._seam.settle()
        saved = super().save_model(path)
        as_stored = {name: stored(self, name).detach().clone() for name in self._parametrized()}
        checkpoint.write(
            Path(path), self.bandwidth, as_stored, self.controller, self._firing, self._prices
        )
        return saved

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        super().load_weights_from_checkpoint(checkpoint_path)
        saved = checkpoint.read(Path(checkpoint_path))
        if saved is not None:
            for name in self._parametrized():
                stored(self, name).data.copy_(saved.tensors[name])
            self.bandwidth = saved.bandwidth
            saved.restore(self.controller, self._firing, self._prices)
        self._calibrated = self.bandwidth is not None


def _quadratic_centre(cfg: JumpReLUTrainingSAEConfig) -> float | None:
    """Where the quadratic penalty has its minimum.

    At the target, where its coefficient is fixed. A steered training is held at the target, and a
    penalty that is flat there has no price: it is centred at half the target instead.
    """
    if cfg.target_l0 is None:
        return None
    return 0.5 * cfg.target_l0 if cfg.controls_l0 else cfg.target_l0


def _full_precision(tensor: Tensor) -> Tensor:
    """Half-precision tensors as float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _by_latent(W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_in d_sae"]:
    """The same matrix, with each latent's encoder vector contiguous in memory."""
    return W_enc.t().contiguous().t()


def _make_tangential(W_dec: Tensor) -> None:
    if W_dec.grad is not None:
        remove_parallel_gradient_(W_dec.grad, W_dec.data)
