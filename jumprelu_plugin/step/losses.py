"""The terms of the training loss: one small frozen type each, holding only its own numbers.

A term is a callable of a `Step` (what one forward pass produced) that returns a scalar. Every term
is written once against the verbs of `step.entries.Entries`, so the dense and the sparse step train
on the same loss. Coefficients multiply outside: they change during training, terms do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from jumprelu_plugin.step.entries import Entries
from jumprelu_plugin.step.estimators import heaviside


@dataclass(frozen=True)
class Step:
    """What one forward pass gives the terms.

    Attributes:
        entries: the represented pre-activations.
        activations: JumpReLU(z) at the same pairs.
        threshold: θ, [d_sae].
        bandwidth: ε, in the units of the pre-activations.
        to_input: whether the estimators also pass gradient to the pre-activations.
        W_dec: [d_sae, d_out].
        dead: latents that have not fired for the trainer's window, [d_sae], or None if not tracked.
        prices: what a firing of each latent costs beside 1 (`control.density`), [d_sae], or None
            where there is no ceiling.
    """

    entries: Entries
    activations: Float[Tensor, "*entries"]
    threshold: Float[Tensor, " d_sae"]
    bandwidth: float
    to_input: bool
    W_dec: Float[Tensor, "d_sae d_out"]
    dead: Bool[Tensor, " d_sae"] | None = None
    prices: Float[Tensor, " d_sae"] | None = None

    def gates(self) -> Float[Tensor, "*entries"]:
        """H(z - θ) with its estimator."""
        theta = self.entries.per_latent(self.threshold)
        return heaviside(self.entries.z, theta, self.bandwidth, self.to_input)

    def l0(self) -> Float[Tensor, " batch"]:
        """Active latents of each token, with the estimator's gradient."""
        return self.entries.sum_latents(self.gates())

    def frequencies(self) -> Float[Tensor, " d_sae"]:
        """Share of the batch's tokens each latent fires on, with the estimator's gradient."""
        return self.entries.sum_tokens(self.gates()) / self.entries.batch

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        return self.W_dec.norm(dim=1)


class Term(Protocol):
    """A summand of the loss, before its coefficient."""

    def __call__(self, step: Step) -> Float[Tensor, ""]: ...


def reconstruction(
    x_hat: Float[Tensor, "batch d_out"],
    target: Float[Tensor, "batch d_out"],
    worth: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over tokens of ‖x̂ - x‖² (arXiv 2407.14435, eq. 9), each times its worth if given."""
    # Fused: half the passes over [batch, d_out], forward and backward, of subtract, square and sum.
    if worth is None:
        return functional.mse_loss(x_hat, target, reduction="sum") / len(x_hat)
    squares = functional.mse_loss(x_hat, target, reduction="none").flatten(1).sum(1)
    return worth @ squares / len(x_hat)


@torch.no_grad()
def token_weights(
    target: Float[Tensor, "batch d_out"], outlier_norm_ratio: float
) -> Float[Tensor, " batch"]:
    """What each token's squared error counts: 1, and less for a token whose norm is more than
    `outlier_norm_ratio` times the batch's median, as if it were no longer than that.

    Language models put norms a hundred times the others' on a few tokens ("massive activations",
    arXiv 2402.17762). Unweighted, one such token in a thousand is most of a batch's gradient.
    """
    norm = target.flatten(1).norm(dim=1)
    longest = outlier_norm_ratio * norm.median()
    worth = (longest / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0).square()
    return torch.where(longest > 0, worth, torch.ones_like(worth))


@dataclass(frozen=True)
class L0:
    """Mean number of active latents (arXiv 2407.14435, eq. 9)."""

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        return step.l0().mean()


@dataclass(frozen=True)
class QuadraticL0:
    """Mean of (2/L0*)(L0 - L0*)² (Gemma Scope 2 technical report)."""

    target: float

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        return (2 / self.target * (step.l0() - self.target) ** 2).mean()


@dataclass(frozen=True)
class TanhL0:
    """Mean of Σ_i tanh(c · f_i · ‖d_i‖) (Anthropic, Circuits Updates January 2025)."""

    scale: float

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        norms = step.entries.per_latent(step.decoder_norms())
        soft_gates = torch.tanh(self.scale * step.activations * norms)
        return step.entries.sum_latents(soft_gates).mean()


@dataclass(frozen=True)
class WithDensityPenalty:
    """A sparsity term plus Σ_i f_i²/w₀, f_i the share of the batch's tokens latent i fires on.

    On `L0` it is Σ_i f_i (1 + f_i/w₀) (Google DeepMind's interpretability team, progress update of
    March 2025): a firing of latent i costs 1 + 2f_i/w₀ where it costs 1 there. Rare latents hardly
    notice, and with w₀ = 0.01 one that fires on 10 % of tokens pays 21 times as much.

    f_i² is the batch's, N tokens, whose mean is f_i² + f_i(1 - f_i)/N: about Σ_i f_i/(N w₀) too
    much, 5 % of L0 at N = 2,048 and w₀ = 0.01, the same for every latent.
    """

    term: Term
    scale: float

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        return self.term(step) + step.frequencies().square().sum() / self.scale


@dataclass(frozen=True)
class WithDensityLimit:
    """A sparsity term plus Σ_i μ_i (f_i - ceiling), f_i as in `WithDensityPenalty` and μ_i the step's
    prices: the Lagrangian of f_i ≤ ceiling.

    A firing costs 1 + μ_i times as much, and on a latent whose price is 0 what it always costs:
    `WithDensityPenalty` with a w₀ that keeps latents under 10 % of tokens also bends the many that fire
    on a few per cent (docs/results.md).
    """

    term: Term
    ceiling: float

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        if step.prices is None:
            return self.term(step)
        return self.term(step) + step.prices @ (step.frequencies() - self.ceiling)


@dataclass(frozen=True)
class PreActivationLoss:
    """Mean of Σ_i ReLU(θ_i - z_i)‖d_i‖: pulls latents towards firing.

    Attributes:
        over: `all` latents, as Anthropic's (January 2025), or `dead` ones, as SAELens restricts it.
    """

    over: str = "dead"

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        weight = step.decoder_norms()
        if self.over == "dead":
            if step.dead is None or not step.dead.any():
                return step.W_dec.new_zeros(())
            weight = weight * step.dead
        return step.entries.threshold_deficit(step.threshold, weight)


@dataclass(frozen=True)
class AuxiliaryLoss:
    """Mean of ‖e - ê‖², ê what dead latents make of the residual e (AuxK; arXiv 2406.04093, A.2).

    ê decodes, for each token, the dead latents with the k largest pre-activations, as far as those
    are positive and whatever their thresholds; k is half the output's width, at most (B.1). e gets
    no gradient. As in SAELens, fewer than k dead latents weigh less, in proportion.
    """

    def __call__(self, step: Step, residual: Float[Tensor, "batch d_out"]) -> Float[Tensor, ""]:
        dead = None if step.dead is None else step.dead.nonzero().squeeze(1)
        if dead is None or not len(dead):
            return step.W_dec.new_zeros(())
        most = max(1, residual.shape[1] // 2)
        z = step.entries.columns(dead)
        top = z.topk(min(most, len(dead)), dim=1, sorted=False)
        activations = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
        rebuilt = activations @ step.W_dec.index_select(0, dead)
        return min(1.0, len(dead) / most) * reconstruction(rebuilt, residual.detach())


# The sparsity terms by the name SAELens' `jumprelu_sparsity_loss_mode` gives them.
SPARSITY_MODES = ("step", "tanh", "quadratic")


def sparsity_term(
    mode: str,
    *,
    target_l0: float | None,
    tanh_scale: float,
    density_penalty_scale: float | None = None,
    max_latent_density: float | None = None,
) -> Term:
    """The sparsity term of a SAELens config, with the frequency penalties it asks for.

    Raises:
        ValueError: the mode is unknown, or `quadratic` has no target.
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
    if density_penalty_scale is not None:
        term = WithDensityPenalty(term, density_penalty_scale)
    if max_latent_density is not None:
        term = WithDensityLimit(term, max_latent_density)
    return term


@dataclass(frozen=True)
class ThresholdSlopes:
    """What raising every threshold together changes: Σ_i ∂/∂θ_i by the estimators, no gradient.

    Attributes:
        l0: of the mean L0.
        penalty: of the sparsity term, before its coefficient.
    """

    l0: Float[Tensor, ""]
    penalty: Float[Tensor, ""]


def threshold_slopes(term: Term, step: Step, penalty: Float[Tensor, ""]) -> ThresholdSlopes:
    """The slopes at this batch; `penalty` is term(step), and its graph stays usable."""

    def slope(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, step.threshold, retain_graph=True)[0].sum()

    of_penalty = slope(penalty)
    of_l0 = of_penalty if isinstance(term, L0) else slope(step.l0().mean())
    return ThresholdSlopes(of_l0, of_penalty)
