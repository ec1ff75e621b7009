"""The config of the training SAE: SAELens' own fields, ours beside them, and what they must hold.

A stock `sae_lens.JumpReLUTrainingSAEConfig` trains as it does in SAELens: it always carries a
number for `l0_coefficient`, `jumprelu_bandwidth` and `jumprelu_init_threshold`, and every field
added here keeps SAELens' behaviour at its default. Our subclass may leave those three out, and then
they are found from the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal

import sae_lens
from typing_extensions import override

from jumprelu_plugin.control.units import INPUT_UNITS
from jumprelu_plugin.step.choose import STEP_PATHS
from jumprelu_plugin.step.losses import SPARSITY_MODES

StockConfig = sae_lens.JumpReLUTrainingSAEConfig

# More of it makes latents match true features better and rebuild less (docs/results.md).
INNER_WEIGHT = 0.5
# Above this L0/d_sae the weight falls with its square. What inner dictionaries cost grows with it.
DENSITY_OF_FULL_WEIGHT = 1 / 64
# Inner dictionaries' shares of the latents. Larger ones cost more and find less.
INNER_PARTS = (32, 16, 8)
# Times the median norm. Massive activations have a hundred. With less, they are rebuilt badly where
# L0 is low (docs/results.md).
OUTLIER_NORM = 10.0
# Times the mean frequency. A ceiling below the first is raised to it, since it costs the more the
# nearer it is; one below the second is left out, since it would hold most latents down.
ROOM_UNDER_CEILING, LEAST_ROOM = 2.0, 1.5


@dataclass
class JumpReLUTrainingSAEConfig(StockConfig):
    """How to train a JumpReLU SAE. `JumpReLUTrainingSAEConfig(d_in=…, d_sae=…, target_l0=40)` is
    a complete recipe; give `l0_coefficient` instead of `target_l0` for a fixed penalty.

    Args:
        target_l0: active latents a token to train for. Without `l0_coefficient` the thresholds are
            held where the measured L0 is this, and the coefficient is measured as the price that
            fits (`control.l0`): a steered training. With a fixed coefficient only the
            `quadratic` mode reads it, as its penalty's target.
        l0_coefficient: λ, fixed. None: a steered training.
        jumprelu_bandwidth: ε. None takes it from the spread of the pre-activations.
        jumprelu_init_threshold: θ₀, for every latent. None takes it from pre-activation quantiles.
        jumprelu_ste_to_input: whether the estimators' gradient also reaches the encoder.
        normalize_activations: as in SAELens; scaled to E‖x‖ = √d_in by default.
        density_penalty_scale: w₀. The sparsity term, whatever its mode, gains Σ_i f_i²/w₀, f_i the share
            of the batch's tokens on which latent i fires: no latent then stays on much of the text.
            Published with 0.01. None leaves it out.
        max_latent_density: the share of tokens on which a latent is to fire at most. What the
            firings of a latent above it cost rises until it keeps to it (`control.density`). The
            recipe `default`, made for text, has one. None is no ceiling. A steered training raises
            it to twice the mean frequency, and has none where 1.5 times the mean is above what is
            given here: it would hold most latents down (docs/results.md).
        matryoshka_widths: the first m latents also have to rebuild the input on their own, for each
            m here (arXiv 2503.17547); the whole dictionary need not be listed. None means 1/32,
            1/16 and 1/8 of it in a steered training, and the whole dictionary alone otherwise.
        matryoshka_loss_weight: what the mean of the inner dictionaries' errors weighs beside the whole
            one's. None means 0.5, less where L0 is more than 1/64 of the dictionary; or, if
            `matryoshka_widths` are given, their number, which makes the error the published mean.
            0 leaves the inner dictionaries out.
        outlier_norm_ratio: the squared error of a token longer than this many times the batch's median
            norm counts as if it were that long (`objective.outlier_token_weights`). None means 10 in an
            SAE's steered training, and no limit otherwise. 0 is no limit.
        aux_loss_coefficient: α of the auxiliary loss (arXiv 2406.04093): dead latents rebuild what
            the others leave (`objective.AuxiliaryLoss`). Published with 1/32. None leaves it out.
        pre_act_loss_latents: which latents `pre_act_loss_coefficient` pulls towards firing: `dead`
            ones, as in SAELens, or `all`, as published.
        initialization: `saelens`, or `uniform`, Anthropic's of January 2025: W_dec uniform in
            ±1/√d_in whatever `decoder_init_norm`, W_enc = d_in/d_sae · W_decᵀ, and, from the first
            batch, b_enc so that each latent fires on 10,000/d_sae of the tokens.
        units: what θ₀, ε and λ are given in. `sqrt_d`: SAELens' units, E‖x‖ = √d_in. `unit_rms`:
            the paper's and Gemma Scope's, E‖x‖² = 1; biases then also move at their pace.
        threshold_parameter: train θ itself, as SAELens does, or log θ, as the paper does.
        decoder_rows: `free`, as in SAELens, or `unit_norm`, as in the paper. None means unit norm
            in a steered training, free otherwise.
        step_kernel: how a step is computed (`step.choose`). `auto` times the ways there are and takes
            the fastest; all give the same numbers.
        target_l0_start_ratio, target_l0_warm_up_steps: a steered training starts at `target_l0_start_ratio` times the
            target and comes down to it over this many steps. By default it asks for the target at
            once.
        jumprelu_bandwidth_std: where ε is taken from the data, how many standard deviations of the
            pre-activations.
        resample_dead_latents: start dead latents again from residuals (`control.resampling`). None
            means in a steered training.
    """

    normalize_activations: Literal[
        "none", "expected_average_only_in", "layer_norm", "covariance_whitening"
    ] = "expected_average_only_in"
    jumprelu_init_threshold: float | None = None  # type: ignore[assignment]
    jumprelu_bandwidth: float | None = None  # type: ignore[assignment]
    l0_coefficient: float | None = None  # type: ignore[assignment]
    jumprelu_ste_to_input: bool = True
    density_penalty_scale: float | None = None
    max_latent_density: float | None = None
    matryoshka_widths: list[int] | None = None
    matryoshka_loss_weight: float | None = None
    outlier_norm_ratio: float | None = None
    aux_loss_coefficient: float | None = None
    pre_act_loss_latents: Literal["dead", "all"] = "dead"
    initialization: Literal["saelens", "uniform"] = "saelens"
    units: Literal["sqrt_d", "unit_rms"] = "sqrt_d"
    threshold_parameter: Literal["raw", "log"] = "raw"
    decoder_rows: Literal["free", "unit_norm"] | None = None
    step_kernel: Literal["auto", "sparse", "screened", "dense"] = "auto"
    target_l0_start_ratio: float = 1.0
    target_l0_warm_up_steps: int = 0
    jumprelu_bandwidth_std: float = 1.0
    resample_dead_latents: bool | None = None

    @property
    def controls_l0(self) -> bool:
        """Whether thresholds hold `target_l0` and λ is measured, instead of fixed."""
        return self.l0_coefficient is None

    @property
    def matryoshka_by_default(self) -> bool:
        """Whether there are inner dictionaries without being asked for."""
        return self.controls_l0

    @property
    def limits_outliers_by_default(self) -> bool:
        """Whether there is a limit on what a token counts without being asked for."""
        return self.controls_l0

    @property
    def prefix_widths(self) -> list[int]:
        """Widths of the nested dictionaries but the whole one; empty where there are none."""
        if self.matryoshka_loss_weight == 0:
            return []
        if self.matryoshka_widths is not None:
            return [width for width in self.matryoshka_widths if width < self.d_sae]
        if not self.matryoshka_by_default:
            return []
        return sorted({self.d_sae // part for part in INNER_PARTS} - {0})

    @property
    def prefix_loss_weight(self) -> float:
        """What the mean of the inner dictionaries' errors weighs beside the whole one's."""
        if self.matryoshka_loss_weight is not None:
            return self.matryoshka_loss_weight
        if self.matryoshka_widths is not None:
            return float(len(self.prefix_widths))
        density = (self.target_l0 or 0) / self.d_sae
        return INNER_WEIGHT * min(1.0, DENSITY_OF_FULL_WEIGHT / max(density, 1e-12)) ** 2

    @property
    def outlier_norm_limit(self) -> float | None:
        """Times the median norm: longer tokens' errors count as if they were that long, or None."""
        if self.outlier_norm_ratio is None:
            return OUTLIER_NORM if self.limits_outliers_by_default else None
        return self.outlier_norm_ratio or None

    @property
    def ceiling(self) -> float | None:
        """The share of tokens on which a latent is to fire at most, or None."""
        ceiling, mean = self.max_latent_density, (self.target_l0 or 0) / self.d_sae
        if ceiling is None or not self.controls_l0:
            return ceiling
        return None if LEAST_ROOM * mean > ceiling else max(ceiling, ROOM_UNDER_CEILING * mean)

    @property
    def unit_norm_decoder(self) -> bool:
        """Whether decoder rows are held at unit norm."""
        if self.decoder_rows is None:
            return self.controls_l0
        return self.decoder_rows == "unit_norm"

    @property
    def resamples_dead_latents(self) -> bool:
        """Whether dead latents are started again."""
        return (
            self.controls_l0 if self.resample_dead_latents is None else self.resample_dead_latents
        )

    @override
    @classmethod
    def architecture(cls) -> str:
        return "jumprelu"


def with_our_fields(cfg: StockConfig) -> JumpReLUTrainingSAEConfig:
    """The same config as our class; a stock object keeps its values and its behaviour."""
    if isinstance(cfg, JumpReLUTrainingSAEConfig):
        return cfg
    values = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    return JumpReLUTrainingSAEConfig(**values)


def check(cfg: JumpReLUTrainingSAEConfig) -> None:
    """Refuse a config that cannot train.

    Raises:
        ValueError: naming the field, what it holds, and what to do.
    """
    if cfg.l0_coefficient is None and cfg.target_l0 is None:
        raise ValueError(
            "neither target_l0 nor l0_coefficient is set: give target_l0=40 (say) to train for 40 "
            "active latents a token, or l0_coefficient for a fixed sparsity penalty"
        )
    if cfg.jumprelu_sparsity_loss_mode == "quadratic" and cfg.target_l0 is None:
        raise ValueError(
            "cfg.target_l0 must be set for quadratic sparsity loss mode: it is where the penalty "
            "has its minimum"
        )
    if cfg.l0_coefficient is not None and not math.isfinite(cfg.l0_coefficient):
        raise ValueError(f"l0_coefficient is {cfg.l0_coefficient}; it must be a finite number")
    for field in ("jumprelu_init_threshold", "jumprelu_bandwidth"):
        value = getattr(cfg, field)
        if value is not None and not value > 0:
            raise ValueError(
                f"{field} is {value}; it must be greater than 0 (leave it out in "
                "jumprelu_plugin.JumpReLUTrainingSAEConfig to take it from the data)"
            )
    for field in ("target_l0_start_ratio", "jumprelu_bandwidth_std"):
        value = getattr(cfg, field)
        if not 0 < value < math.inf:
            raise ValueError(f"{field} is {value}; it must be a finite number greater than 0")
    if cfg.density_penalty_scale is not None and not 0 < cfg.density_penalty_scale < math.inf:
        raise ValueError(
            f"density_penalty_scale is {cfg.density_penalty_scale}; it must be a finite number greater than 0 "
            "(0.01 as published), or None for no frequency penalty"
        )
    if cfg.max_latent_density is not None and not 0 < cfg.max_latent_density <= 1:
        raise ValueError(
            f"max_latent_density is {cfg.max_latent_density}; it must be a share of the tokens, "
            "greater than 0 and at most 1, or None for no ceiling"
        )
    for field in ("matryoshka_loss_weight", "outlier_norm_ratio"):
        value = getattr(cfg, field)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{field} is {value}; it must be a finite number, 0 or more, or None")
    widths = cfg.matryoshka_widths
    if widths is not None and (
        not widths
        or not all(isinstance(width, int) and 0 < width <= cfg.d_sae for width in widths)
        or any(first >= second for first, second in pairwise(widths))
    ):
        raise ValueError(
            f"matryoshka_widths is {widths}; it must be whole numbers of latents in rising order, "
            f"from 1 to d_sae, which is {cfg.d_sae}, or None for no nested dictionaries"
        )
    alpha = cfg.aux_loss_coefficient
    if alpha is not None and not 0 <= alpha < math.inf:
        raise ValueError(
            f"aux_loss_coefficient is {alpha}; it must be a finite number, 0 or more (1/32 as "
            "published), or None for no auxiliary loss"
        )
    if alpha is not None and cfg.normalize_activations == "layer_norm":
        raise ValueError(
            f"aux_loss_coefficient is {alpha} and normalize_activations is 'layer_norm': dead "
            "latents would have to rebuild a residual on another scale than their own. Use "
            "'expected_average_only_in' or 'none'"
        )
    if cfg.initialization == "uniform" and cfg.jumprelu_init_threshold is None:
        raise ValueError(
            "initialization is 'uniform' and jumprelu_init_threshold is None: biases are set for "
            "a known threshold; give one (0.1 as published)"
        )
    if cfg.target_l0_warm_up_steps < 0:
        raise ValueError(
            f"target_l0_warm_up_steps is {cfg.target_l0_warm_up_steps}; it must be 0 or more"
        )
    if cfg.target_l0 is not None and not 0 < cfg.target_l0 <= cfg.d_sae:
        raise ValueError(
            f"target_l0 is {cfg.target_l0}; it must be greater than 0 and at most d_sae, "
            f"which is {cfg.d_sae}"
        )
    if (
        cfg.target_l0_start_ratio < 1
        or cfg.target_l0_start_ratio * (cfg.target_l0 or 1) > cfg.d_sae
    ):
        raise ValueError(
            f"target_l0_start_ratio is {cfg.target_l0_start_ratio}; it must be at least 1, and times target_l0 "
            f"({cfg.target_l0}) at most d_sae ({cfg.d_sae})"
        )
    choices = {
        "jumprelu_sparsity_loss_mode": SPARSITY_MODES,
        "pre_act_loss_latents": ("dead", "all"),
        "initialization": ("saelens", "uniform"),
        "units": INPUT_UNITS,
        "threshold_parameter": ("raw", "log"),
        "decoder_rows": (None, "free", "unit_norm"),
        "step_kernel": STEP_PATHS,
    }
    for field, allowed in choices.items():
        if getattr(cfg, field) not in allowed:
            names = ", ".join(str(choice) for choice in allowed)
            raise ValueError(f"{field} is {getattr(cfg, field)!r}; it must be one of {names}")
