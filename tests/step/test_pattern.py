"""Products at a pattern's pairs, over more columns than a slab holds, against dense products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from jumprelu_plugin.step import pattern as module
from jumprelu_plugin.step.pattern import Pattern, sum_columns

BATCH, D_SAE = 37, 101
# One column, less than a slab of either kind, more than one of one kind, more than two of both.
WIDTHS = [1, 61, 127, 293]


def case(width: int, dtype: torch.dtype) -> tuple[Pattern, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    kept = torch.rand(BATCH, D_SAE, generator=g) < 0.13
    found = Pattern(kept.nonzero().t().contiguous(), BATCH, D_SAE)
    x, w, center = normal(BATCH, width), normal(D_SAE, width), 3 * normal(width)
    return found, normal(found.cols.numel()), x, w, center


@pytest.mark.parametrize("width", WIDTHS)
def test_products_are_those_of_dense_matrices(width: int) -> None:
    found, values, x, w, center = case(width, torch.float64)
    V = torch.zeros(BATCH, D_SAE, dtype=torch.float64)
    V[found.rows, found.cols] = values
    products = (x - center) @ w.t()
    torch.testing.assert_close(
        found.sampled_product(x, w, center), products[found.rows, found.cols]
    )
    torch.testing.assert_close(found.transposed_times(values, x, center), V.t() @ (x - center))
    torch.testing.assert_close(found.times(values, w), V @ w)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_centre_taken_slab_by_slab_changes_no_bit(width: int) -> None:
    found, values, x, w, center = case(width, torch.float32)
    centred = x - center
    assert torch.equal(found.sampled_product(x, w, center), found.sampled_product(centred, w))
    by_slab = found.transposed_times(values, x, center)
    assert torch.equal(by_slab, found.transposed_times(values, centred))


def test_a_slab_is_contiguous_and_lies_where_the_last_one_lay() -> None:
    x = torch.randn(7, 131)
    center = torch.randn(131)
    seen = []
    for columns, slab in module.slabs(x, 64, center):
        assert slab.is_contiguous() and torch.equal(slab, (x - center)[:, columns])
        seen.append((columns.start, columns.stop, slab.data_ptr()))
    assert [s[:2] for s in seen] == [(0, 64), (64, 128), (128, 131)]
    assert len({pointer for *_, pointer in seen}) == 1


@pytest.mark.parametrize("d_sae", [32_749, 32_767, 32_768, 65_537])
def test_the_order_by_latent_is_a_stable_sort_at_every_width(d_sae: int) -> None:
    """Indices are sorted in 16 bits where they fit: of 32,768 latents the last offset does not."""
    random = torch.Generator().manual_seed(3)
    tokens = torch.arange(1009).repeat_interleave(3)
    latents = torch.randint(d_sae, (len(tokens),), generator=random)
    latents[:6] = torch.tensor([0, 1, d_sae - 1, 0, d_sae - 2, d_sae - 1])
    order, rows, ends = Pattern(torch.stack((tokens, latents)), 1009, d_sae).by_latent

    expected = np.argsort(latents.numpy(), kind="stable")
    assert np.array_equal(order.numpy(), expected)
    assert np.array_equal(rows.numpy(), tokens.numpy()[expected])
    counts = np.bincount(latents.numpy(), minlength=d_sae)
    assert np.array_equal(ends.numpy(), np.concatenate(([0], np.cumsum(counts))))


def test_sums_over_many_tokens_take_fewer_columns_at_a_time() -> None:
    tokens, width = 2_053, 131
    g = torch.Generator().manual_seed(5)
    kept = torch.rand(tokens, 7, generator=g) < 0.3
    found = Pattern(kept.nonzero().t().contiguous(), tokens, 7)
    values = torch.randn(found.cols.numel(), generator=g, dtype=torch.float64)
    x = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    assert (sum_columns(x), sum_columns(x[:7])) == (64, 128)
    V = torch.zeros(tokens, 7, dtype=torch.float64)
    V[found.rows, found.cols] = values
    torch.testing.assert_close(found.transposed_times(values, x), V.t() @ x)
