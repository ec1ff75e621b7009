"""Decoding with Matryoshka prefixes: all prefixes' errors in one sweep, all gradients in another.

The plain routine (`step/matryoshka.py`) goes over the columns a few at a time, and over all pairs
for each. Here one block computes a slab of columns of one token. It adds the latents prefix by
prefix and keeps the residual in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from jumprelu_plugin.step.kernels import interpreted
from jumprelu_plugin.step.kernels.products import row_sums, sampled_product
from jumprelu_plugin.step.kernels.tuning import jit

if TYPE_CHECKING:
    from jumprelu_plugin.step.kernels.pattern import BufferedPattern


@jit
def _add_block(
    residual, cols, values, weight, first, last, column, columns,
    ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """residual + the decoded entries from `first` to `last`."""
    decoded = tl.zeros([ENTRIES, COLUMNS], tl.float32)
    for start in range(first, last, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        value = tl.load(values + entry, mask=entry < last, other=0.0)
        used = value != 0.0
        row = tl.load(cols + entry, mask=used, other=0).to(tl.int64)
        inside = used[:, None] & (column < columns)[None, :]
        at = weight + row[:, None] * columns + column[None, :]
        decoded += value[:, None] * tl.load(at, mask=inside, other=0.0)
    return residual + tl.sum(decoded, 0)


@jit
def _errors_kernel(
    cols, ends, values, weight, offset, target, x_hat, squares, columns, offset_stride,
    BLOCKS: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    wanted = tl.load(target + token * columns + column, mask=inside, other=0.0)
    residual = tl.load(offset + token * offset_stride + column, mask=inside, other=0.0) - wanted
    slab = token * tl.num_programs(1) + tl.program_id(1)
    for block in range(BLOCKS):
        first = tl.load(ends + token * BLOCKS + block)
        last = tl.load(ends + token * BLOCKS + block + 1)
        residual = _add_block(
            residual, cols, values, weight, first, last, column, columns, ENTRIES, COLUMNS
        )
        tl.store(squares + slab * BLOCKS + block, tl.sum(residual * residual, 0))
    tl.store(x_hat + token * columns + column, residual + wanted, mask=inside)


@jit
def _gradients_kernel(
    cols, ends, values, weight, offset, target, scale, grad_x_hat, gradients, columns,
    offset_stride, BLOCKS: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of what each block of latents decodes to, from the residuals, computed again."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    wanted = tl.load(target + token * columns + column, mask=inside, other=0.0)
    residual = tl.load(offset + token * offset_stride + column, mask=inside, other=0.0) - wanted
    for block in range(BLOCKS - 1):
        first = tl.load(ends + token * BLOCKS + block)
        last = tl.load(ends + token * BLOCKS + block + 1)
        residual = _add_block(
            residual, cols, values, weight, first, last, column, columns, ENTRIES, COLUMNS
        )
        of_block = tl.load(scale + token * (BLOCKS - 1) + block) * residual
        tl.store(gradients + (token * BLOCKS + block) * columns + column, of_block, mask=inside)
    # A block belongs to every prefix that ends with it or later: sum from the last block back.
    total = tl.load(grad_x_hat + token * columns + column, mask=inside, other=0.0)
    tl.store(gradients + (token * BLOCKS + BLOCKS - 1) * columns + column, total, mask=inside)
    tl.debug_barrier()  # what this block stored is now visible to all of its threads
    for back in range(BLOCKS - 1):
        at = gradients + (token * BLOCKS + BLOCKS - 2 - back) * columns + column
        total += tl.load(at, mask=inside, other=0.0)
        tl.store(at, total, mask=inside)


def _sizes(columns: int) -> dict[str, int]:
    if interpreted():
        return {"ENTRIES": 32, "COLUMNS": 16}
    return {"ENTRIES": 8, "COLUMNS": min(256, max(16, triton.next_power_of_2(columns)))}


class PrefixDecodeKernel(torch.autograd.Function):
    """`step.matryoshka.PrefixDecode` by kernels; the arguments are the same, all in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        activations: Tensor,
        W_dec: Tensor,
        offset: Tensor,
        decoder_target: Tensor,
        loss_scale: Tensor,
        pattern: BufferedPattern,
        blocks: int,
    ) -> tuple[Tensor, Tensor]:
        W_dec, offset = W_dec.contiguous(), offset.contiguous()
        decoder_target = decoder_target.contiguous()
        batch, columns = decoder_target.shape
        sizes = _sizes(columns)
        slabs = triton.cdiv(columns, sizes["COLUMNS"])
        x_hat = torch.empty_like(decoder_target)
        squares = decoder_target.new_empty(batch, slabs, blocks)
        _errors_kernel[(batch, slabs)](
            pattern.cols, pattern.row_ends, activations, W_dec, offset, decoder_target, x_hat,
            squares, columns, _offset_stride(offset), BLOCKS=blocks, **sizes,
        )  # fmt: skip
        ctx.save_for_backward(activations, W_dec, offset, decoder_target, loss_scale)
        ctx.pattern, ctx.blocks = pattern, blocks
        return x_hat, loss_scale @ squares.sum(1)[:, :-1] / batch

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_x_hat: Tensor, grad_errors: Tensor
    ) -> tuple[Tensor | None, ...]:
        activations, W_dec, offset, decoder_target, loss_scale = ctx.saved_tensors
        pattern: BufferedPattern = ctx.pattern
        batch, columns = decoder_target.shape
        sizes = _sizes(columns)
        scale = (2 / batch) * loss_scale[:, None] * grad_errors
        gradients = decoder_target.new_empty(batch * ctx.blocks, columns)
        _gradients_kernel[(batch, triton.cdiv(columns, sizes["COLUMNS"]))](
            pattern.cols, pattern.row_ends, activations, W_dec, offset, decoder_target, scale,
            grad_x_hat.contiguous(), gradients, columns, _offset_stride(offset),
            BLOCKS=ctx.blocks, **sizes,
        )  # fmt: skip
        order, rows, ends = pattern.by_latent
        to_W_dec = row_sums(rows, ends, activations[order], gradients, pieces=pattern.latent_pieces)
        to_activations = sampled_product(
            order, pattern.rows, pattern.cols, ends[-1], gradients, W_dec
        )
        of_token = gradients.view(batch, ctx.blocks, columns)[:, 0]
        to_offset = of_token if offset.ndim == 2 else of_token.sum(0)
        return to_activations, to_W_dec, to_offset, None, None, None, None


def _offset_stride(offset: Float[Tensor, "*batch d_out"]) -> int:
    return offset.shape[1] if offset.ndim == 2 else 0
