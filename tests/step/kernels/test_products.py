"""Inner products at pairs and weighted sums, by kernel and plain, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from jumprelu_plugin.control.decoder_norm import normalize_rows_, remove_parallel_gradient_
from jumprelu_plugin.step.kernels import products
from tests.step.kernels.cases import (
    BATCH,
    D_SAE,
    EMPTY_TOKEN,
    NEVER,
    assert_three_way,
    buffered,
    normal,
    padded,
    pattern,
)


@pytest.fixture(params=[False, True], ids=["in pieces", "deterministic"])
def deterministic(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[bool]:
    # So that the latent that always fires is divided.
    monkeypatch.setattr(products, "LONGEST_PIECE", 13)
    torch.use_deterministic_algorithms(request.param, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("width", [1, pytest.param(53, marks=pytest.mark.kernels)])
def test_sums_by_token_and_by_latent(width: int, deterministic: bool) -> None:
    plain = pattern()
    found = buffered(plain)
    values = normal(plain.cols.numel(), seed=5)
    values[::3] = 0.0  # a latent in the window below θ
    w, x, center = (
        normal(D_SAE, width, seed=7),
        normal(BATCH, width, seed=11),
        normal(width, seed=13),
    )
    assert_three_way(
        found.times(padded(values), w),
        plain.times(values, w),
        plain.times(values.double(), w.double()),
    )
    by_latent = found.transposed_times(padded(values), x, center)
    assert_three_way(
        by_latent,
        plain.transposed_times(values, x, center),
        plain.transposed_times(values.double(), x.double(), center.double()),
    )
    assert not by_latent[NEVER].any() and not found.times(padded(values), w)[EMPTY_TOKEN].any()


@pytest.mark.parametrize("width", [1, 53])
def test_products_at_pairs(width: int) -> None:
    plain = pattern()
    found = buffered(plain)
    x, w, center = (
        normal(BATCH, width, seed=17),
        normal(D_SAE, width, seed=19),
        normal(width, seed=23),
    )
    values = found.sampled_product(x, w, center)
    used = plain.cols.numel()
    assert_three_way(
        values[:used],
        plain.sampled_product(x, w, center),
        plain.sampled_product(x.double(), w.double(), center.double()),
    )
    assert not values[used:].any()


def test_a_product_depends_on_its_pair_alone() -> None:
    """So that the same pair has the same last bit whatever else is a candidate."""
    few, many = pattern(0.13), pattern(0.6)
    x, w = normal(BATCH, 53, seed=29), normal(D_SAE, 53, seed=31)
    every = torch.full((BATCH, D_SAE), torch.nan, device=x.device)
    for found in (many, few):
        values = buffered(found).sampled_product(x, w)[: found.cols.numel()]
        before = every[found.rows, found.cols]
        same = (values == before) | before.isnan()
        assert same.all()
        every[found.rows, found.cols] = values


def test_unit_rows_and_tangential_gradients() -> None:
    w, gradient = normal(29, 53, seed=37), normal(29, 53, seed=41)
    w[3] = 0.0
    w[5] *= 1e25  # its squares are infinite
    expected = w.double()
    expected /= expected.norm(dim=1, keepdim=True).clamp_min(1e-300)
    tangential = gradient.double() - (gradient.double() * expected).sum(1, keepdim=True) * expected
    normalize_rows_(w, by_kernels=True)
    torch.testing.assert_close(w.double(), expected, rtol=5e-7, atol=1e-7)
    remove_parallel_gradient_(gradient, w, by_kernels=True)
    torch.testing.assert_close(gradient.double(), tangential, rtol=1e-6, atol=1e-6)
