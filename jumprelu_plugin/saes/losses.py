"""The summands of an SAE's training loss, from its resolved config."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from jumprelu_plugin.saes.resolved import ResolvedConfig
from jumprelu_plugin.step.losses import (
    AuxiliaryLoss,
    PreActivationLoss,
    Step,
    outlier_token_weights,
    reconstruction,
    sparsity_term,
)
from jumprelu_plugin.step.processes import ONE_PROCESS, OneProcess


def sparsity_of(cfg: Any, resolved: ResolvedConfig) -> Any:
    """The sparsity term of a config, with its density penalties (`step.losses.Term`)."""
    return sparsity_term(
        cfg.jumprelu_sparsity_loss_mode,
        target_l0=resolved.quadratic_target or None,
        tanh_scale=cfg.jumprelu_tanh_scale,
        density_penalty_scale=resolved.density_penalty_scale,
        max_latent_density=resolved.max_latent_density,
    )


def token_weights(
    resolved: ResolvedConfig,
    target: Float[Tensor, "batch ..."],
    center: Float[Tensor, " d_out"] | None = None,
    processes: OneProcess = ONE_PROCESS,
) -> Float[Tensor, " batch"] | None:
    """The weight of each token's squared error; None where outlier tokens are not limited."""
    ratio = resolved.outlier_norm_ratio
    if ratio == math.inf:
        return None
    return outlier_token_weights(target, ratio, center, processes)


def loss_terms(
    resolved: ResolvedConfig,
    step: Step,
    *,
    x_hat: Float[Tensor, "batch ..."],
    target: Float[Tensor, "batch ..."],
    weights: Float[Tensor, " batch"] | None,
    prefix_errors: Float[Tensor, " prefixes"] | None,
    sparsity: Float[Tensor, ""],
    pre_act_latents: str,
) -> dict[str, Tensor]:
    """What the loss is the sum of, under the names that SAELens logs.

    Args:
        x_hat, target: the output and what it is to equal, in the input's own units.
        weights: of each token's squared error.
        prefix_errors: of the Matryoshka prefixes, where there are any.
        sparsity: the sparsity term times its coefficient.
        pre_act_latents: which latents the pre-activation loss pulls.
    """
    losses = {"mse_loss": reconstruction(x_hat, target, weights), "l0_loss": sparsity}
    if prefix_errors is not None:
        # Weights that sum to 1: λ keeps the meaning that it has without prefixes.
        whole = 1 / (1 + resolved.matryoshka_loss_weight)
        share = whole * resolved.matryoshka_loss_weight / len(prefix_errors)
        losses["mse_loss"] = whole * losses["mse_loss"]
        terms = (share * prefix_errors).unbind()
        for width, term in zip(resolved.matryoshka_widths, terms, strict=True):
            losses[f"matryoshka_mse_loss_{width}"] = term
    if resolved.pre_act_loss_coefficient:
        pre_act = PreActivationLoss(pre_act_latents)(step)
        losses["pre_act_loss"] = resolved.pre_act_loss_coefficient * pre_act
    if resolved.aux_loss_coefficient:
        auxiliary = AuxiliaryLoss()(step, (target - x_hat).flatten(1))
        losses["auxiliary_reconstruction_loss"] = resolved.aux_loss_coefficient * auxiliary
    return losses


def over_batch(losses: dict[str, Tensor], processes: OneProcess) -> dict[str, Tensor]:
    """The same summands over the whole batch, where processes split it."""
    if processes.replicas == 1:
        return losses
    means = processes.mean_over_replicas(torch.stack(list(losses.values())))
    return dict(zip(losses, means.unbind(), strict=True))


def decoder_target(
    sae: Any, target: Float[Tensor, "batch ..."]
) -> tuple[Float[Tensor, "batch d_out"], Float[Tensor, " batch"]]:
    """What the decoder is to give before SAELens undoes its input normalization, and the factor
    that brings a squared error there to the target's own units, for each token."""
    flat = target.flatten(1)
    match sae.cfg.normalize_activations:
        case "layer_norm":
            mean, std = cast("Tensor", sae.ln_mu), cast("Tensor", sae.ln_std)
            scale = std.clamp_min(torch.finfo(flat.dtype).tiny)  # a constant token's std is 0
            return (flat - mean) / scale, scale.flatten().square()
        case "constant_norm_rescale":
            factor = cast("Tensor", sae.x_norm_coeff)
            return flat * factor, factor.flatten().pow(-2)
    return flat, flat.new_ones(len(flat))
