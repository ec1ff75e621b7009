"""Decoding with Matryoshka prefixes, for the loss on what the first m latents reconstruct.

The first m latents of a Matryoshka SAE reconstruct the input too, for each width m (arXiv
2503.17547). The loss reads only the squared errors of these reconstructions, [batch, d_out] each.
They are therefore computed a few columns at a time, squared and dropped, and computed again in the
backward pass: decoding twice costs less than keeping them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from jumprelu_plugin.step.pattern import Pattern, row_sums, slabs, sum_columns


class PrefixDecode(torch.autograd.Function):
    """x̂ = offset + activations @ W_dec, and the mean squared error of each prefix.

    The latents are divided into `blocks` consecutive blocks: a prefix ends with each block but the
    last, and all blocks together are the whole dictionary. `pattern` has one row for each token and
    block (`Pattern.in_blocks`). `loss_scale` multiplies each token's squared errors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        activations: Tensor,
        W_dec: Tensor,
        offset: Tensor,
        decoder_target: Tensor,
        loss_scale: Tensor,
        pattern: Pattern,
        blocks: int,
    ) -> tuple[Tensor, Tensor]:
        x_hat = torch.empty_like(decoder_target)
        squares = decoder_target.new_zeros(len(decoder_target), blocks - 1)
        for columns, _, residuals in _residuals(
            activations, W_dec, offset, decoder_target, pattern, blocks
        ):
            squares += torch.linalg.vector_norm(residuals[:, :-1], dim=2).square()
            torch.add(residuals[:, -1], decoder_target[:, columns], out=x_hat[:, columns])
        ctx.save_for_backward(activations, W_dec, offset, decoder_target, loss_scale)
        ctx.pattern, ctx.blocks = pattern, blocks
        return x_hat, loss_scale @ squares / len(decoder_target)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_x_hat: Tensor, grad_errors: Tensor
    ) -> tuple[Tensor | None, ...]:
        activations, W_dec, offset, decoder_target, loss_scale = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        order, rows, ends = pattern.by_latent
        by_latent = activations[order]
        grad_W_dec, grad_offset = torch.empty_like(W_dec), torch.empty_like(offset)
        products = pattern.zeros_by_latent(activations)
        scale = (2 / len(decoder_target)) * loss_scale[:, None, None] * grad_errors[:, None]
        for columns, slab, residuals in _residuals(
            activations, W_dec, offset, decoder_target, pattern, ctx.blocks
        ):
            # A block belongs to every prefix that ends with it or later, so the gradient of what it
            # decodes to is the sum of theirs.
            gradients = residuals
            gradients[:, :-1] *= scale
            gradients[:, -1] = grad_x_hat[:, columns]
            for block in reversed(range(ctx.blocks - 1)):
                gradients[:, block] += gradients[:, block + 1]
            grad_offset[..., columns] = (
                gradients[:, 0] if offset.ndim == 2 else gradients[:, 0].sum(0)
            )
            by_row = gradients.flatten(0, 1)
            grad_W_dec[:, columns] = row_sums(rows, ends, by_latent, by_row)
            products = torch.sparse.sampled_addmm(products, slab, by_row.t())
        grad_activations = torch.empty_like(activations)
        grad_activations[order] = products.values()
        return grad_activations, grad_W_dec, grad_offset, None, None, None, None


def _residuals(
    activations: Float[Tensor, " nnz"],
    W_dec: Float[Tensor, "d_sae d_out"],
    offset: Float[Tensor, "*batch d_out"],
    decoder_target: Float[Tensor, "batch d_out"],
    pattern: Pattern,
    blocks: int,
) -> Iterator[tuple[slice, Float[Tensor, "d_sae columns"], Float[Tensor, "batch blocks columns"]]]:
    """A few output columns at a time: the columns, W_dec there, and each prefix's residual.

    The last of the `blocks` residuals is that of the whole dictionary.
    """
    for columns, slab in slabs(W_dec, sum_columns(W_dec)):
        decoded = row_sums(pattern.cols, pattern.row_ends, activations, slab)
        residuals = decoded.view(len(decoder_target), blocks, -1)
        residuals[:, 0] += offset[..., columns] - decoder_target[:, columns]
        for block in range(1, blocks):
            residuals[:, block] += residuals[:, block - 1]
        yield columns, slab, residuals
