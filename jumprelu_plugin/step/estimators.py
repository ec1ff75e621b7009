"""The two straight-through estimators of JumpReLU training, elementwise.

In the notation of "Jumping Ahead" (arXiv 2407.14435), z is a pre-activation, θ its latent's
threshold, ε the bandwidth, H the Heaviside step and K the rectangle kernel, 1 on (-1/2, 1/2).

    jumprelu(z) = z H(z - θ)        ∂/∂θ := -(θ/ε) K((z - θ)/ε)        (eq. 11)
    heaviside(z) = H(z - θ)         ∂/∂θ := -(1/ε) K((z - θ)/ε)        (eq. 12)

In the paper no estimator gradient reaches z. With `to_input` above 0 z receives that share of it
with the opposite sign: both functions depend on the sign of z - θ. In Anthropic's January 2025
recipe it is 1.

Both functions broadcast θ against z. They take a dense batch of pre-activations [batch, d_sae] with
θ [d_sae], and selected entries [nnz] with θ gathered to [nnz].
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def in_window(
    z: Float[Tensor, "*entries"], threshold: Float[Tensor, "..."], bandwidth: float
) -> Bool[Tensor, "*entries"]:
    """Mask of K((z - θ)/ε) = 1: z lies less than ε/2 above or below θ."""
    distance = (z - threshold) / bandwidth
    return (distance > -0.5) & (distance < 0.5)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float, to_input: float
    ) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return z * (z > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        z, threshold = ctx.saved_tensors
        inside = in_window(z, threshold, ctx.bandwidth).to(grad.dtype)
        jump = (threshold / ctx.bandwidth) * inside * grad
        to_z = (z > threshold) * grad
        if ctx.to_input:
            to_z = to_z + ctx.to_input * jump
        return to_z, (-jump).sum_to_size(threshold.shape), None, None


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float, to_input: float
    ) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return (z > threshold).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor, None, None]:
        z, threshold = ctx.saved_tensors
        inside = in_window(z, threshold, ctx.bandwidth).to(grad.dtype)
        jump = (1.0 / ctx.bandwidth) * inside * grad
        return (
            ctx.to_input * jump if ctx.to_input else None,
            (-jump).sum_to_size(threshold.shape),
            None,
            None,
        )


def jumprelu(
    z: Float[Tensor, "*entries"],
    threshold: Float[Tensor, "..."],
    bandwidth: float,
    to_input: float = 0.0,
) -> Float[Tensor, "*entries"]:
    """z where z > θ, else 0, with the estimator of eq. 11 in the backward pass."""
    return _JumpReLU.apply(z, threshold, bandwidth, to_input)  # type: ignore[return-value]


def heaviside(
    z: Float[Tensor, "*entries"],
    threshold: Float[Tensor, "..."],
    bandwidth: float,
    to_input: float = 0.0,
) -> Float[Tensor, "*entries"]:
    """1 where z > θ, else 0, with the estimator of eq. 12 in the backward pass."""
    return _Heaviside.apply(z, threshold, bandwidth, to_input)  # type: ignore[return-value]
