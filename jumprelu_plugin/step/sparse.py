"""The fast step: the numbers of `dense.py` from the active pairs and the estimator's window.

Only encoding needs the whole dictionary. A pair (token, latent) affects the rest of the step only
where z > θ - ε/2: above θ the latent is active, and within ε/2 of θ the estimators pass gradient.
Everywhere else the activation, the gate and all their gradients are exactly zero. Therefore:

    z        one dense product, tile by tile, kept only where z > θ - ε/2
    x̂        sparse × dense
    ∂f       sampled dense × dense product at the kept pairs
    ∂W_enc   sparse^T × dense; ∂W_dec likewise
    ∂b_dec   through the encoder is -W_enc ∂b_enc: a matrix-vector product

The products are PyTorch's own operators (`pattern.py`). No [batch, d_sae] tensor is kept for the
backward pass. Nothing is approximated: everything that is left out is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from jumprelu_plugin.step.entries import Entries
from jumprelu_plugin.step.heap import make_room
from jumprelu_plugin.step.matryoshka import PrefixDecode
from jumprelu_plugin.step.pattern import Pattern, subtract
from jumprelu_plugin.step.select import select


class _SelectedPreActivations(torch.autograd.Function):
    """Attaches gradients to the selected z, whose values are already computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_pre: Tensor | None,
        pattern: Pattern,
        z: Tensor,
    ) -> Tensor:
        # The backward pass subtracts b_pre again, so that x - b_pre, [batch, d_in], is not kept.
        ctx.save_for_backward(x, W_enc, b_pre)
        ctx.pattern = pattern
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W_enc, b_pre = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        to_b_enc = grad.new_zeros(pattern.d_sae).index_add_(0, pattern.cols, grad)
        to_W_enc = to_x = to_b_pre = None
        if ctx.needs_input_grad[1]:
            if W_enc.device.type == "cpu":
                make_room(W_enc.nbytes)  # the step's memory peaks here, at the last gradient
            to_W_enc = pattern.transposed_times(grad, x, b_pre).t()
        if ctx.needs_input_grad[0]:
            to_x = pattern.times(grad, W_enc.t())
        if ctx.needs_input_grad[3]:
            to_b_pre = -(W_enc @ to_b_enc)
        return to_x, to_W_enc, to_b_enc, to_b_pre, None, None


class _SparseDecode(torch.autograd.Function):
    """activations @ W_dec for activations on a pattern."""

    @staticmethod
    def forward(ctx: Any, activations: Tensor, W_dec: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(activations, W_dec)
        ctx.pattern = pattern
        return pattern.times(activations, W_dec)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        activations, W_dec = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        grad = grad.contiguous()
        to_activations = to_W_dec = None
        if ctx.needs_input_grad[0]:
            to_activations = pattern.sampled_product(grad, W_dec)
        if ctx.needs_input_grad[1]:
            to_W_dec = pattern.transposed_times(activations, grad)
        return to_activations, to_W_dec, None


class SparseEntries(Entries):
    """The pre-activations above the lower edge of the estimator's window, z [nnz].

    Args:
        z: their values.
        pattern: their tokens and latents.
        mean_z: mean pre-activation of each latent over all tokens; None if it was not computed.
        encode_columns: computes the pre-activations of given latents for every token.
    """

    prefix_decode: ClassVar[type[torch.autograd.Function]] = PrefixDecode

    def __init__(
        self,
        z: Float[Tensor, " nnz"],
        pattern: Pattern,
        mean_z: Float[Tensor, " d_sae"] | None,
        encode_columns: Callable[[Int[Tensor, " n"]], Float[Tensor, "batch n"]],
    ):
        self.z = z
        self.pattern = pattern
        self.batch, self.d_sae = pattern.batch, pattern.d_sae
        self._mean_z = mean_z
        self._encode_columns = encode_columns

    def per_latent(self, values: Float[Tensor, " d_sae"]) -> Float[Tensor, " nnz"]:
        return values.index_select(0, self.pattern.cols)

    def sum_latents(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, " batch"]:
        return values.new_zeros(self.batch).index_add(0, self.pattern.rows, values)

    def sum_tokens(self, values: Float[Tensor, " nnz"]) -> Float[Tensor, " d_sae"]:
        return values.new_zeros(self.d_sae).index_add(0, self.pattern.cols, values)

    def decode(
        self, activations: Float[Tensor, " nnz"], W_dec: Float[Tensor, "d_sae d_out"]
    ) -> Float[Tensor, "batch d_out"]:
        return _SparseDecode.apply(activations, W_dec, self.pattern)  # type: ignore[return-value]

    def decode_blocks(
        self,
        activations: Float[Tensor, " nnz"],
        W_dec: Float[Tensor, "d_sae d_out"],
        ends: Sequence[int],
    ) -> Float[Tensor, "batch blocks d_out"]:
        blocks = self.pattern.in_blocks(ends)
        decoded: Tensor = _SparseDecode.apply(activations, W_dec, blocks)  # type: ignore[assignment]
        return decoded.view(self.batch, len(ends), -1)

    def decode_prefixes(
        self,
        activations: Float[Tensor, " nnz"],
        W_dec: Float[Tensor, "d_sae d_out"],
        offset: Float[Tensor, "*batch d_out"],
        decoder_target: Float[Tensor, "batch d_out"],
        loss_scale: Float[Tensor, " batch"],
        widths: Sequence[int],
    ) -> tuple[Float[Tensor, "batch d_out"], Float[Tensor, " prefixes"]]:
        blocks = self.pattern.in_blocks([*widths, self.d_sae])
        return self.prefix_decode.apply(  # type: ignore[return-value]
            activations, W_dec, offset, decoder_target, loss_scale, blocks, len(widths) + 1
        )

    def columns(self, latents: Int[Tensor, " n"]) -> Float[Tensor, "batch n"]:
        return self._encode_columns(latents)

    def threshold_deficit(
        self, threshold: Float[Tensor, " d_sae"], weight: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, ""]:
        # ReLU(θ - z) = (θ - z) + ReLU(z - θ). The first part is linear in z, so its mean over the
        # tokens needs only the mean pre-activation; the second is zero unless the pair is active.
        if self._mean_z is None:
            raise ValueError(
                "threshold_deficit needs the mean pre-activations: call encode_sparse with "
                "keep_mean=True"
            )
        excess = (self.z - self.per_latent(threshold)).relu()
        linear = (weight * (threshold - self._mean_z)).sum()
        return linear + (excess * self.per_latent(weight)).sum() / self.batch

    def as_matrix(self, values: Float[Tensor, " nnz"], where: Tensor | None = None) -> Tensor:
        pattern, values = self.pattern, values.detach()
        if where is not None:
            pattern, places = pattern.where(where)
            values = values[places]
        # Pairs are sorted and unique by construction. Saying so saves a sort in every sum.
        return torch.sparse_coo_tensor(
            pattern.pairs,
            values,
            (self.batch, self.d_sae),
            is_coalesced=True,
            check_invariants=False,
        )


def encode_sparse(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"] | None,
    threshold: Float[Tensor, " d_sae"],
    bandwidth: float,
    *,
    screen: bool = False,
    keep_mean: bool = False,
    tile_bytes: int | None = None,
) -> SparseEntries:
    """z = (x - b_pre) W_enc + b_enc at the pairs that can contribute to the step.

    Args:
        x, W_enc, b_enc, b_pre: as in `dense.encode_dense`.
        threshold, bandwidth: θ and ε; pairs with z ≤ θ - ε/2 are left out.
        screen: find the pairs in bfloat16 first (`select.py`).
        keep_mean: also compute each latent's mean pre-activation, for `threshold_deficit`.
        tile_bytes: size of the part of the pre-activations that exists at one time.
    """
    edge = lower_edge(threshold, bandwidth)
    pattern, values = select(
        x, W_enc, b_enc, edge, center=b_pre, screen=screen, tile_bytes=tile_bytes
    )
    return SparseEntries(*differentiable(x, W_enc, b_enc, b_pre, pattern, values, keep_mean))


def lower_edge(threshold: Float[Tensor, " d_sae"], bandwidth: float) -> Float[Tensor, " d_sae"]:
    """The value that z must exceed to be represented: slightly below θ - ε/2, detached.

    So rounding of the edge loses no pair. The estimators test every kept pair with the same
    expressions as in the dense step.
    """
    theta = threshold.detach()
    return theta - 0.5 * bandwidth - 1e-6 * (theta.abs() + bandwidth)


def differentiable(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"] | None,
    pattern: Pattern,
    values: Float[Tensor, " nnz"],
    keep_mean: bool,
) -> tuple[Tensor, Pattern, Tensor | None, Callable[[Tensor], Tensor]]:
    """The arguments of `SparseEntries`, from z at the pattern's pairs without gradients."""
    z: Tensor = _SelectedPreActivations.apply(x, W_enc, b_enc, b_pre, pattern, values)  # type: ignore[assignment]
    mean_z = None
    if keep_mean:
        mean_x = x.mean(0) if b_pre is None else x.mean(0) - b_pre
        mean_z = mean_x @ W_enc + b_enc

    def encode_columns(latents: Tensor) -> Tensor:
        # Rows of the transpose, so that the gradient is stored by latent, as the parameter is.
        weight = W_enc.t().index_select(0, latents)
        return subtract(x, b_pre) @ weight.t() + b_enc.index_select(0, latents)

    return z, pattern, mean_z, encode_columns
