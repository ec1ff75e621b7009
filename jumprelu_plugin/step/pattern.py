"""Which (token, latent) pairs a sparse step works on, as PyTorch's CSR operators read them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Which (token, latent) pairs are represented: CSR indices, columns ascending in each row."""

    rows: Int[Tensor, " nnz"]
    cols: Int[Tensor, " nnz"]
    batch: int
    d_sae: int

    @cached_property
    def row_ends(self) -> Int[Tensor, " batch+1"]:
        return _ends(self.rows, self.batch)

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " d_sae+1"]]:
        """The order that sorts entries by latent (tokens ascending within one), and its ends."""
        return torch.sort(self.cols, stable=True)[1], _ends(self.cols, self.d_sae)

    def where(self, kept: Bool[Tensor, " nnz"]) -> Pattern:
        """The pattern of the kept pairs."""
        return Pattern(self.rows[kept], self.cols[kept], self.batch, self.d_sae)

    def csr(self, values: Float[Tensor, " nnz"]) -> Tensor:
        """The [batch, d_sae] matrix with these values, as CSR."""
        return _csr(self.row_ends, self.cols, values, (self.batch, self.d_sae))

    def csr_transposed(self, values: Float[Tensor, " nnz"]) -> Tensor:
        """The [d_sae, batch] transpose, as CSR; the sort is shared by every call."""
        order, ends = self.by_latent
        return _csr(ends, self.rows[order], values[order], (self.d_sae, self.batch))

    def sampled_product(
        self, left: Float[Tensor, "batch k"], right: Float[Tensor, "d_sae k"]
    ) -> Float[Tensor, " nnz"]:
        """(left @ right.T) at the represented pairs only."""
        if self.cols.numel() == 0:
            return left.new_zeros(0)
        pattern = self.csr(left.new_zeros(self.cols.numel()))
        return torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0).values()


def _ends(index: Int[Tensor, " nnz"], size: int) -> Int[Tensor, " size+1"]:
    ends = index.new_zeros(size + 1)
    torch.cumsum(torch.bincount(index, minlength=size), 0, out=ends[1:])
    return ends


def _csr(ends: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    _say_nothing_of_beta()
    return torch.sparse_csr_tensor(ends, columns, values, shape, check_invariants=False)


@cache
def _say_nothing_of_beta() -> None:
    # PyTorch warns once a process that sparse CSR is in beta: nothing a user of this could change.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1))
