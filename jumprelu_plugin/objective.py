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
    """

    entries: Entries
    activations: Float[Tensor, "*entries"]
    threshold: Float[Tensor, " d_sae"]
    bandwidth: float
    to_input: bool
    W_dec: Float[Tensor, "d_sae d_out"]
    dead: Bool[Tensor, " d_sae"] | None = None

    def gates(self) -> Float[Tensor, "*entries"]:
        """H(z - θ) with its estimator."""
        theta = self.entries.per_latent(self.threshold)
        return heaviside(self.entries.z, theta, self.bandwidth, self.to_input)

    def l0(self) -> Float[Tensor, " batch"]:
        """Active latents of each token, with the estimator's gradient."""
        return self.entries.sum_latents(self.gates())

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        return self.W_dec.norm(dim=1)


class Term(Protocol):
    """A summand of the loss, before its coefficient."""

    def __call__(self, step: Step) -> Float[Tensor, ""]: ...


def reconstruction(
    x_hat: Float[Tensor, "batch d_out"], target: Float[Tensor, "batch d_out"]
) -> Float[Tensor, ""]:
    """Mean over tokens of ‖x̂ - x‖² (arXiv 2407.14435, eq. 9)."""
    # Fused: half the passes over [batch, d_out], forward and backward, of subtract, square and sum.
    return functional.mse_loss(x_hat, target, reduction="sum") / len(x_hat)


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
class PreActivationLoss:
    """Mean of Σ_i ReLU(θ_i - z_i)‖d_i‖ over dead latents: pulls them back towards firing.

    Anthropic's (January 2025) runs over all latents; SAELens restricts it to dead ones, and so
    does this.
    """

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        if step.dead is None or not step.dead.any():
            return step.W_dec.new_zeros(())
        weight = step.decoder_norms() * step.dead
        return step.entries.shortfall(step.threshold, weight)


# The sparsity terms by the name SAELens' `jumprelu_sparsity_loss_mode` gives them.
SPARSITY_MODES = ("step", "tanh", "quadratic")


def sparsity_term(mode: str, *, target_l0: float | None, tanh_scale: float) -> Term:
    """The sparsity term of a SAELens config.

    Raises:
        ValueError: the mode is unknown, or `quadratic` has no target.
    """
    if mode == "step":
        return L0()
    if mode == "tanh":
        return TanhL0(tanh_scale)
    if mode == "quadratic":
        if target_l0 is None:
            raise ValueError("jumprelu_sparsity_loss_mode='quadratic' needs target_l0")
        return QuadraticL0(target_l0)
    raise ValueError(
        f"jumprelu_sparsity_loss_mode is {mode!r}; it must be one of {', '.join(SPARSITY_MODES)}"
    )
