"""The dense step: the definition of what a step computes, and the reference for the fast paths.

It keeps every pre-activation, [batch, d_sae], and leaves the gradients to PyTorch's autograd. A
step takes five [batch, d_in, d_sae] matrix products. It is deliberately not optimized.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from jumprelu_plugin.step.entries import Entries


class DenseEntries(Entries):
    """Every pre-activation of a batch, z [batch, d_sae]."""

    def __init__(self, z: Float[Tensor, "batch d_sae"]):
        self.z = z
        self.batch, self.d_sae = z.shape

    def per_latent(self, values: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        return values

    def sum_latents(self, values: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " batch"]:
        return values.sum(-1)

    def sum_tokens(self, values: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " d_sae"]:
        return values.sum(0)

    def decode(
        self, activations: Float[Tensor, "batch d_sae"], W_dec: Float[Tensor, "d_sae d_out"]
    ) -> Float[Tensor, "batch d_out"]:
        return activations @ W_dec

    def decode_blocks(
        self,
        activations: Float[Tensor, "batch d_sae"],
        W_dec: Float[Tensor, "d_sae d_out"],
        ends: Sequence[int],
    ) -> Float[Tensor, "batch blocks d_out"]:
        starts = [0, *ends[:-1]]
        blocks = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
        return torch.stack([activations[:, block] @ W_dec[block] for block in blocks], dim=1)

    def decode_prefixes(
        self,
        activations: Float[Tensor, "batch d_sae"],
        W_dec: Float[Tensor, "d_sae d_out"],
        offset: Float[Tensor, "*batch d_out"],
        decoder_target: Float[Tensor, "batch d_out"],
        loss_scale: Float[Tensor, " batch"],
        widths: Sequence[int],
    ) -> tuple[Float[Tensor, "batch d_out"], Float[Tensor, " prefixes"]]:
        x_hat, start, errors = offset, 0, []
        for width in widths:
            x_hat = x_hat + activations[:, start:width] @ W_dec[start:width]
            errors.append((loss_scale * (x_hat - decoder_target).square().sum(1)).mean())
            start = width
        return x_hat + activations[:, start:] @ W_dec[start:], torch.stack(errors)

    def columns(self, latents: Int[Tensor, " n"]) -> Float[Tensor, "batch n"]:
        return self.z.index_select(1, latents)

    def threshold_deficit(
        self, threshold: Float[Tensor, " d_sae"], weight: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, ""]:
        return ((threshold - self.z).relu() * weight).sum(-1).mean()

    def as_matrix(
        self, values: Float[Tensor, "batch d_sae"], where: Tensor | None = None
    ) -> Float[Tensor, "batch d_sae"]:
        return values.detach()


def encode_dense(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"] | None,
) -> DenseEntries:
    """z = (x - b_pre) W_enc + b_enc at every pair.

    Args:
        x: the encoder's input.
        W_enc: encoder weights.
        b_enc: encoder biases.
        b_pre: b_dec where the encoder subtracts it, else None.
    """
    centered = x if b_pre is None else x - b_pre
    return DenseEntries(torch.addmm(b_enc, centered, W_enc))
