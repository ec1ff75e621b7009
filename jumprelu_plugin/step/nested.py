"""Decoding with inner dictionaries, whose errors are wanted and whose reconstructions are not.

The first m latents of a Matryoshka SAE rebuild the input too, for each width m (arXiv 2503.17547).
Of these reconstructions, [batch, d_out] each, the loss reads the squared errors alone. So they are
made a few columns at a time, are gone when their squares are summed, and are made again for the
gradients: decoding twice is cheaper than keeping them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from jumprelu_plugin.step.pattern import SUM_COLUMNS, Pattern, row_sums, slabs


class NestedDecode(torch.autograd.Function):
    """x̂ = offset + activations @ W_dec, and the mean squared error of each inner dictionary.

    `pattern` has one row for each token and block (`Pattern.in_blocks`), `dictionaries` blocks a
    token, the last of which completes the whole dictionary. `worth` weighs tokens' squared errors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        activations: Tensor,
        W_dec: Tensor,
        offset: Tensor,
        target: Tensor,
        worth: Tensor,
        pattern: Pattern,
        dictionaries: int,
    ) -> tuple[Tensor, Tensor]:
        x_hat = torch.empty_like(target)
        squares = target.new_zeros(len(target), dictionaries - 1)
        made = _residuals(activations, W_dec, offset, target, pattern, dictionaries)
        for columns, _, residuals in made:
            squares += torch.linalg.vector_norm(residuals[:, :-1], dim=2).square()
            torch.add(residuals[:, -1], target[:, columns], out=x_hat[:, columns])
        ctx.save_for_backward(activations, W_dec, offset, target, worth)
        ctx.pattern, ctx.dictionaries = pattern, dictionaries
        return x_hat, worth @ squares / len(target)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, to_x_hat: Tensor, to_errors: Tensor
    ) -> tuple[Tensor | None, ...]:
        activations, W_dec, offset, target, worth = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        order, rows, ends = pattern.by_latent
        in_order = activations[order]
        to_W_dec, to_offset = torch.empty_like(W_dec), torch.empty_like(offset)
        products = pattern.zeros_by_latent(activations)
        of_errors = (2 / len(target)) * worth[:, None, None] * to_errors[:, None]
        made = _residuals(activations, W_dec, offset, target, pattern, ctx.dictionaries)
        for columns, slab, residuals in made:
            # The gradient of what a block decodes to is that of every dictionary it belongs to.
            gradients = residuals
            gradients[:, :-1] *= of_errors
            gradients[:, -1] = to_x_hat[:, columns]
            for inner in reversed(range(ctx.dictionaries - 1)):
                gradients[:, inner] += gradients[:, inner + 1]
            to_offset[..., columns] = (
                gradients[:, 0] if offset.ndim == 2 else gradients[:, 0].sum(0)
            )
            flat = gradients.flatten(0, 1)
            to_W_dec[:, columns] = row_sums(rows, ends, in_order, flat)
            products = torch.sparse.sampled_addmm(products, slab, flat.t())
        to_activations = torch.empty_like(activations)
        to_activations[order] = products.values()
        return to_activations, to_W_dec, to_offset, None, None, None, None


def _residuals(
    activations: Float[Tensor, " nnz"],
    W_dec: Float[Tensor, "d_sae d_out"],
    offset: Float[Tensor, "*batch d_out"],
    target: Float[Tensor, "batch d_out"],
    pattern: Pattern,
    dictionaries: int,
) -> Iterator[
    tuple[slice, Float[Tensor, "d_sae columns"], Float[Tensor, "batch dictionaries columns"]]
]:
    """A few columns at a time: which, of W_dec, and what each dictionary is off by."""
    for columns, slab in slabs(W_dec, SUM_COLUMNS):
        decoded = row_sums(pattern.cols, pattern.row_ends, activations, slab)
        residuals = decoded.view(len(target), dictionaries, -1)
        residuals[:, 0] += offset[..., columns] - target[:, columns]
        for dictionary in range(1, dictionaries):
            residuals[:, dictionary] += residuals[:, dictionary - 1]
        yield columns, slab, residuals
