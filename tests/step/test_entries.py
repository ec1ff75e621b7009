"""The verbs on active pairs, dense and sparse: which pairs they hold and what they sum."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from jumprelu_plugin.step.estimators import jumprelu
from jumprelu_plugin.step.sparse import SparseEntries, encode_sparse
from tests.step.problems import BATCH, CHUNKS, D_SAE, Problem, encode, problem


@pytest.fixture(params=CHUNKS.values(), ids=CHUNKS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[SparseEntries, Tensor, Tensor, Problem]]:
    """Sparse entries, the dense z, the mask of represented pairs, and the problem."""
    p = problem()
    leaves = p.leaves()
    sparse = encode("sparse", p, leaves, request.param)
    assert isinstance(sparse, SparseEntries)
    z = (p.x - p.b_pre) @ p.W_enc + p.b_enc  # type: ignore[operator]
    represented = torch.zeros(BATCH, D_SAE, dtype=torch.bool)
    represented[sparse.pattern.rows, sparse.pattern.cols] = True
    yield sparse, z, represented, p


def test_represented_are_exactly_the_active_and_the_window(pair) -> None:  # type: ignore[no-untyped-def]
    sparse, z, represented, p = pair
    assert torch.equal(represented, z > p.threshold - p.bandwidth / 2)
    torch.testing.assert_close(sparse.z.detach(), z[represented], rtol=1e-12, atol=1e-13)


def test_pattern_has_no_duplicates_and_is_sorted(pair) -> None:  # type: ignore[no-untyped-def]
    pattern = pair[0].pattern
    flat = pattern.rows * D_SAE + pattern.cols
    assert (flat.diff() > 0).all()


def test_sums_and_broadcast(pair) -> None:  # type: ignore[no-untyped-def]
    sparse, z, represented, p = pair
    values = torch.randn(BATCH, D_SAE, dtype=torch.float64) * represented
    at = values[represented]
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(sparse.sum_latents(at), values.sum(1), **close)
    torch.testing.assert_close(sparse.sum_tokens(at), values.sum(0), **close)
    torch.testing.assert_close(sparse.decode(at, p.W_dec), values @ p.W_dec, **close)
    assert torch.equal(sparse.per_latent(p.threshold), p.threshold.expand(BATCH, -1)[represented])


def test_threshold_deficit_counts_the_pairs_that_are_not_represented(pair) -> None:  # type: ignore[no-untyped-def]
    sparse, z, _, p = pair
    weight = torch.rand(D_SAE, dtype=torch.float64)
    expected = sum(
        weight[i] * max(0.0, float(p.threshold[i] - z[b, i])) / BATCH
        for b in range(BATCH)
        for i in range(D_SAE)
    )
    found = sparse.threshold_deficit(p.threshold, weight)
    torch.testing.assert_close(found.detach(), torch.as_tensor(expected), rtol=1e-12, atol=0.0)


def test_threshold_deficit_without_the_mean_is_refused() -> None:
    p = problem()
    entries = encode_sparse(p.x, p.W_enc, p.b_enc, p.b_pre, p.threshold, p.bandwidth)
    with pytest.raises(ValueError, match="threshold_deficit"):
        entries.threshold_deficit(p.threshold, p.threshold)


def test_as_matrix_is_what_the_trainer_reads(pair) -> None:  # type: ignore[no-untyped-def]
    sparse, z, represented, p = pair
    matrix = sparse.as_matrix(sparse.z)
    assert matrix.is_sparse and matrix.is_coalesced() and not matrix.requires_grad
    assert torch.equal(matrix.to_dense() != 0, represented)
    acts = jumprelu(sparse.z, sparse.per_latent(p.threshold), p.bandwidth)
    active = sparse.as_matrix(acts, where=acts > 0)
    expected = z * (z > p.threshold)
    torch.testing.assert_close(active.to_dense(), expected, rtol=1e-12, atol=1e-13)
    assert active._nnz() == expected.count_nonzero()
    # The trainer's own reductions (SAELens 6.54, `SAETrainer._train_step`).
    fired = active.bool().float()
    assert torch.equal(fired.sum(-2).to_dense(), (expected > 0).float().sum(-2))
