"""The (token, latent) pairs of a sparse step, and products restricted to those pairs.

Both kinds of product read the rows of a large matrix in the order of the pairs. On a CPU they are
computed a few columns at a time, so that these columns stay in cache: with 77 pairs a token, 4096
tokens and a 16384 × 2304 matrix (Zen 5, one thread), the weighted sum took 38 ms and the sampled
product 73 ms; PyTorch's CSR operators on whole rows took 200 and 222 ms.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

# Columns at a time on a CPU. A GPU hides the latency of memory, so it processes all at once.
SAMPLE_COLUMNS = 128


@dataclass(frozen=True)
class Pattern:
    """The represented (token, latent) pairs, sorted by token and then by latent.

    Attributes:
        pairs: the tokens (row 0) and latents (row 1).
        batch: number of tokens.
        d_sae: number of latents.
        latent_order: the permutation that sorts the entries by latent, and the offsets of each
            latent's entries in that order; None computes them when they are needed.
    """

    pairs: Int[Tensor, "2 nnz"]
    batch: int
    d_sae: int
    latent_order: tuple[Int[Tensor, " nnz"], Int[Tensor, " d_sae+1"]] | None = None

    @property
    def rows(self) -> Int[Tensor, " nnz"]:
        """The token of each entry."""
        return self.pairs[0]

    @property
    def cols(self) -> Int[Tensor, " nnz"]:
        """The latent of each entry."""
        return self.pairs[1]

    @cached_property
    def row_ends(self) -> Int[Tensor, " batch+1"]:
        """Offsets: token t's entries are those from row_ends[t] to row_ends[t + 1]."""
        return _ends(self.rows, self.batch)

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " nnz"], Int[Tensor, " d_sae+1"]]:
        """The order that sorts entries by latent, their tokens in it, and each latent's offsets."""
        if self.latent_order is None:
            latents, order = torch.sort(_short(self.cols, self.d_sae), stable=True)
            ends = _ends(latents, self.d_sae)
        else:
            order, ends = self.latent_order
        return order, self.rows[order], ends

    def where(self, kept: Bool[Tensor, " nnz"]) -> tuple[Pattern, Int[Tensor, " kept"]]:
        """The pattern of the kept pairs, and their indices in this one."""
        places = kept.nonzero().squeeze(1)
        return Pattern(self.pairs[:, places], self.batch, self.d_sae), places

    def in_blocks(self, ends: Sequence[int]) -> Pattern:
        """The same entries, with each token's row split into one row for each block of latents.

        Row t·len(ends) + k holds the entries of token t in block k, the latents from ends[k - 1]
        (0 for k = 0) to ends[k].
        """
        latents = torch.arange(self.d_sae, device=self.cols.device)
        block = torch.bucketize(latents, latents.new_tensor(ends), right=True)
        rows = self.rows * len(ends) + block[self.cols]
        # The order by latent stays the same, so it is passed on and not sorted again.
        order, _, latent_ends = self.by_latent
        pairs = torch.stack((rows, self.cols))
        return Pattern(pairs, self.batch * len(ends), self.d_sae, (order, latent_ends))

    def times(
        self, values: Float[Tensor, " nnz"], matrix: Float[Tensor, "d_sae k"]
    ) -> Float[Tensor, "batch k"]:
        """V @ matrix, where V [batch, d_sae] holds `values` at the pairs and zeros elsewhere."""
        return _weighted_sums(self.cols, self.row_ends, values, matrix)

    def transposed_times(
        self,
        values: Float[Tensor, " nnz"],
        matrix: Float[Tensor, "batch k"],
        center: Float[Tensor, " k"] | None = None,
    ) -> Float[Tensor, "d_sae k"]:
        """V.T @ (matrix - center), V as in `times`. All calls share one sort."""
        order, tokens, ends = self.by_latent
        return _weighted_sums(tokens, ends, values[order], matrix, center)

    def zeros_by_latent(self, like: Float[Tensor, " nnz"]) -> Float[Tensor, "d_sae batch"]:
        """A sparse CSR matrix with explicit zeros at the pairs, to which products are added."""
        _, tokens, ends = self.by_latent
        _silence_beta_warning()
        shape = (self.d_sae, self.batch)
        zeros = torch.zeros_like(like)
        return torch.sparse_csr_tensor(ends, tokens, zeros, shape, check_invariants=False)

    def sampled_product(
        self,
        left: Float[Tensor, "batch k"],
        right: Float[Tensor, "d_sae k"],
        center: Float[Tensor, " k"] | None = None,
    ) -> Float[Tensor, " nnz"]:
        """((left - center) @ right.T) at the represented pairs only.

        The value at a pair depends on its two vectors alone, not on the other pairs.
        """
        values = left.new_empty(self.cols.numel())
        if self.cols.numel() == 0:
            return values
        # Sorted by latent, the rows of `left` are the ones read out of order. A batch has fewer
        # tokens than latents, so `left` is the smaller matrix and stays in cache.
        order = self.by_latent[0]
        products = self.zeros_by_latent(values)
        left_slabs = slabs(left, SAMPLE_COLUMNS, center)
        right_slabs = slabs(right, SAMPLE_COLUMNS)
        for (_, a), (_, w) in zip(left_slabs, right_slabs, strict=True):
            products = torch.sparse.sampled_addmm(products, w, a.t())
        values[order] = products.values()
        return values


def subtract(
    matrix: Float[Tensor, "rows k"], center: Float[Tensor, " k"] | None
) -> Float[Tensor, "rows k"]:
    """matrix - center, where None stands for zero."""
    return matrix if center is None else matrix - center


def _weighted_sums(
    index: Int[Tensor, " nnz"],
    ends: Int[Tensor, " sums+1"],
    weights: Float[Tensor, " nnz"],
    matrix: Float[Tensor, "rows k"],
    center: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, "sums k"]:
    """Sums of weights · (matrix - center)[index] between consecutive offsets in `ends`."""
    sums = matrix.new_empty(len(ends) - 1, matrix.shape[1])
    for columns, slab in slabs(matrix, sum_columns(matrix), center):
        sums[:, columns] = row_sums(index, ends, weights, slab)
    return sums


def sum_columns(matrix: Float[Tensor, "rows k"]) -> int:
    """Columns at a time of a matrix whose rows are summed on a CPU: 128 if those take no more than
    a megabyte, else 64.

    On a Xeon with 2 MB of L2 cache and one thread, sums of rows of 1,024 tokens took 6.8 ms with
    128 and 10.5 with 64; of 4,096 tokens 170 and 135.
    """
    return 128 if 128 * len(matrix) * matrix.element_size() <= 2**20 else 64


def row_sums(
    index: Int[Tensor, " nnz"],
    ends: Int[Tensor, " sums+1"],
    weights: Float[Tensor, " nnz"],
    matrix: Float[Tensor, "rows k"],
) -> Float[Tensor, "sums k"]:
    """Sums of weights · matrix[index] between consecutive offsets, by PyTorch's embedding bag."""
    return functional.embedding_bag(
        index, matrix, ends, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def slabs(
    matrix: Float[Tensor, "rows k"], columns: int, center: Float[Tensor, " k"] | None = None
) -> Iterator[tuple[slice, Float[Tensor, "rows columns"]]]:
    """Yield matrix - center in contiguous slabs: which columns, and their values.

    On a CPU a slab has `columns` columns; elsewhere one slab holds them all. Every slab reuses the
    memory of the one before, so use it before the next is drawn. Given strided columns, the
    operators would allocate such a copy for each slab, and glibc would keep several times that
    memory: 49 MB in a sampled product whose slabs take 11 MB.
    """
    # Detached, because the embedding bag prepares a backward pass if its weights require gradients.
    matrix = matrix.detach()
    rows, width = matrix.shape
    if matrix.device.type != "cpu":
        yield slice(0, width), subtract(matrix, center)
        return
    buffer = matrix.new_empty(rows * min(columns, width))
    for start in range(0, width, columns):
        piece = slice(start, min(start + columns, width))
        slab = buffer[: rows * (piece.stop - start)].view(rows, -1)
        if center is None:
            slab.copy_(matrix[:, piece])
        else:
            torch.sub(matrix[:, piece], center[piece], out=slab)
        yield piece, slab


def _short(indices: Int[Tensor, " nnz"], size: int) -> Int[Tensor, " nnz"]:
    """The same indices, below `size`, in the shortest type that also holds `size`.

    144,000 of them are sorted in 2.0 ms instead of 6.8 in 16 bits and in 3.5 in 32 (Xeon).
    """
    if size <= torch.iinfo(torch.int16).max:
        return indices.short()
    return indices.int() if size <= torch.iinfo(torch.int32).max else indices


def _ends(ascending: Int[Tensor, " nnz"], size: int) -> Int[Tensor, " size+1"]:
    """For ascending indices, how many are below 0, 1, …, size."""
    bounds = torch.arange(size + 1, dtype=ascending.dtype, device=ascending.device)
    return torch.searchsorted(ascending, bounds)


@cache
def _silence_beta_warning() -> None:
    # PyTorch warns once per process that sparse CSR is in beta. A user cannot act on that.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1))
