"""The interface through which the loss reads the pre-activations of a step.

The loss does not depend on how pre-activations are stored. It reads *entries*: a tensor with one
value for each represented (token, latent) pair, and the operations below. `dense.py` represents
every pair ([batch, d_sae] values), `sparse.py` only those that can contribute ([nnz] values). Each
loss term is written once against this interface, so all paths compute the same loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jumprelu_plugin.step.estimators import heaviside, jumprelu


class Entries(ABC):
    """Pre-activations z of a batch at the represented (token, latent) pairs.

    Attributes:
        z: pre-activations, [batch, d_sae] or [nnz], differentiable in W_enc, b_enc and, where the
            encoder subtracts it, b_dec.
        batch: number of tokens.
        d_sae: number of latents.
    """

    z: Float[Tensor, "*entries"]
    batch: int
    d_sae: int

    @abstractmethod
    def per_latent(self, values: Float[Tensor, " d_sae"]) -> Float[Tensor, "..."]:
        """Expand one value per latent to a tensor that broadcasts against `z`."""

    def activations(
        self, threshold: Float[Tensor, " d_sae"], bandwidth: float, to_input: float
    ) -> Float[Tensor, "*entries"]:
        """JumpReLU(z) with its estimator; see `estimators.jumprelu`."""
        return jumprelu(self.z, self.per_latent(threshold), bandwidth, to_input)

    def gates(
        self, threshold: Float[Tensor, " d_sae"], bandwidth: float, to_input: float
    ) -> Float[Tensor, "*entries"]:
        """H(z - θ) with its estimator; see `estimators.heaviside`."""
        return heaviside(self.z, self.per_latent(threshold), bandwidth, to_input)

    @abstractmethod
    def sum_latents(self, values: Float[Tensor, "*entries"]) -> Float[Tensor, " batch"]:
        """The sum of entry values over each token's latents."""

    @abstractmethod
    def sum_tokens(self, values: Float[Tensor, "*entries"]) -> Float[Tensor, " d_sae"]:
        """The sum of entry values over each latent's tokens."""

    @abstractmethod
    def decode(
        self, activations: Float[Tensor, "*entries"], W_dec: Float[Tensor, "d_sae d_out"]
    ) -> Float[Tensor, "batch d_out"]:
        """activations @ W_dec, differentiable in both."""

    @abstractmethod
    def decode_blocks(
        self,
        activations: Float[Tensor, "*entries"],
        W_dec: Float[Tensor, "d_sae d_out"],
        ends: Sequence[int],
    ) -> Float[Tensor, "batch blocks d_out"]:
        """What each block of latents decodes to, differentiable in both.

        Args:
            ends: where each block ends, ascending; the last is d_sae.
        """

    @abstractmethod
    def decode_prefixes(
        self,
        activations: Float[Tensor, "*entries"],
        W_dec: Float[Tensor, "d_sae d_out"],
        offset: Float[Tensor, "*batch d_out"],
        decoder_target: Float[Tensor, "batch d_out"],
        loss_scale: Float[Tensor, " batch"],
        widths: Sequence[int],
    ) -> tuple[Float[Tensor, "batch d_out"], Float[Tensor, " prefixes"]]:
        """offset + activations @ W_dec, and the error of each Matryoshka prefix.

        The prefix of width m decodes the first m latents. Its error is the mean over tokens of
        loss_scale · ‖offset + activations[:m] @ W_dec[:m] - decoder_target‖².

        Args:
            activations: JumpReLU(z) at the represented pairs.
            offset: what the decoder adds to the decoded latents, b_dec or one row a token.
            decoder_target: what offset + activations @ W_dec is to equal.
            loss_scale: the factor of each token's squared error.
            widths: the prefixes' widths, ascending, without d_sae.

        Returns:
            The whole dictionary's reconstruction and the prefixes' errors, both differentiable in
            activations, W_dec and offset.
        """

    @abstractmethod
    def columns(self, latents: Int[Tensor, " n"]) -> Float[Tensor, "batch n"]:
        """Pre-activations of these latents at every token, represented or not; differentiable."""

    @abstractmethod
    def threshold_deficit(
        self, threshold: Float[Tensor, " d_sae"], weight: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, ""]:
        """Σ_i weight_i · mean over tokens of ReLU(θ_i - z_i), over all pairs, represented or not.

        Raises:
            ValueError: the entries were computed without what this needs.
        """

    @abstractmethod
    def as_matrix(self, values: Float[Tensor, "*entries"], where: Tensor | None = None) -> Tensor:
        """Entry values as SAELens' trainer reads them: [batch, d_sae], dense or COO, detached.

        `where` masks the entries to keep. A sparse result leaves out the others, which must be
        zero; a dense result ignores it.
        """

    def counts(self, active: Bool[Tensor, "*entries"]) -> Int[Tensor, " n"]:
        """What a `counting.PairCount` counts, on the device; the host does not wait for it.

        Args:
            active: the mask that `as_matrix` will be given.

        Returns:
            How many pairs are active; whether a buffer was too small for all pairs that belong
            here (1 or 0); then what `take_counts` wants to know besides.
        """
        pairs = active.sum()
        return torch.stack((pairs, torch.zeros_like(pairs)))

    def take_counts(self, counts: Sequence[int]) -> None:  # noqa: B027
        """Take in what `counts` gave, as soon as the host has it."""


class BufferOverflow(Exception):
    """A step found more pairs than its buffers had room for, so its results are incomplete."""
