"""The sparse step's entries in buffers, and the check that these had room for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from jumprelu_plugin.step.kernels.buffers import PairBuffers
from jumprelu_plugin.step.kernels.estimators import AtPairs
from jumprelu_plugin.step.kernels.pattern import BufferedPattern
from jumprelu_plugin.step.kernels.prefixes import PrefixDecodeKernel
from jumprelu_plugin.step.kernels.selection import select_into
from jumprelu_plugin.step.sparse import SparseEntries, differentiable, lower_edge


class BufferedEntries(SparseEntries):
    """The represented pre-activations, with unused entries after them, z [capacity].

    An unused entry's z is below every threshold, so its activation, its gate and its gradients are
    zero. Nothing in a step waits for the host to know how many entries are used:
    `counting.PairCount` copies that number while the device goes on, and after it no shape is
    unknown.

    Args:
        z, pattern, mean_z, encode_columns: as in `SparseEntries`.
        candidates: how many pairs could exceed the edge, on the device.
        buffers: told how many candidates there were.
    """

    pattern: BufferedPattern
    prefix_decode = PrefixDecodeKernel

    def __init__(
        self,
        z: Float[Tensor, " capacity"],
        pattern: BufferedPattern,
        mean_z: Float[Tensor, " d_sae"] | None,
        encode_columns: Callable[[Int[Tensor, " n"]], Float[Tensor, "batch n"]],
        candidates: Int[Tensor, ""],
        buffers: PairBuffers,
    ):
        super().__init__(z, pattern, mean_z, encode_columns)
        self._candidates, self._buffers = candidates, buffers
        self._kept: int | None = None
        self._active: Tensor | None = None
        self._n_active = 0

    @override
    def activations(
        self, threshold: Float[Tensor, " d_sae"], bandwidth: float, to_input: float
    ) -> Float[Tensor, " capacity"]:
        return self._at_pairs(threshold, bandwidth, to_input, jump=True)

    @override
    def gates(
        self, threshold: Float[Tensor, " d_sae"], bandwidth: float, to_input: float
    ) -> Float[Tensor, " capacity"]:
        return self._at_pairs(threshold, bandwidth, to_input, jump=False)

    def _at_pairs(
        self, threshold: Tensor, bandwidth: float, to_input: float, *, jump: bool
    ) -> Float[Tensor, " capacity"]:
        if torch.are_deterministic_algorithms_enabled():
            base = super()
            return (base.activations if jump else base.gates)(threshold, bandwidth, to_input)
        cols = self.pattern.cols
        return AtPairs.apply(self.z, threshold, cols, bandwidth, to_input, jump)  # type: ignore[return-value]

    @override
    def counts(self, active: Bool[Tensor, " capacity"]) -> Int[Tensor, " 4"]:
        self._active, pairs, used = active, active.sum(), self.pattern.count
        overflows = (self._candidates > len(active)).to(pairs.dtype)
        return torch.stack((pairs, overflows, self._candidates, used))

    @override
    def take_counts(self, counts: Sequence[int]) -> None:
        self._n_active, _, candidates, self._kept = counts
        self._buffers.adapt(candidates)

    @override
    def as_matrix(self, values: Float[Tensor, " capacity"], where: Tensor | None = None) -> Tensor:
        pairs, values = self.pattern.pairs, values.detach()
        if where is not None:
            places = self._places(where)
        else:
            kept = int(self.pattern.count) if self._kept is None else self._kept
            places = slice(0, kept)
        return torch.sparse_coo_tensor(
            pairs[:, places],
            values[places],
            (self.batch, self.d_sae),
            is_coalesced=True,
            check_invariants=False,
        )

    def _places(self, where: Bool[Tensor, " capacity"]) -> Int[Tensor, " true"]:
        """The indices at which the mask is True; without waiting, if it is the one counted."""
        if self._active is not where:
            return where.nonzero().squeeze(1)
        size = self._n_active
        every = torch.arange(len(where), device=where.device)
        to = torch.where(where, where.cumsum(0) - 1, size)
        return every.new_empty(size + 1).scatter_(0, to, every)[:size]


def encode_buffered(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_pre: Float[Tensor, " d_in"] | None,
    threshold: Float[Tensor, " d_sae"],
    bandwidth: float,
    buffers: PairBuffers,
    *,
    keep_mean: bool = False,
) -> BufferedEntries:
    """`sparse.encode_sparse` by kernels: the same pairs, in buffers.

    Args:
        x, W_enc, b_enc, b_pre, threshold, bandwidth, keep_mean: as in `encode_sparse`, in float32.
        buffers: the size of this dictionary's buffers.
    """
    capacity = buffers.room(len(x), W_enc.shape[1])
    edge = lower_edge(threshold, bandwidth)
    pattern, values, candidates = select_into(capacity, x, W_enc, b_enc, edge, center=b_pre)
    z, _, mean_z, encode_columns = differentiable(
        x, W_enc, b_enc, b_pre, pattern, values, keep_mean
    )
    return BufferedEntries(z, pattern, mean_z, encode_columns, candidates, buffers)
