"""The config of the training SAE: SAELens' own fields, and this package's beside them.

A stock `sae_lens.JumpReLUTrainingSAEConfig` trains as it does in SAELens: it always carries a
number for `l0_coefficient`, `jumprelu_bandwidth` and `jumprelu_init_threshold`, and every field
added here keeps SAELens' behavior at its default. Our subclass may leave those three out; they are
then found from the data. What optional fields resolve to is in `saes.resolved`.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, Literal

import sae_lens
from typing_extensions import override

from jumprelu_plugin.saes.resolved import ResolvedConfig, resolve

StockConfig = sae_lens.JumpReLUTrainingSAEConfig


@dataclass
class JumpReLUTrainingSAEConfig(StockConfig):
    """How to train a JumpReLU SAE. `JumpReLUTrainingSAEConfig(d_in=…, d_sae=…, target_l0=40)` is
    a complete recipe; give `l0_coefficient` instead of `target_l0` for a fixed penalty.

    Without `l0_coefficient` the training is L0-controlled: thresholds hold `target_l0` on every
    step, and the coefficient is measured as the multiplier of that constraint (`control.l0`).

    Args:
        target_l0: active latents a token to train for. Without `l0_coefficient` the thresholds hold
            it. With a fixed coefficient only the `quadratic` mode reads it, as its penalty's
            target.
        l0_coefficient: λ, fixed. None: L0-controlled.
        jumprelu_bandwidth: ε. None takes it from the spread of the pre-activations.
        jumprelu_init_threshold: θ₀, for every latent. None takes it from pre-activation quantiles.
        jumprelu_ste_to_input: whether the estimators' gradient also reaches the encoder.
        jumprelu_ste_input_share: how much of it does, from 0 to 1. None means half where
            L0-controlled (docs/ablations.md), and all of it otherwise.
        normalize_activations: as in SAELens; scaled to E‖x‖ = √d_in by default.
        density_penalty_scale: ω₀. The sparsity term, whatever its mode, gains Σ_i f_i²/ω₀, f_i the
            latent density: the share of the batch's tokens on which latent i fires. Published with
            0.01. None leaves it out.
        max_latent_density: the share of tokens on which a latent is to fire at most. Above it a
            firing costs more, until the latent keeps to it, or up to half more: a latent that
            is worth that stays dense (`control.density`). The recipe `default`, made for text, has
            one. None is no limit. An L0-controlled training raises it
            to twice the mean density, and has none where 1.5 times the mean is above what is given:
            it would hold most latents down (docs/ablations.md).
        matryoshka_widths: the first m latents also have to reconstruct the input on their own, for
            each m here (arXiv 2503.17547); the whole dictionary need not be listed. None means
            1/32, 1/16 and 1/8 of it where `matryoshka_loss_weight` is given, and no prefixes
            otherwise: latents match known features better with them, and a language model's
            activations are reconstructed worse (docs/ablations.md).
        matryoshka_loss_weight: weight of the mean of the prefixes' errors beside the whole
            dictionary's; the recipe `matryoshka` has 0.5. None means the number of
            `matryoshka_widths`, which is the published mean. 0 leaves the prefixes out.
        outlier_norm_ratio: the squared error of a token further from the data's center than this
            many times the batch's median distance counts as if it were that far
            (`step.losses.outlier_token_weights`). None means 10 for an L0-controlled SAE, and no
            limit otherwise. 0 is no limit.
        standardize_activations: train in units of the data's own center and spread, measured on the
            first batch (`control.standardization`), so that training on a·x + v is the same
            training. θ₀ and ε, where given, are in units of the spread then. What is saved reads
            the activations as they are. None means True where L0-controlled.
        aux_loss_coefficient: α of the auxiliary loss (arXiv 2406.04093): dead latents reconstruct
            what the others leave (`step.losses.AuxiliaryLoss`). Published with 1/32. None leaves it
            out.
        pre_act_loss_latents: which latents `pre_act_loss_coefficient` pulls towards firing: `dead`
            ones, as in SAELens, or `all`, as published.
        initialization: `saelens`, or `anthropic` (Circuits Updates, January 2025): W_dec uniform in
            ±1/√d_in whatever `decoder_init_norm`, W_enc = d_in/d_sae · W_decᵀ, and, from the first
            batch, b_enc so that each latent fires on 10,000/d_sae of the tokens.
        hyperparameter_units: what θ₀, ε and λ are given in. `sqrt_d`: SAELens' units, E‖x‖ = √d_in.
            `unit_rms`: the paper's and Gemma Scope's, E‖x‖² = 1; biases then also move at their
            pace.
        log_threshold: train log θ, as the paper does, instead of θ, as SAELens does.
        unit_norm_decoder: hold decoder rows at unit norm, as in the paper; False leaves them free,
            as in SAELens. None means True where L0-controlled.
        step_kernel: how a step is computed (`step.choose`). `auto` times the ways there are and
            takes the fastest; all give the same numbers. `triton` needs a GPU.
        target_l0_start_ratio, target_l0_warm_up_steps: an L0-controlled training starts at
            `target_l0_start_ratio` times the target and comes down to it over this many steps. By
            default it holds the target at once.
        jumprelu_bandwidth_std: where ε is taken from the data, how many standard deviations of the
            pre-activations.
        resample_dead_latents: resample dead latents from residuals (`control.resampling`). None
            means True where L0-controlled.
    """

    # What an L0-controlled training has without being asked: measured on SAEs.
    outlier_limit_by_default: ClassVar[bool] = True

    normalize_activations: Literal[
        "none", "expected_average_only_in", "layer_norm", "covariance_whitening"
    ] = "expected_average_only_in"
    target_l0: float | None = None
    jumprelu_init_threshold: float | None = None  # type: ignore[assignment]
    jumprelu_bandwidth: float | None = None  # type: ignore[assignment]
    l0_coefficient: float | None = None  # type: ignore[assignment]
    jumprelu_ste_to_input: bool = True
    jumprelu_ste_input_share: float | None = None
    density_penalty_scale: float | None = None
    max_latent_density: float | None = None
    matryoshka_widths: list[int] | None = None
    matryoshka_loss_weight: float | None = None
    outlier_norm_ratio: float | None = None
    standardize_activations: bool | None = None
    aux_loss_coefficient: float | None = None
    pre_act_loss_latents: Literal["dead", "all"] = "dead"
    initialization: Literal["saelens", "anthropic"] = "saelens"
    hyperparameter_units: Literal["sqrt_d", "unit_rms"] = "sqrt_d"
    log_threshold: bool = False
    unit_norm_decoder: bool | None = None
    step_kernel: Literal["auto", "sparse", "screened", "triton", "dense"] = "auto"
    target_l0_start_ratio: float = 1.0
    target_l0_warm_up_steps: int = 0
    jumprelu_bandwidth_std: float = 1.0
    resample_dead_latents: bool | None = None

    @property
    def controls_l0(self) -> bool:
        """Whether thresholds hold `target_l0` and λ is measured, instead of fixed."""
        return self.l0_coefficient is None

    @property
    def is_stock(self) -> bool:
        """Whether it says nothing that a stock SAELens config could not say."""
        given = (self.l0_coefficient, self.jumprelu_bandwidth, self.jumprelu_init_threshold)
        return None not in given and all(
            getattr(self, field.name) == field.default for field in _own_fields(self)
        )

    @override
    def to_dict(self) -> dict[str, Any]:
        """Every field; a stock config's are stock's alone, so that it survives a round trip."""
        return self._without_unset(super().to_dict())

    @override
    def get_training_architecture_details(self) -> dict[str, Any]:
        """The fields that only training needs, for the metadata of what is saved."""
        return self._without_unset(super().get_training_architecture_details())

    def _without_unset(self, values: dict[str, Any]) -> dict[str, Any]:
        if not self.is_stock:
            return values
        own = {field.name for field in _own_fields(self)}
        return {name: value for name, value in values.items() if name not in own}

    def __eq__(self, other: object) -> bool:
        """By what they say: a stock config in this class equals the stock object."""
        if not isinstance(other, StockConfig):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def resolve(self) -> ResolvedConfig:
        """What the optional fields mean here, with none of them None."""
        return resolve(self)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "jumprelu"


def as_plugin_config(cfg: StockConfig) -> JumpReLUTrainingSAEConfig:
    """The same config as our class; a stock object keeps its values and its behavior."""
    if isinstance(cfg, JumpReLUTrainingSAEConfig):
        return cfg
    values = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    return JumpReLUTrainingSAEConfig(**values)


def _own_fields(cfg: JumpReLUTrainingSAEConfig) -> list[Field[Any]]:
    stock = {field.name for field in fields(StockConfig)}
    return [field for field in fields(cfg) if field.name not in stock]
