"""JumpReLU and the step at pairs, with their straight-through estimators, in one pass each.

What `step/estimators.py` computes of z and of θ gathered to the pairs, in a dozen operators for a
backward pass, one kernel computes here of z, θ and the pairs' latents. It sums the gradient of θ by
latent on the way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from jumprelu_plugin.step.kernels.tuning import jit

BLOCK = 1024


@jit
def _forward_kernel(z, cols, threshold, out, capacity, JUMP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < capacity
    value = tl.load(z + at, mask=inside, other=0.0)
    theta = tl.load(threshold + tl.load(cols + at, mask=inside, other=0), mask=inside, other=0.0)
    active = (value > theta).to(tl.float32)
    tl.store(out + at, value * active if JUMP else active, mask=inside)


@jit
def _backward_kernel(
    z, cols, threshold, grad, to_z, to_threshold, capacity, bandwidth, share,
    JUMP: tl.constexpr, TO_INPUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < capacity
    value = tl.load(z + at, mask=inside, other=0.0)
    col = tl.load(cols + at, mask=inside, other=0)
    theta = tl.load(threshold + col, mask=inside, other=0.0)
    g = tl.load(grad + at, mask=inside, other=0.0)
    # Rounded as PyTorch divides, so that the same pairs are in the window.
    distance = tl.div_rn(value - theta, bandwidth)
    in_window = (distance > -0.5) & (distance < 0.5) & inside
    if JUMP:
        jump = tl.where(in_window, theta / bandwidth * g, 0.0)
        through = tl.where(value > theta, g, 0.0)
    else:
        jump = tl.where(in_window, g / bandwidth, 0.0)
        through = tl.zeros([BLOCK], tl.float32)
    if TO_INPUT:
        through += share * jump
    if JUMP or TO_INPUT:
        tl.store(to_z + at, through, mask=inside)
    tl.atomic_add(to_threshold + col, -jump, mask=in_window)


class AtPairs(torch.autograd.Function):
    """`estimators.jumprelu` or `estimators.heaviside` at pairs, in float32.

    The gradients of θ are added in any order, so their last bits can differ between runs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Float[Tensor, " capacity"],
        threshold: Float[Tensor, " d_sae"],
        cols: Int[Tensor, " capacity"],
        bandwidth: float,
        to_input: float,
        jump: bool,
    ) -> Float[Tensor, " capacity"]:
        z, threshold = z.contiguous(), threshold.contiguous()
        ctx.save_for_backward(z, threshold, cols)
        ctx.bandwidth, ctx.to_input, ctx.jump = bandwidth, to_input, jump
        out = torch.empty_like(z)
        _forward_kernel[(triton.cdiv(len(z), BLOCK),)](
            z, cols, threshold, out, len(z), JUMP=jump, BLOCK=BLOCK
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, threshold, cols = ctx.saved_tensors
        grad = grad.contiguous()
        to_threshold = torch.zeros_like(threshold)
        to_z = torch.empty_like(z) if ctx.jump or ctx.to_input else None
        _backward_kernel[(triton.cdiv(len(z), BLOCK),)](
            z, cols, threshold, grad, z if to_z is None else to_z, to_threshold, len(z),
            ctx.bandwidth, ctx.to_input, JUMP=ctx.jump, TO_INPUT=ctx.to_input > 0, BLOCK=BLOCK,
        )  # fmt: skip
        return to_z, to_threshold, None, None, None, None
