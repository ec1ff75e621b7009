"""The terms of the training loss, each a small frozen dataclass that holds only its own constants.

A term is a callable that takes a `Step` (the results of one forward pass) and returns a scalar.
Each term is written once against the interface of `step.entries.Entries`, so the dense and the
sparse step train on the same loss. The caller multiplies by the coefficients, because coefficients
change during training and terms do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from jumprelu_plugin.step.entries import Entries
from jumprelu_plugin.step.processes import ONE_PROCESS, OneProcess


@dataclass(frozen=True)
class Step:
    """The results of one forward pass, from which the terms are computed.

    Attributes:
        entries: the represented pre-activations.
        activations: JumpReLU(z) at the same pairs.
        threshold: θ, [d_sae].
        bandwidth: ε, in the units of the pre-activations.
        to_input: the share of the estimators' gradient that pre-activations receive.
        W_dec: [d_sae, d_out].
        dead: mask of the latents that have not fired within the trainer's window, [d_sae]; None if
            dead latents are not tracked.
        density_multipliers: μ ≥ 0, [d_sae], the multiplier of each latent's density limit
            (`control.density`); None without a limit.
        processes: that hold the dictionary and split the batch. What is indexed by latent or token
            is this process's. The terms are the whole dictionary's, over this process's tokens.
    """

    entries: Entries
    activations: Float[Tensor, "*entries"]
    threshold: Float[Tensor, " d_sae"]
    bandwidth: float
    to_input: float
    W_dec: Float[Tensor, "d_sae d_out"]
    dead: Bool[Tensor, " d_sae"] | None = None
    density_multipliers: Float[Tensor, " d_sae"] | None = None
    processes: OneProcess = ONE_PROCESS

    def gates(self) -> Float[Tensor, "*entries"]:
        """H(z - θ), with the straight-through estimator's gradient."""
        return self.entries.gates(self.threshold, self.bandwidth, self.to_input)

    def l0(self) -> Float[Tensor, " batch"]:
        """Number of active latents per token, with the estimator's gradient."""
        return self.entries.sum_latents(self.gates())

    def latent_densities(self) -> Float[Tensor, " d_sae"]:
        """Fraction of the batch's tokens each latent fires on, with the estimator's gradient."""
        return self.entries.sum_tokens(self.gates()) / self.entries.batch

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """‖d_i‖ of each latent's decoder row."""
        return self.W_dec.norm(dim=1)


class Term(Protocol):
    """One summand of the loss, before it is multiplied by its coefficient."""

    def __call__(self, step: Step) -> Float[Tensor, ""]: ...


def reconstruction(
    x_hat: Float[Tensor, "batch d_out"],
    target: Float[Tensor, "batch d_out"],
    token_weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over tokens of ‖x̂ - x‖² (arXiv 2407.14435, eq. 9), each times the token's weight."""
    # The fused operator makes half as many passes over [batch, d_out], forward and backward, as
    # subtracting, squaring and summing.
    if token_weights is None:
        return functional.mse_loss(x_hat, target, reduction="sum") / len(x_hat)
    squared_errors = functional.mse_loss(x_hat, target, reduction="none").flatten(1).sum(1)
    return token_weights @ squared_errors / len(x_hat)


@torch.no_grad()
def outlier_token_weights(
    target: Float[Tensor, "batch d_out"],
    outlier_norm_ratio: float,
    center: Float[Tensor, " d_out"] | None = None,
    processes: OneProcess = ONE_PROCESS,
) -> Float[Tensor, " batch"]:
    """The weight of each token's squared error: 1, and (limit/‖x - c‖)² if ‖x - c‖ exceeds the
    limit.

    The limit is `outlier_norm_ratio` times the batch's median of ‖x - c‖, so an outlier's relative
    error counts as if it were that far from the center. All weights are 1 if the median is 0.

    In language models a few tokens have norms a hundred times the others' ("massive activations",
    arXiv 2402.17762). Unweighted, one such token in a thousand dominates a batch's gradient.

    Args:
        center: c, where distances are measured from; None: the origin.
        processes: over which the batch is split; the median is that of all its tokens.
    """
    flat = target.flatten(1)
    norm = (flat if center is None else flat - center).norm(dim=1)
    limit = outlier_norm_ratio * processes.gather_tokens(norm).median()
    weights = (limit / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0).square()
    return torch.where(limit > 0, weights, torch.ones_like(weights))


@dataclass(frozen=True)
class L0:
    """Mean number of active latents (arXiv 2407.14435, eq. 9)."""

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        return step.processes.sum_over_shards(step.l0().mean())


@dataclass(frozen=True)
class QuadraticL0:
    """Mean of (2/L0*)(L0 - L0*)² (Gemma Scope 2 technical report)."""

    target: float

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        l0 = step.processes.sum_over_shards(step.l0())
        return (2 / self.target * (l0 - self.target) ** 2).mean()


@dataclass(frozen=True)
class TanhL0:
    """Mean of Σ_i tanh(c · f_i · ‖d_i‖) (Anthropic, Circuits Updates January 2025)."""

    scale: float

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        norms = step.entries.per_latent(step.decoder_norms())
        soft_gates = torch.tanh(self.scale * step.activations * norms)
        return step.processes.sum_over_shards(step.entries.sum_latents(soft_gates).mean())


@dataclass(frozen=True)
class WithDensityPenalty:
    """A sparsity term plus Σ_i p_i²/w₀, where p_i is latent i's density in the batch.

    With `L0` the sum is Σ_i p_i (1 + p_i/w₀) (Google DeepMind's interpretability team, progress
    update of March 2025). Its slope in p_i is 1 + 2p_i/w₀, where that of `L0` alone is 1: with
    w₀ = 0.01 the penalty hardly changes for rare latents, and is 21 times as steep for a latent
    that fires on 10 % of tokens.

    p_i² is computed from a batch of N tokens, so its expectation is p_i² + p_i(1 - p_i)/N. The term
    is too large by about Σ_i p_i/(N w₀): 5 % of L0 at N = 2,048 and w₀ = 0.01, and the same for
    every firing of every latent.

    Attributes:
        term: the sparsity term.
        density_penalty_scale: w₀.
    """

    term: Term
    density_penalty_scale: float

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        densities = step.processes.mean_over_replicas(step.latent_densities())
        squares = step.processes.sum_over_shards(densities.square().sum())
        return self.term(step) + squares / self.density_penalty_scale


@dataclass(frozen=True)
class WithDensityLimit:
    """A sparsity term plus Σ_i μ_i (p_i - c): the Lagrangian of p_i ≤ c for every latent.

    p_i is latent i's density in the batch, c the limit, and μ_i the step's density multiplier. The
    slope in p_i grows by μ_i; it does not change for a latent whose multiplier is 0.
    `WithDensityPenalty` with a w₀ small enough to keep every density under 10 % also distorts the
    many latents that fire on a few per cent of tokens (docs/results.md).

    Attributes:
        term: the sparsity term.
        max_latent_density: c, a fraction of the tokens.
    """

    term: Term
    max_latent_density: float

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        if step.density_multipliers is None:
            return self.term(step)
        excess = step.latent_densities() - self.max_latent_density
        penalty = step.density_multipliers.to(excess) @ excess
        return self.term(step) + step.processes.sum_over_shards(penalty)


@dataclass(frozen=True)
class PreActivationLoss:
    """Mean of Σ_i ReLU(θ_i - z_i)‖d_i‖: it raises pre-activations that are below the threshold.

    Attributes:
        latents: `all` latents, as Anthropic does (January 2025), or only `dead` ones, as SAELens
            does.
    """

    latents: str = "dead"

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        weight = step.decoder_norms()
        if self.latents == "dead":
            if step.dead is None or not step.processes.any_over_shards(step.dead.any()):
                return step.W_dec.new_zeros(())
            weight = weight * step.dead
        deficit = step.entries.threshold_deficit(step.threshold, weight)
        return step.processes.sum_over_shards(deficit)


@dataclass(frozen=True)
class AuxiliaryLoss:
    """Mean of ‖e - ê‖², where dead latents reconstruct the residual e as ê (AuxK).

    Source: arXiv 2406.04093, A.2. For each token, ê decodes the k dead latents with the largest
    pre-activations, as far as these are positive, whatever their thresholds; k is half the output's
    width (B.1). No gradient reaches e. With fewer than k dead latents the loss is scaled down in
    proportion, as in SAELens.
    """

    def __call__(self, step: Step, residual: Float[Tensor, "batch d_out"]) -> Float[Tensor, ""]:
        dead = None if step.dead is None else step.dead.nonzero().squeeze(1)
        if dead is None or not len(dead):
            return step.W_dec.new_zeros(())
        k = max(1, residual.shape[1] // 2)
        z = step.entries.columns(dead)
        top = z.topk(min(k, len(dead)), dim=1, sorted=False)
        activations = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
        decoded = activations @ step.W_dec.index_select(0, dead)
        return min(1.0, len(dead) / k) * reconstruction(decoded, residual.detach())


# Values of SAELens' `jumprelu_sparsity_loss_mode`.
SPARSITY_MODES = ("step", "tanh", "quadratic")


def sparsity_term(
    mode: str,
    *,
    target_l0: float | None,
    tanh_scale: float,
    density_penalty_scale: float = math.inf,
    max_latent_density: float = 1.0,
) -> Term:
    """The sparsity term that a SAELens config describes, with its density penalties.

    Args:
        mode: one of `SPARSITY_MODES`.
        target_l0: L0*, needed by `quadratic`.
        tanh_scale: c of `TanhL0`.
        density_penalty_scale: w₀ of `WithDensityPenalty`; infinity leaves the penalty out.
        max_latent_density: c of `WithDensityLimit`; 1 leaves the limit out.

    Raises:
        ValueError: the mode is unknown, or it is `quadratic` and target_l0 is None.
    """
    if mode == "step":
        term: Term = L0()
    elif mode == "tanh":
        term = TanhL0(tanh_scale)
    elif mode == "quadratic":
        if target_l0 is None:
            raise ValueError("jumprelu_sparsity_loss_mode='quadratic' needs target_l0")
        term = QuadraticL0(target_l0)
    else:
        raise ValueError(
            f"jumprelu_sparsity_loss_mode is {mode!r}; it must be one of "
            f"{', '.join(SPARSITY_MODES)}"
        )
    if density_penalty_scale < math.inf:
        term = WithDensityPenalty(term, density_penalty_scale)
    if max_latent_density < 1:
        term = WithDensityLimit(term, max_latent_density)
    return term


@dataclass(frozen=True)
class ThresholdSlopes:
    """Derivatives along a shift of thresholds together: Σ_i ∂/∂θ_i by the estimators.

    Attributes:
        l0: the derivative of the mean L0.
        penalty: the derivative of the sparsity term, before its coefficient.
    """

    l0: Float[Tensor, ""]
    penalty: Float[Tensor, ""]


def threshold_slopes(term: Term, step: Step, penalty: Float[Tensor, ""]) -> ThresholdSlopes:
    """The slopes of this process's latents and tokens, detached.

    Args:
        penalty: term(step), whose graph is kept.
    """

    def slope(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, step.threshold, retain_graph=True)[0].sum()

    penalty_slope = slope(penalty)
    l0_slope = penalty_slope if isinstance(term, L0) else slope(step.l0().mean())
    return ThresholdSlopes(l0_slope, penalty_slope)
