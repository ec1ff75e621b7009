"""A pattern in buffers of a size known beforehand, with the verbs of `Pattern` by kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from jumprelu_plugin.step.kernels.products import Pieces, row_sums, sampled_product
from jumprelu_plugin.step.pattern import Pattern


@dataclass(frozen=True, kw_only=True)
class BufferedPattern(Pattern):
    """The represented (token, latent) pairs, and unused entries after them.

    An unused entry names some token and latent, so that it can index; its value must be zero
    wherever values are summed. Nothing here waits for the device.

    Attributes:
        token_ends: token t's entries are those from token_ends[t] to token_ends[t + 1].
        latent_order: as in `Pattern`; unused entries come last.
    """

    token_ends: Int[Tensor, " batch+1"]

    @property
    def count(self) -> Int[Tensor, ""]:
        """How many entries are used, on the device."""
        return self.token_ends[-1]

    @cached_property
    def row_ends(self) -> Int[Tensor, " batch+1"]:  # type: ignore[override]
        return self.token_ends

    @cached_property
    def latent_pieces(self) -> Pieces | None:
        """How sums by latent are divided among blocks: a latent that fires on every token of a
        batch would else be one block's work long after the others are done. None, so that sums are
        the same at every run, under `torch.use_deterministic_algorithms(True)`."""
        if torch.are_deterministic_algorithms_enabled():
            return None
        return Pieces.of_sums(self.by_latent[2], len(self.cols))

    @override
    def where(self, kept: Bool[Tensor, " nnz"]) -> tuple[Pattern, Int[Tensor, " kept"]]:
        """A plain pattern of the kept pairs; this waits for the device."""
        used = torch.arange(len(kept), device=kept.device) < self.count
        return super().where(kept & used)

    @override
    def in_blocks(self, ends: Sequence[int]) -> BufferedPattern:
        latents = torch.arange(self.d_sae, device=self.cols.device)
        limits = torch.tensor(list(ends)).to(latents.device, non_blocking=True)
        block = torch.bucketize(latents, limits, right=True)
        rows = self.rows * len(ends) + block[self.cols]
        batch = self.batch * len(ends)
        used = torch.arange(len(rows), device=rows.device) < self.count
        ascending = torch.where(used, rows, batch)
        every = torch.arange(batch + 1, device=rows.device)
        return BufferedPattern(
            pairs=torch.stack((rows, self.cols)),
            batch=batch,
            d_sae=self.d_sae,
            latent_order=self.latent_order,
            token_ends=torch.searchsorted(ascending, every),
        )

    @override
    def times(
        self, values: Float[Tensor, " nnz"], matrix: Float[Tensor, "d_sae k"]
    ) -> Float[Tensor, "batch k"]:
        return row_sums(self.cols, self.row_ends, values.detach(), matrix.detach())

    @override
    def transposed_times(
        self,
        values: Float[Tensor, " nnz"],
        matrix: Float[Tensor, "batch k"],
        center: Float[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "d_sae k"]:
        order, tokens, ends = self.by_latent
        weights = values.detach()[order]
        return row_sums(tokens, ends, weights, matrix.detach(), center, self.latent_pieces)

    @override
    def sampled_product(
        self,
        left: Float[Tensor, "batch k"],
        right: Float[Tensor, "d_sae k"],
        center: Float[Tensor, " k"] | None = None,
    ) -> Float[Tensor, " nnz"]:
        order, _, ends = self.by_latent
        left, right = left.detach(), right.detach()
        return sampled_product(order, self.rows, self.cols, ends[-1], left, right, center)
